"""A Gaussian mixture under r(x) = bᵀx - ½ xᵀA x has its tilt in closed form.

The tilt is a mixture too (`flows.GaussianMixture.tilt`), so that samples, log Z and the optimal
velocity are exact in float64.  The probability of a mode is that of the cell of points nearest to
its centre c_j.  Which cell a point is in depends on the numbers y_j = c_jᵀx - ½|c_j|² alone, of
which the largest wins.  In each component of the mixture y is Gaussian with one entry per mode,
whatever the dimension of x, so that the probabilities are integrals in few dimensions, taken here
by quasi-random numbers.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from benchmarks.common.problems.problem import Problem
from flows import GaussianMixture

POINTS = 2**16
"""Quasi-random points in each component of a mixture, for an error of some 1e-5."""


def closed_form_problem(
    name: str, base: GaussianMixture, b: Tensor, A: Tensor | None = None
) -> Problem:
    """Return the problem of a mixture under r(x) = bᵀx - ½ xᵀA x, with a mode for each component.

    Arguments:
        name: name of the problem.
        base: mixture in float64.
        b: (d,) linear coefficients of the reward.
        A: (d, d) symmetric quadratic coefficients; None for a linear reward.
    """
    dim = base.dim
    tilted, log_z = base.tilt(torch.zeros(dim, dim, dtype=b.dtype) if A is None else A, b)

    def reward(x: Tensor, cond: object = None) -> Tensor:
        value = x @ b.to(x)
        return value if A is None else value - 0.5 * ((x @ A.to(x)) * x).sum(1)

    return Problem(
        name=name,
        dim=dim,
        base=copy.deepcopy(base).float(),
        reward=reward,
        sample=lambda n, generator: tilted.sample(n, generator=generator).float(),
        velocity=tilted,
        modes=tilted.means.float(),
        frequencies=cell_probabilities(tilted, tilted.means),
        log_z=float(log_z),
    )


def cell_probabilities(mixture: GaussianMixture, centres: Tensor) -> Tensor:
    """Return the probability (C,) under the mixture of the points nearest to each centre (C, d)."""
    count = len(centres)
    uniform = SobolEngine(count, scramble=True, seed=0).draw(POINTS, dtype=torch.float64)
    noise = torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12))
    total = torch.zeros(count, dtype=torch.float64)
    for weight, mean, covariance in zip(
        mixture.weights, mixture.means, mixture.covariances, strict=True
    ):
        variances, axes = torch.linalg.eigh(centres @ covariance @ centres.T)
        root = axes.flip(1) * variances.flip(0).clamp_min(0).sqrt()  # the widest axis comes first
        y = centres @ mean - 0.5 * centres.square().sum(1) + noise @ root.T
        total += weight * y.argmax(1).bincount(minlength=count) / POINTS
    return total
