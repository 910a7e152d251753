"""Schemes: from a time grid, and what was measured of the base, to the table of a memoryless chain.

A scheme is an object, and a file.  To add one of your own, subclass `Scheme` and pass an instance
wherever a kernel's name is expected:

    class Halved(Scheme):
        name = "halved"
        summary = "the Euler-Maruyama chain with half the noise"

        def __call__(self, grid, moments):
            ...
            return Kernel.consistent(self.name, grid, mean_x=..., mean_v=..., std=...)

    tilt(base, reward, shape=(2,), config=TiltConfig(kernel=Halved()))

`adjoint.testing.check_kernel` says whether it keeps the contract.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adjoint.chain.kernels.kernel import Kernel

MEASURED = ("mmse", "covariance")
"""Names that a scheme's ``needs`` may contain: the fields of `Moments`."""


@dataclass(frozen=True)
class Moments:
    """Statistics of the base that schemes ask for.

    Attributes:
        mmse: (K,) float64, mean squared error E‖X_1 - x̂₁(X_t)‖²/d of the base's estimate of the
            data, at grid[:-1]; see `adjoint.chain.kernels.measure_mmse`.
        covariance: (d, d) float64 covariance of the base's samples.
    """

    mmse: Tensor | None = None
    covariance: Tensor | None = None


class Scheme(ABC):
    """A rule that turns a time grid into the table of a memoryless chain.

    Options of a scheme are attributes of the instance.  With the name and the class they make its
    description (``str``), by which a checkpoint knows the scheme again: numbers, text and tensors
    by value, other objects by their class.

    Attributes:
        name: short name, for reports and the command line.
        summary: one line that says what the scheme is.
        needs: what has to be measured of the base, of `MEASURED`.
        state_noise: True where the step noise depends on the state: then the base is differentiated
            twice, and ``compile`` and ``cuda_graphs`` are not possible.
        max_dim: largest dimension of a sample that the scheme serves; None for any.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    state_noise: ClassVar[bool] = False
    max_dim: ClassVar[int | None] = None

    @abstractmethod
    def __call__(self, grid: Tensor, moments: Moments) -> Kernel:
        """Return the table of the chain on ``grid``.

        Arguments:
            grid: (K+1,) float64, strictly increasing from 0 to 1.
            moments: the statistics named in ``needs``.
        """

    def __str__(self) -> str:
        """Return the name, class and options of the scheme, alike in every process."""
        options = ", ".join(f"{name}={_plain(value)}" for name, value in sorted(vars(self).items()))
        return f"{self.name}: {type(self).__module__}.{type(self).__qualname__}({options})"


def _plain(value: object) -> str:
    """Return the text of a value that is the same in every process; else the name of its class."""
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    if isinstance(value, Tensor):
        return repr(value.tolist())
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_plain, value))})"
    return type(value).__name__
