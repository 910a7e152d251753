"""The problems are one-dimensional mixtures with a quadratic reward.

A, B and C have broad modes.  D has two narrow modes far apart, and R a mode of 0.1 % that the
reward lifts to a half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adjoint import KERNELS, Kernel, make_kernel
from flows import GaussianMixture, uniform

Array = NDArray[np.float64]

BROAD = np.linspace(-9.0, 9.0, 721)
NARROW = np.concatenate(
    [
        np.linspace(-7.0, -2.0, 101)[:-1],
        np.linspace(-2.0, -0.4, 193)[:-1],
        np.linspace(-0.4, 0.4, 481),  # where the velocity turns from one mode to the other
        np.linspace(0.4, 2.0, 193)[1:],
        np.linspace(2.0, 7.0, 101)[1:],
    ]
)


@dataclass(frozen=True, eq=False)
class Problem:
    """A one-dimensional mixture and the reward r(x) = b x - ½ κ x².

    Attributes:
        states: (N,) increasing states on which functions are known.
        steps: numbers of steps K that the record holds.
    """

    base: GaussianMixture
    b: float
    kappa: float = 0.0
    states: Array = field(default_factory=lambda: BROAD)
    steps: tuple[int, ...] = (5, 10, 20, 40)

    def reward(self, x: Any) -> Any:
        """Return r(x) of a number, an array or a tensor."""
        return self.b * x - 0.5 * self.kappa * x**2

    @cached_property
    def _tilt(self) -> tuple[GaussianMixture, Tensor]:
        like = self.base.means
        return self.base.tilt(like.new_tensor([[self.kappa]]), like.new_tensor([self.b]))

    def exact(self) -> GaussianMixture:
        """Return the tilted mixture."""
        return self._tilt[0]

    @property
    def log_z(self) -> float:
        """The exact log E[exp r(X_1)]."""
        return float(self._tilt[1])

    @property
    def between(self) -> float:
        """The state halfway between the means, which separates the two modes."""
        return float(self.base.means.mean())

    def exact_mode_weight(self) -> float:
        """Return the probability of the exact tilt to the right of ``between``."""
        exact = self.exact()
        z = (exact.means[:, 0] - self.between) / exact.covariances[:, 0, 0].sqrt()
        return float((exact.weights * torch.special.ndtr(z)).sum())


def mixture(
    means: list[float], variances: list[float], weights: list[float] | None = None
) -> GaussianMixture:
    """Make a one-dimensional mixture in float64, with equal weights unless given."""
    m = torch.tensor(means, dtype=torch.float64)[:, None]
    std = torch.tensor(variances, dtype=torch.float64).sqrt()
    w = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    return GaussianMixture.isotropic(m, std, w)


HARD = (10, 20, 40, 80)
PROBLEMS = {
    "A": Problem(mixture([-2.0, 2.0], [0.25, 0.25]), 0.6),
    "B": Problem(mixture([-1.5, 1.2], [0.09, 0.49]), 0.8),
    "C": Problem(mixture([-1.5, 1.2], [0.09, 0.49]), 0.9, 1.5),
    "D": Problem(mixture([-1.0, 1.0], [0.01, 0.01]), 1.0, states=NARROW, steps=HARD),
    "R": Problem(
        mixture([-1.0, 1.0], [0.01, 0.01], [0.999, 0.001]),
        0.5 * math.log(999.0),
        states=NARROW,
        steps=HARD,
    ),
}


def quadrature_mmse(base: GaussianMixture, t: Tensor) -> Tensor:
    """Return E Var(X_1 | X_t) by the trapezoidal rule, a scalar."""
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]
    p = base.log_prob(x, t).exp()
    return (p * base.posterior_covariance(x, t)[:, 0, 0]).sum() / p.sum()


@cache
def kernel_for(base: GaussianMixture, name: str, steps: int) -> Kernel:
    """Make kernel ``name`` on the uniform grid, with the base's exact mmse."""
    grid = uniform(steps)
    mmse = covariance = None
    if "mmse" in KERNELS[name].needs:
        mmse = torch.stack([quadrature_mmse(base, t) for t in grid[:-1]])
    if name == "covariance_matched":
        covariance = base.covariance()
    return make_kernel(name, grid, mmse=mmse, covariance=covariance)


def base_step(problem: Problem, kernel: Kernel, k: int) -> tuple[Array, Array, Array]:
    """Return v_β at step k, the mean of the base's next state, and the noise level, each (N,)."""
    x = torch.from_numpy(problem.states)[:, None]
    v_base = problem.base(x, kernel.t[k])[:, 0].numpy()
    mean = float(kernel.mean_x[k]) * problem.states + float(kernel.mean_v[k]) * v_base
    if (noise := kernel.state_noise) is not None:
        std = noise.root(problem.base, k, x)[:, 0, 0].detach().numpy()
    else:
        last = kernel.noiseless_last and k == kernel.steps - 1
        std = np.full_like(problem.states, 0.0 if last else float(kernel.std[k]))
    return v_base, mean, std
