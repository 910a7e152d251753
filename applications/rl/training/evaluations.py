"""Evaluations during a training, and the table of them.

evaluation.csv is a function of the run alone: a run that is killed and resumed writes the same file
as an undisturbed one, as the loggers of `flows.training` do.
"""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable
from pathlib import Path
from typing import cast

from applications.rl import run_folder
from applications.rl.agents.base import Agent
from applications.rl.environments.reproducible import episode_seed
from applications.rl.evaluation.background import BackgroundEvaluator, PendingEvaluation
from applications.rl.evaluation.evaluator import EpisodeEvaluator, Evaluation
from applications.rl.training.config import TrainConfig
from applications.rl.training.phases import Phases
from flows import Callback
from flows.training import Training, replacing
from flows.training import checkpoint as checkpoints
from flows.training.callbacks import Metrics

COLUMNS = ("step", "phase", "success", "episodes", "return", "length")
EVALUATION_STREAM = 1
"""Number that tells the seeds of evaluations apart from those of other episodes of a run."""


class Evaluations(Callback):
    """Evaluates the agent every so many steps and at the end of each phase; writes a CSV file.

    A training that a callback stops (`flows.training.StopTraining`) is evaluated where it stopped.
    An evaluation may be a `PendingEvaluation`, whose result arrives while training goes on.  Its
    weights are then kept in a file until its row is written, and a resumed run asks for it again.
    At most one is pending: the next evaluation, and the end of the training, wait for it.

    Arguments:
        folder: folder of the run; files of an earlier run are replaced unless it is resumed.
        phases: the phases of the training.
        every: number of steps between two evaluations.
        evaluate: function (agent, step, phase) -> evaluation.

    Attributes:
        arrived: pairs of an iteration and the evaluation of its weights, in this process.

    Raises (when training starts):
        OSError: the file cannot be written.
        ValueError: a resumed run finds a file that holds no evaluations.
    """

    def __init__(
        self,
        folder: Path,
        phases: Phases,
        every: int,
        evaluate: Callable[[Agent, int, str], Evaluation | PendingEvaluation],
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.path, self.snapshot = folder / run_folder.EVALUATION, folder / run_folder.SNAPSHOT
        self.phases, self.every, self.evaluate = phases, every, evaluate
        self.arrived: list[tuple[int, Evaluation]] = []
        self._rows: list[list[str]] = []
        self._pending: tuple[int, PendingEvaluation] | None = None

    @classmethod
    def of_run(
        cls, config: TrainConfig, seed: int, evaluator: EpisodeEvaluator | BackgroundEvaluator
    ) -> Evaluations:
        """Make the evaluations of the run of ``seed``, each on new episodes by ``evaluator``."""

        def evaluate(agent: Agent, step: int, phase: str) -> Evaluation | PendingEvaluation:
            path = (EVALUATION_STREAM, step, int(phase == "online"))
            return evaluator(agent, episodes=config.eval_episodes, seed=episode_seed(seed, *path))

        return cls(config.run_folder(seed), config.phases, config.eval_every, evaluate)

    @property
    def latest(self) -> Evaluation | None:
        """Latest evaluation of this process, None before the first."""
        return self.arrived[-1][1] if self.arrived else None

    def on_start(self, trainer: Training) -> None:
        """Keep the rows up to the iteration of the run; ask again for a missing evaluation."""
        self._rows = []
        done = trainer.iteration
        if done and self.path.exists():
            with self.path.open(newline="") as file:
                header, *rows = [*csv.reader(file)] or [[]]
            if tuple(header) != COLUMNS:
                raise ValueError(f"{self.path}: the columns must be {COLUMNS}, got {header}")
            here = (self.phases.phase(done) == "online", self.phases.step(done))
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
        if done == self.phases.updates:
            self._wait()

    def on_step(self, trainer: Training, iteration: int, metrics: Metrics) -> None:
        """Write the row of an evaluation that has arrived, and evaluate if it is due."""
        if self._pending is not None and self._pending[1].arrived():
            self._wait()
        ends = (self.phases.offline_steps, self.phases.updates)
        if self.phases.step(iteration) % self.every == 0 or iteration in ends:
            self._wait()
            self._ask(cast(Agent, trainer.module), iteration)
        if iteration == self.phases.updates:
            self._wait()

    def on_end(self, trainer: Training) -> None:
        """Evaluate the last weights if a callback has stopped the training."""
        if trainer.stopped is None:
            return
        self._wait()
        place = [str(value) for value in self._place(trainer.iteration)]
        if place not in (row[:2] for row in self._rows):
            self._ask(cast(Agent, trainer.module), trainer.iteration)
            self._wait()

    def _place(self, iteration: int) -> tuple[int, str]:
        return self.phases.step(iteration), self.phases.phase(iteration)

    def _ask(self, agent: Agent, iteration: int) -> None:
        result = self.evaluate(agent, *self._place(iteration))
        if isinstance(result, Evaluation):
            self._record(iteration, result)
        else:  # the checkpoint of this iteration is written later
            state = {"iteration": iteration, "module": agent.state_dict()}
            checkpoints.save(self.snapshot, state)
            self._pending = (iteration, result)

    def _wait(self) -> None:
        """Wait for the pending evaluation, if there is one, and record it."""
        if self._pending is not None:
            iteration, answer = self._pending
            self._record(iteration, answer.result())
            self._pending = None

    def _record(self, iteration: int, result: Evaluation) -> None:
        step, phase = self._place(iteration)
        success = result.success if result.told else "not told"
        row = (step, phase, success, result.episodes, result.mean_return, result.mean_length)
        self._rows.append([f"{x:.9g}" if isinstance(x, float) else str(x) for x in row])
        self._write()
        self.snapshot.unlink(missing_ok=True)
        self.arrived.append((iteration, result))

    def _write(self) -> None:
        with replacing(self.path, "evaluations") as file:
            lines = [COLUMNS, *self._rows]
            file.write("".join(",".join(line) + "\n" for line in lines).encode())


class EvaluationPoints(Callback):
    """Hands each evaluation that has arrived to a logger of metrics, at its own iteration.

    Arguments:
        evaluations: callback of the evaluations, which must precede this one.
        logger: a logger that accepts a row at every iteration.
    """

    def __init__(self, evaluations: Evaluations, logger: Callback) -> None:
        self.evaluations, self.logger = evaluations, logger
        self._seen = 0

    def on_start(self, trainer: Training) -> None:
        """Start the logger."""
        self.logger.on_start(trainer)

    def on_step(self, trainer: Training, iteration: int, metrics: Metrics) -> None:
        """Log the evaluations that arrived since the last call."""
        for place, evaluation in self.evaluations.arrived[self._seen :]:
            self.logger.on_step(trainer, place, evaluation_metrics(evaluation))
        self._seen = len(self.evaluations.arrived)

    def on_end(self, trainer: Training) -> None:
        """Log an evaluation after a stop, and end the logger."""
        self.on_step(trainer, trainer.iteration, {})
        self.logger.on_end(trainer)


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Return the metrics of an evaluation by name."""
    success = {"evaluation/success": evaluation.success} if evaluation.told else {}
    return success | {
        "evaluation/return": evaluation.mean_return,
        "evaluation/length": evaluation.mean_length,
    }
