"""Many updates per launch: N whole updates of trainers recorded as one CUDA graph, replayed.

An update is recorded whole (inputs drawn, loss, gradient, target networks, optimiser): the same
functions in the same order on the same random streams.  The host does what is left to it, which is
to count, to log, and to save.

What is recorded is fixed: shapes, the rate of the optimiser, every number of Python.  So an update
must not need the host.  This asks for a loss in parts (`flows.training.loss.SplitLoss`), and for a
trainer with a constant rate and no average (`check_recordable`).

The first N updates that could be launched are made one by one, on a stream like the recorded one:
they compile the loss where it is compiled, and create the state of the optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, cast

from flows.training import distributed
from flows.training.cuda_graphs import (
    Block,
    Capture,
    SecondStream,
    cuda_graph,
    on_device,
    on_side_stream,
)
from flows.training.loss import Metrics, SplitLoss
from flows.training.stacked import StackedTrainers
from flows.training.trainer import Trainer


class UpdateGraph:
    """Records N updates of trainers as a CUDA graph, and makes N updates with one launch.

    Arguments:
        updates: the number N of updates in a launch.
        capture: records a block and the generators it draws from, and returns a function that
            replays it; a CUDA graph by default.

    Raises:
        ValueError: ``updates`` below 1.
    """

    def __init__(self, updates: int, *, capture: Capture | None = None) -> None:
        if updates < 1:
            raise ValueError(f"updates of a launch must be at least 1, got {updates}")
        self.updates = updates
        self._on_cuda = capture is None
        self._capture = capture or cuda_graph
        self._trainers: tuple[Trainer, ...] = ()
        self._stacked: StackedTrainers | None = None
        self._warm = False
        self._replay: Block | None = None

    def __call__(self, trainers: tuple[Trainer, ...], stacked: StackedTrainers | None) -> None:
        """Make the next N updates of each trainer, and put their metrics into its ``unreported``.

        Nothing happens where fewer than N updates are left, where they need the host, or where the
        iteration is no multiple of N.

        Arguments:
            trainers: trainers on one CUDA device.
            stacked: the group that evaluates their losses together, if they are several.

        Raises:
            TypeError, ValueError: an update cannot be recorded, see `check_recordable`.
        """
        if (trainers, stacked) != (self._trainers, self._stacked):
            for trainer in trainers:
                check_recordable(trainer, self.updates, cuda=self._on_cuda)
            self._trainers, self._stacked = trainers, stacked
            self._warm, self._replay = False, None
        if not all(self._can_launch(trainer) for trainer in trainers):
            return
        with on_device(trainers[0].generator.device):
            self._make_updates()

    def _make_updates(self) -> None:
        trainers = self._trainers
        if not self._warm:
            blocks = on_side_stream(self._block, on_cuda=self._on_cuda)
            self._warm = True
        else:
            if self._replay is None:
                generators = [trainer.generator for trainer in trainers]
                with ExitStack() as capturable:
                    for trainer in trainers:
                        capturable.enter_context(trainer.optimizer.capturable())
                    self._replay = self._capture(self._block, generators)
            blocks = self._replay()
        for results in blocks:
            for trainer, result in zip(trainers, results, strict=True):
                loss = cast(SplitLoss, trainer.loss)
                host_metrics = loss.host_step(trainer.module, trainer.generator)
                trainer.unreported.append(result | host_metrics)

    def _can_launch(self, trainer: Trainer) -> bool:
        loss = cast(SplitLoss, trainer.loss)
        left = min(loss.updates_without_host(), trainer.config.iterations - trainer.iteration)
        return left >= self.updates and trainer.iteration % self.updates == 0

    def _block(self) -> list[list[Metrics]]:
        """Make N updates; return their metrics by update and trainer.

        The inputs of the next update do not depend on this one, so a second stream draws them
        meanwhile.  It waits for the update before, so that it never takes memory still in use.
        """
        second_stream = SecondStream() if self._on_cuda else nullcontext()
        results, following = [], self._draw()
        for left in reversed(range(self.updates)):
            inputs = following
            if left:
                with second_stream:
                    following = self._draw()
            results.append(self._update(inputs))
            if left and isinstance(second_stream, SecondStream):
                second_stream.join()
        return results

    def _draw(self) -> list[tuple[Any, ...]]:
        """Draw the inputs of one update of each trainer."""
        return [
            cast(SplitLoss, trainer.loss).sample(trainer.module, trainer.generator)
            for trainer in self._trainers
        ]

    def _update(self, inputs: Sequence[tuple[Any, ...]]) -> list[Metrics]:
        for trainer in self._trainers:
            trainer.zero_grad()
        if self._stacked is not None:
            self._stacked.backward([[(drawn, {})] for drawn in inputs])
        else:
            loss = cast(SplitLoss, self._trainers[0].loss)
            self._trainers[0].backward(lambda module, _: loss.evaluation(module, inputs[0]))
        results = [trainer.reduce_gradients() for trainer in self._trainers]
        for trainer, metrics in zip(self._trainers, results, strict=True):
            trainer.update_weights(metrics)
        return results


def check_recordable(trainer: Trainer, updates: int, *, cuda: bool = True) -> None:
    """Check that the updates of a trainer can be recorded, as they do not need the host.

    Raises:
        TypeError: its loss is not a `SplitLoss`.
        ValueError: the trainer is not on a CUDA device, is one of several processes, accumulates
            losses, has a schedule of rates, an average or a restart, or saves within N updates.
    """
    config, device = trainer.config, trainer.generator.device
    if cuda and device.type != "cuda":
        raise ValueError(f"updates can be recorded as a CUDA graph on cuda, got device {device}")
    if not isinstance(trainer.loss, SplitLoss):
        raise TypeError(
            "loss must be a flows.training.SplitLoss where updates are recorded, "
            f"got {trainer.loss!r}"
        )
    if distributed.size() > 1:
        raise ValueError(f"updates are recorded in one process, got {distributed.size()}")
    expected = {"lr_schedule": "constant", "warmup": 0, "ema_decay": 0, "accumulate": 1}
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} must be {value!r} where updates are recorded, got {getattr(config, name)}"
            )
    if config.checkpoint_every % updates:
        raise ValueError(
            f"checkpoint_every must be a multiple of {updates}, the updates of a launch, got "
            f"{config.checkpoint_every}"
        )
    if trainer.restart is not None:
        raise ValueError(f"restart must be None where updates are recorded, got {trainer.restart}")
