"""Checks that losses and gradient norms stay finite, and the error that ends a training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHECK_EVERY = 10
"""Iterations whose numbers are read together where reading them waits for the device."""


class TrainingDiverged(RuntimeError):  # noqa: N818  (it names the event, as StopIteration does)
    """A loss, gradient norm or weight is not finite; the last good checkpoint is untouched."""


class FiniteNumbers:
    """Losses and gradient norms that are checked to be finite, on a GPU with a delay.

    Reading a number of a GPU waits for it, so numbers of `CHECK_EVERY` iterations are read at once.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[int, Tensor, Tensor]] = []

    def add(self, iteration: int, loss: Tensor, norm: Tensor) -> None:
        """Note the numbers of an iteration, to be checked later."""
        self._waiting.append((iteration, loss, norm))

    def due(self, device: torch.device) -> bool:
        """Tell whether the numbers are to be read now."""
        return device.type == "cpu" or len(self._waiting) >= CHECK_EVERY

    def clear(self) -> None:
        """Forget numbers that have not been checked."""
        self._waiting.clear()

    def first_not_finite(self) -> str | None:
        """Read the numbers noted so far; return which is the first that is not finite, if any."""
        if not self._waiting:
            return None
        iterations, losses, norms = zip(*self._waiting, strict=True)
        self._waiting.clear()
        values = zip(torch.stack(losses).tolist(), torch.stack(norms).tolist(), strict=True)
        for iteration, (loss, norm) in zip(iterations, values, strict=True):
            for name, value in (("loss", loss), ("gradient norm", norm)):
                if not math.isfinite(value):
                    return f"{name} is {value} in iteration {iteration}"
        return None
