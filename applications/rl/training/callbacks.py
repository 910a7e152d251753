"""What watches a training of an agent, beside the loggers of ``flows.training.callbacks``.

`Evaluations` also keeps their promise: evaluation.csv is a function of the run alone, and a run
that is killed and resumed writes the same file as one left undisturbed.
"""

from __future__ import annotations

import copy
import csv
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from applications.rl import run_folder
from applications.rl.agents.base import Agent
from applications.rl.evaluation.background import PendingEvaluation
from applications.rl.evaluation.evaluator import Evaluation
from applications.rl.training.agent_loss import Phases
from flows import Callback, Trainer
from flows.training import checkpoint as checkpoints
from flows.training import replacing
from flows.training.callbacks import Metrics

COLUMNS = ("step", "phase", "success", "episodes", "return", "length")
EVALUATED = "evaluation/iteration"
"""Name, at Weights & Biases, of the iteration whose weights were evaluated."""


class ConfigFile(Callback):
    """Writes config.json when a training starts, so after a resume has been accepted.

    Arguments:
        folder: of the run.
        content: see `applications.rl.run_folder`.
    """

    def __init__(self, folder: Path, content: Mapping[str, Any]) -> None:
        self.folder, self.content = folder, content

    def on_start(self, trainer: Trainer) -> None:
        """Write it."""
        run_folder.write_config(self.folder, self.content)


class Evaluations(Callback):
    """Evaluates the agent every so many steps and at the end of each phase; rows of a CSV file.

    An evaluation may be a `PendingEvaluation`, which comes while training goes on.  Then its
    weights are kept in a file until its row is written, and a resumed run asks for it again.  There
    is one at a
    time: the next one, and the end of the training, wait for it.

    Arguments:
        folder: of the run; files of an earlier one are replaced unless it is resumed.
        schedule: phases of the training.
        every: steps between two evaluations.
        evaluate: callable (agent, step, phase) -> evaluation.

    Attributes:
        arrived: the evaluations of this process, each after the iteration whose weights it is of.

    Raises (when training starts):
        OSError: the file cannot be written.
        ValueError: a resumed run finds a file that is not one of these.
    """

    def __init__(
        self,
        folder: Path,
        schedule: Phases,
        every: int,
        evaluate: Callable[[Agent, int, str], Evaluation | PendingEvaluation],
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.path, self.snapshot = folder / run_folder.EVALUATION, folder / run_folder.SNAPSHOT
        self.schedule, self.every, self.evaluate = schedule, every, evaluate
        self.arrived: list[tuple[int, Evaluation]] = []
        self._rows: list[list[str]] = []
        self._pending: tuple[int, PendingEvaluation] | None = None

    @property
    def latest(self) -> Evaluation | None:
        """The last evaluation of this process, None before."""
        return self.arrived[-1][1] if self.arrived else None

    def on_start(self, trainer: Trainer) -> None:
        """Keep the rows up to where the run stands, and ask again for one that is not there."""
        self._rows = []
        done = trainer.iteration
        if done and self.path.exists():
            with self.path.open(newline="") as file:
                header, *rows = [*csv.reader(file)] or [[]]
            if tuple(header) != COLUMNS:
                raise ValueError(f"{self.path}: the columns must be {COLUMNS}, got {header}")
            here = (self.schedule.phase(done) == "online", self.schedule.step(done))
            self._rows = [row for row in rows if (row[1] == "online", int(row[0])) <= here]
        self._write()
        if self.snapshot.exists():
            state = checkpoints.load(self.snapshot)
            place = [str(value) for value in self._place(state["iteration"])]
            if state["iteration"] <= done and place not in (row[:2] for row in self._rows):
                agent = copy.deepcopy(trainer.module)
                agent.load_state_dict(state["module"])
                self._ask(cast(Agent, agent), state["iteration"])
            else:
                self.snapshot.unlink()
        if done == self.schedule.updates:
            self._wait()

    def on_step(self, trainer: Trainer, iteration: int, metrics: Metrics) -> None:
        """Write the row that has come, and evaluate if it is due."""
        if self._pending is not None and self._pending[1].arrived():
            self._wait()
        ends = (self.schedule.offline_steps, self.schedule.updates)
        if self.schedule.step(iteration) % self.every == 0 or iteration in ends:
            self._wait()
            self._ask(cast(Agent, trainer.module), iteration)
        if iteration == self.schedule.updates:
            self._wait()

    def _place(self, iteration: int) -> tuple[int, str]:
        return self.schedule.step(iteration), self.schedule.phase(iteration)

    def _ask(self, agent: Agent, iteration: int) -> None:
        result = self.evaluate(agent, *self._place(iteration))
        if isinstance(result, Evaluation):
            self._record(iteration, result)
        else:  # a checkpoint that says it was asked for comes after this
            state = {"iteration": iteration, "module": agent.state_dict()}
            checkpoints.save(self.snapshot, state)
            self._pending = (iteration, result)

    def _wait(self) -> None:
        """Record what is not there yet."""
        if self._pending is not None:
            iteration, answer = self._pending
            self._record(iteration, answer.result())
            self._pending = None

    def _record(self, iteration: int, result: Evaluation) -> None:
        step, phase = self._place(iteration)
        row = (step, phase, result.success, result.episodes, result.mean_return, result.mean_length)
        self._rows.append([f"{x:.9g}" if isinstance(x, float) else str(x) for x in row])
        self._write()
        self.snapshot.unlink(missing_ok=True)
        self.arrived.append((iteration, result))

    def _write(self) -> None:
        with replacing(self.path, "evaluations") as file:
            lines = [COLUMNS, *self._rows]
            file.write("".join(",".join(line) + "\n" for line in lines).encode())


class EvaluationPoints(Callback):
    """Hands each evaluation that has come to a logger of metrics, at its own iteration.

    Arguments:
        evaluations: comes before this among the callbacks.
        logger: with a row for every iteration.
    """

    def __init__(self, evaluations: Evaluations, logger: Callback) -> None:
        self.evaluations, self.logger = evaluations, logger
        self._seen = 0

    def on_start(self, trainer: Trainer) -> None:
        """Start the logger."""
        self.logger.on_start(trainer)

    def on_step(self, trainer: Trainer, iteration: int, metrics: Metrics) -> None:
        """Log what is new."""
        for place, evaluation in self.evaluations.arrived[self._seen :]:
            self.logger.on_step(trainer, place, evaluation_metrics(evaluation))
        self._seen = len(self.evaluations.arrived)

    def on_end(self, trainer: Trainer) -> None:
        """End the logger."""
        self.logger.on_end(trainer)


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """An evaluation as metrics."""
    return {
        "evaluation/success": evaluation.success,
        "evaluation/return": evaluation.mean_return,
        "evaluation/length": evaluation.mean_length,
    }


class Progress(Callback):
    """A bar of steps on the standard error stream, with updates per second and latest success.

    Arguments:
        description: what stands before the bar.
        schedule: phases of the training.
        evaluations: where the latest success is found.
    """

    def __init__(
        self, description: str, schedule: Phases, evaluations: Evaluations | None = None
    ) -> None:
        self.description, self.schedule, self.evaluations = description, schedule, evaluations
        self._bar: Any = None
        self._shown: Evaluation | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Open the bar where the run stands."""
        self._bar = tqdm(
            total=self.schedule.updates,
            initial=trainer.iteration,
            desc=self.description,
            unit=" updates",
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def on_step(self, trainer: Trainer, iteration: int, metrics: Metrics) -> None:
        """Move the bar."""
        latest = None if self.evaluations is None else self.evaluations.latest
        if latest is not self._shown and latest is not None:
            self._shown = latest
            self._bar.set_postfix_str(f"success {latest.success:.0%}", refresh=False)
        self._bar.update(1)

    def on_end(self, trainer: Trainer) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class WandbLogger(Callback):
    """Metrics to Weights & Biases; a resumed run continues the same one.

    Arguments:
        project: its name there.
        name: of the run, as shown.
        path: file that keeps the run's identity there, which a resume reads.
        config: options to show.
        every: iterations between two rows; the last iteration always has one.
        evaluations: to send too; comes before this among the callbacks.

    Raises (when training starts):
        ImportError: the package is not installed.
    """

    def __init__(
        self,
        project: str,
        name: str,
        path: Path,
        config: Mapping[str, Any],
        every: int,
        evaluations: Evaluations | None = None,
    ) -> None:
        self.project, self.name, self.path = project, name, path
        self.config, self.every = config, every
        self.evaluations = evaluations
        self._seen = 0
        self._run: Any = None

    def on_start(self, trainer: Trainer) -> None:
        """Open the run."""
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                "logging to Weights & Biases needs: pip install wandb (0.19.10 or newer)"
            ) from error
        continued = bool(trainer.iteration) and self.path.exists()
        if not continued:
            with replacing(self.path, "wandb") as file:
                file.write(uuid.uuid4().hex.encode())
        self._run = wandb.init(
            project=self.project,
            name=self.name,
            id=self.path.read_text(encoding="utf-8"),
            config=dict(self.config),
            resume="allow" if continued else "never",
            reinit="create_new",  # beside those of seeds that are trained together
        )
        # Steps there never decrease, so evaluations that come later have an axis of their own.
        self._run.define_metric(EVALUATED)
        self._run.define_metric("evaluation/*", step_metric=EVALUATED)

    def on_step(self, trainer: Trainer, iteration: int, metrics: Metrics) -> None:
        """Send the metrics once in ``every`` iterations and at the end, evaluations at once."""
        if iteration % self.every == 0 or iteration == trainer.config.iterations:
            sent = {name: float(value) for name, value in metrics.items()}
            self._run.log(sent, step=iteration)
        new = () if self.evaluations is None else self.evaluations.arrived[self._seen :]
        for place, evaluation in new:
            # At its own next step, which after a resume may lie beyond this iteration.
            self._run.log(evaluation_metrics(evaluation) | {EVALUATED: float(place)})
        self._seen += len(new)

    def on_end(self, trainer: Trainer) -> None:
        """Close the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None
