"""Callbacks watch a training run: the base class, the progress bar, and a clean stop.

A callback does not change the run, but it can end it: `StopTraining`.  Metrics arrive as tensors,
perhaps on a device that is still computing them; turning one into a number waits for the device, so
every callback does that only once in a number of iterations, and in the last one.
`flows.training.loggers` has the callbacks that write files.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flows.training.config import TrainerConfig

Metrics = Mapping[str, Tensor | float]


class Training(Protocol):
    """The parts of a `flows.training.Trainer` that callbacks may read."""

    module: nn.Module
    """The module in training."""
    ema: nn.Module
    """The running average of its weights, as a module."""
    config: TrainerConfig
    """The options of the training."""
    iteration: int
    """Optimiser steps done so far."""
    generator: torch.Generator
    """The source of random numbers of the loss."""
    checkpoint: Path | None
    """The checkpoint file, if the training keeps one."""
    stopped: str | None
    """The message of the callback that stopped the training, if one did."""


class StopTraining(Exception):  # noqa: N818  (it names the event, as StopIteration does)
    """Ends a training cleanly when a callback raises it, in ``on_start`` or ``on_step``.

    The other callbacks still see the iteration, a checkpoint is saved, ``on_end`` is called, and
    `Trainer.fit` returns the module that was reached.  ``Trainer.stopped`` then holds the message,
    which progress bars show.  In ``on_end``, where nothing is left to stop, only the message is
    kept.
    A resume goes on from there.  Of several processes all stop, whichever callback raised it; of
    several runs trained together only that of the callback.

    Example: ``raise StopTraining(f"reward {reward:.2f} is high enough")``
    """


class Callback:
    """A base class of callbacks, whose hooks do nothing; override the ones of interest.

    Attributes:
        writes: whether only the first of several processes (``flows.training.distributed``) calls
            this callback.  A callback that evaluates a sharded module must be called in all.
    """

    writes: bool = False

    def on_start(self, trainer: Training) -> None:
        """Run before the first iteration; ``trainer.iteration`` is above 0 in a resumed run.

        Raises:
            StopTraining: to end the training here.
        """

    def on_step(self, trainer: Training, iteration: int, metrics: Metrics) -> None:
        """Run after every iteration, before its checkpoint.

        Arguments:
            trainer: the training that calls.
            iteration: number of the iteration, from 1.
            metrics: metrics of the iteration, perhaps on a device that is still computing them.

        Raises:
            StopTraining: to end the training after this iteration.
        """

    def on_end(self, trainer: Training) -> None:
        """Run after the last iteration, and also when the training ends with an error."""


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse a value that is no sequence of callbacks before a training begins.

    Raises:
        TypeError: ``callbacks`` is no sequence, or it holds something that is no callback.
    """
    if not isinstance(callbacks, Sequence):
        raise TypeError(f"callbacks must be a sequence, got {callbacks!r}")
    for callback in callbacks:
        if isinstance(callback, type) or not hasattr(callback, "on_step"):
            got = f"the class {callback.__name__}" if isinstance(callback, type) else repr(callback)
            raise TypeError(
                f"callbacks must be a sequence of flows.training.callbacks.Callback, got {got}"
            )


class ProgressBar(Callback):
    """Shows a bar on the standard error stream with the loss and a few more metrics.

    Arguments:
        description: text before the bar.
        every: iterations between two readings of the metrics.
        shown: how many metrics are shown, in the order in which the loss returns them.
    """

    writes = True

    def __init__(self, description: str = "", *, every: int = 25, shown: int = 3) -> None:
        self.description = description
        self.every = check_every(every)
        self.shown = shown
        self._bar: Any = None

    def on_start(self, trainer: Training) -> None:
        """Open the bar at the iteration where the run stands."""
        self._bar = tqdm(
            total=trainer.config.iterations,
            initial=trainer.iteration,
            desc=self.description or None,
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def on_step(self, trainer: Training, iteration: int, metrics: Metrics) -> None:
        """Move the bar; read the metrics once in ``every`` iterations and at the end."""
        if due(trainer, iteration, self.every):
            shown = {name: f"{float(metrics[name]):.4g}" for name in [*metrics][: self.shown]}
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(1)

    def on_end(self, trainer: Training) -> None:
        """Close the bar; say why the training was stopped, if it was."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        show_stop(trainer, self.description or "training")


def default_callbacks(
    callbacks: Sequence[Callback], *, progress: bool | None = None, description: str = ""
) -> list[Callback]:
    """Return ``callbacks``, with a progress bar before them where one is wanted.

    One-call functions such as `flows.fit_flow` and `adjoint.tilt` pass their callbacks through
    this function, so that a bar appears on a terminal without being asked for.

    Arguments:
        callbacks: callbacks of the caller.
        progress: whether to show a bar; None shows one if the standard error stream is a terminal
            and ``callbacks`` holds no `ProgressBar`.
        description: text before the bar.

    Raises:
        TypeError: ``callbacks`` is no sequence of callbacks.
    """
    check_callbacks(callbacks)
    if progress is None:
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        progress = sys.stderr.isatty() and not has_bar
    return [*([ProgressBar(description)] if progress else []), *callbacks]


def describe_stop(trainer: Training) -> str | None:
    """Say where and why a callback stopped a training; None if none did."""
    if trainer.stopped is None:
        return None
    where = f"{trainer.iteration} of {trainer.config.iterations} updates"
    return f"stopped after {where}: {trainer.stopped}"


def show_stop(trainer: Training, name: str) -> None:
    """Write to the standard error stream where and why a training was stopped, if it was."""
    if trainer.stopped is not None:
        tqdm.write(f"{name}: {describe_stop(trainer)}", file=sys.stderr)


def check_every(every: int) -> int:
    """Return ``every``, iterations between two readings of metrics.

    Raises:
        ValueError: ``every`` is below 1.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    return every


def due(trainer: Training, iteration: int, every: int) -> bool:
    """Tell whether metrics are read after this iteration."""
    return iteration % every == 0 or iteration == trainer.config.iterations
