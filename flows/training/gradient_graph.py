"""One launch per update: losses and gradients of a trainer recorded as a CUDA graph, replayed.

Loss and gradient are recorded, and the host does the rest: schedules of rates and averages may be
as they like.  A loss must do the same at each call of one phase (`flows.training.loss.Loss.phase`);
everything else that it takes from the host stays what it was when it was recorded.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from flows.training import distributed
from flows.training.cuda_graphs import Block, Capture, cuda_graph, on_device, on_side_stream
from flows.training.loss import Loss, Metrics
from flows.training.trainer import Trainer


class GradientGraph:
    """Records the losses and gradients of a trainer's updates once, and then replays them.

    ``trainer.backward()`` becomes one launch, and the rest of an update stays with the host: its
    schedule of rates, clipping, the optimiser, the average.  That is for updates of so many kernels
    that the rest does not count, such as those of a tilt.  The first `WARM` of a phase of the loss
    are made one by one.

    Arguments:
        trainer: a trainer on a CUDA device, whose loss says its phase.
        capture: as in `UpdateGraph`.

    Raises:
        TypeError: the loss has no phase.
        ValueError: the trainer is on another device, or is one of several processes.
    """

    WARM = 3

    def __init__(self, trainer: Trainer, *, capture: Capture | None = None) -> None:
        device = trainer.generator.device
        if capture is None and device.type != "cuda":
            raise ValueError(
                f"updates can be recorded as a CUDA graph on cuda, got device {device}"
            )
        if distributed.size() > 1:
            raise ValueError(f"updates are recorded in one process, got {distributed.size()}")
        if trainer.loss.phase is None:
            raise TypeError(
                "loss must say in its property phase which calls repeat each other "
                f"(flows.training.Loss.phase) to be recorded, got None from {trainer.loss!r}"
            )
        self._trainer, self._device, self._on_cuda = trainer, device, capture is None
        self._capture = capture or cuda_graph
        self._phase: Hashable = None
        self._calls_of_phase = 0
        self._replay: Block | None = None
        self._gradients: list[Tensor | None] = []

    def __call__(self) -> None:
        """Evaluate losses and gradients as ``trainer.backward()`` does.

        Raises:
            ValueError: the loss cannot be recorded, as one with a reward that reads numbers.
        """
        with on_device(self._device):
            self._make()

    def _make(self) -> None:
        trainer = self._trainer
        loss = trainer.loss
        if self._calls_of_phase == 0 or self._phase != loss.phase:
            self._phase, self._calls_of_phase, self._replay = loss.phase, 0, None
        self._calls_of_phase += 1
        if self._calls_of_phase <= self.WARM:
            on_side_stream(trainer.backward, on_cuda=self._on_cuda)
            return
        if self._replay is None:
            self._replay = self._record(loss)
        (trainer.loss_metrics[:],) = self._replay()
        loss.calls += trainer.config.accumulate
        for parameter, gradient in zip(trainer.optimizer.parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _record(self, loss: Loss) -> Block:
        trainer = self._trainer

        def block() -> list[list[Metrics]]:
            calls = loss.calls
            trainer.backward()
            loss.calls = calls
            self._gradients = [parameter.grad for parameter in trainer.optimizer.parameters]
            return [list(trainer.loss_metrics)]

        try:
            return self._capture(block, [trainer.generator])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a broken recording fails too
            raise ValueError(
                "the update cannot be recorded as a CUDA graph; a loss that waits for the GPU or "
                "draws on the CPU (its reward, base or sampler of conditions) needs "
                f"cuda_graphs=False, in a new process: {cause}"
            ) from error
