"""Callbacks of a training: its configuration file, progress bar and loggers.

`applications.rl.training.evaluations` has the callback that evaluates the agent.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from applications.rl import run_folder
from applications.rl.evaluation.evaluator import Evaluation
from applications.rl.training.config import TrainConfig
from applications.rl.training.evaluations import (
    EvaluationPoints,
    Evaluations,
    evaluation_metrics,
)
from applications.rl.training.phases import Phases
from flows import Callback
from flows.training import CSVLogger, TensorBoardLogger, Training, replacing
from flows.training.callbacks import Metrics, show_stop

EVALUATED = "evaluation/iteration"
"""Name, at Weights & Biases, of the iteration whose weights were evaluated."""


def training_callbacks(
    config: TrainConfig, seed: int, content: Mapping[str, Any], evaluations: Evaluations | None
) -> list[Callback]:
    """Make the callbacks of the run of ``seed``, in the order in which they are called.

    The progress bar and the loggers of evaluations must follow ``evaluations``, whose results they
    show.

    Arguments:
        config: options of the training.
        seed: seed of the run.
        content: content of config.json.
        evaluations: callback of the evaluations, or None.
    """
    folder, every = config.run_folder(seed), config.log_every
    result: list[Callback] = [
        ConfigFile(folder, content),
        CSVLogger(folder / run_folder.METRICS, every=every),
    ]
    if evaluations is not None:
        result.append(evaluations)
    if config.tensorboard:
        # Two writers, two folders: each hides what the other wrote before it in its own.
        events = folder / run_folder.TENSORBOARD
        result.append(TensorBoardLogger(events / "training", every=every))
        if evaluations is not None:
            points = TensorBoardLogger(events / "evaluation", every=1)
            result.append(EvaluationPoints(evaluations, points))
    if config.wandb is not None:
        name = f"{config.task}/{config.agent}/seed{seed}"
        path = folder / run_folder.WANDB
        result.append(WandbLogger(config.wandb, name, path, content, every, evaluations))
    result.append(Progress(f"{config.agent} seed {seed}", config.phases, evaluations))
    return result


class ConfigFile(Callback):
    """Writes config.json when a training starts, that is, after a resume has been accepted.

    Arguments:
        folder: folder of the run.
        content: content of the file, see `applications.rl.run_folder`.
    """

    def __init__(self, folder: Path, content: Mapping[str, Any]) -> None:
        self.folder, self.content = folder, content

    def on_start(self, trainer: Training) -> None:
        """Write the file."""
        run_folder.write_config(self.folder, self.content)


class Progress(Callback):
    """A bar of steps on the standard error stream, with updates per second and latest success.

    Arguments:
        description: what stands before the bar.
        phases: the phases of the training.
        evaluations: where the latest success is found.
    """

    def __init__(
        self, description: str, phases: Phases, evaluations: Evaluations | None = None
    ) -> None:
        self.description, self.phases, self.evaluations = description, phases, evaluations
        self._bar: Any = None
        self._shown: Evaluation | None = None

    def on_start(self, trainer: Training) -> None:
        """Open the bar at the iteration of the run."""
        self._bar = tqdm(
            total=self.phases.updates,
            initial=trainer.iteration,
            desc=self.description,
            unit=" updates",
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def on_step(self, trainer: Training, iteration: int, metrics: Metrics) -> None:
        """Move the bar."""
        latest = None if self.evaluations is None else self.evaluations.latest
        if latest is not self._shown and latest is not None and latest.told:
            self._shown = latest
            self._bar.set_postfix_str(f"success {latest.success:.0%}", refresh=False)
        self._bar.update(1)

    def on_end(self, trainer: Training) -> None:
        """Close the bar; say why the training was stopped, if it was."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        show_stop(trainer, self.description)


class WandbLogger(Callback):
    """Sends metrics to Weights & Biases; a resumed training continues its run there.

    Arguments:
        project: name of the project.
        name: name of the run, as shown.
        path: file that keeps the identifier of the run, which a resume reads.
        config: options to show.
        every: iterations between two rows; the last iteration always has one.
        evaluations: callback whose evaluations are sent too; it must precede this one.

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

    def on_start(self, trainer: Training) -> None:
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
            reinit="create_new",  # stacked seeds have runs of their own at the same time
        )
        # Steps there never decrease, so evaluations that arrive later have an axis of their own.
        self._run.define_metric(EVALUATED)
        self._run.define_metric("evaluation/*", step_metric=EVALUATED)

    def on_step(self, trainer: Training, iteration: int, metrics: Metrics) -> None:
        """Send the metrics once in ``every`` iterations and at the end, evaluations at once."""
        if iteration % self.every == 0 or iteration == trainer.config.iterations:
            sent = {name: float(value) for name, value in metrics.items()}
            self._run.log(sent, step=iteration)
        self._send_evaluations()

    def on_end(self, trainer: Training) -> None:
        """Send an evaluation after a stop, and close the run."""
        if self._run is not None:
            self._send_evaluations()
            self._run.finish()
            self._run = None

    def _send_evaluations(self) -> None:
        new = () if self.evaluations is None else self.evaluations.arrived[self._seen :]
        for place, evaluation in new:
            # At its own next step, which after a resume may lie beyond this iteration.
            self._run.log(evaluation_metrics(evaluation) | {EVALUATED: float(place)})
        self._seen += len(new)
