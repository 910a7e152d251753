"""Hard problems have narrow or rare modes, a strong reward, or many dimensions.

    narrow_two/linear           ½ N(-1, .1²) + ½ N(1, .1²) under r = x
    narrower_two/linear         ½ N(-1, .05²) + ½ N(1, .05²) under r = x
    rare_1e-2/linear, _1e-3     a mode of weight 1e-2 or 1e-3, which the reward lifts to a half
    weights_1_10_100/linear     three modes of weights 1:10:100 in the plane, lifted to a third each
    strong/quadratic            a reward that moves two modes by four standard deviations in eight
                                dimensions: E* log(p*/p) is 11 nats
    mixture-64d, mixture-256d   `mixture_problem` in more dimensions
    gaussian-256d               N(0, I) under r = -|x|²/20
    ring-64d                    eight Gaussians on a circle, in a plane that is embedded in 64
                                dimensions, times N(0, .1 I) in the other 62, under a linear reward

All are mixtures under linear or quadratic rewards, so that everything is in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.common.problems.closed_form import closed_form_problem
from benchmarks.common.problems.mixtures import mixture_problem
from benchmarks.common.problems.problem import Problem
from flows import GaussianMixture


def two_modes(name: str, *, std: float, weight: float = 0.5) -> Problem:
    """Return the problem of two modes at -1 and 1 on the line, under a linear reward.

    Arguments:
        name: name of the problem.
        std: standard deviation of both modes.
        weight: weight of the right mode.  The reward is x where it is one half; a rarer mode is
            lifted to one half.
    """
    weights = torch.tensor([1 - weight, weight], dtype=torch.float64)
    base = GaussianMixture.isotropic(_column([-1.0, 1.0]), std, weights)
    slope = 1.0 if weight == 0.5 else 0.5 * math.log((1 - weight) / weight)
    return closed_form_problem(name, base, _column([slope])[0])


def three_weights(name: str) -> Problem:
    """Return the problem of three modes of weights 100:10:1 on a circle in the plane.

    Modes of one covariance shift by the same step under a linear reward, so that their weights grow
    by exp(bᵀm_k) and b can make them equal.
    """
    angle = 2 * math.pi / 3 * torch.arange(3, dtype=torch.float64)
    means = 1.5 * torch.stack([angle.cos(), angle.sin()], 1)
    weights = torch.tensor([100.0, 10.0, 1.0], dtype=torch.float64)
    b = torch.linalg.solve(means[1:] - means[0], (weights[0] / weights[1:]).log())
    return closed_form_problem(name, GaussianMixture.isotropic(means, 0.25, weights), b)


def strong_quadratic(name: str) -> Problem:
    """Return the problem of two modes in eight dimensions under a narrow quadratic well far off.

    The second axis, along which the modes lie, has a slope and no curvature: both modes remain.
    """
    dim, curvature = 8, 20.0
    means = torch.zeros(2, dim, dtype=torch.float64)
    means[:, 1] = torch.tensor([-1.0, 1.0])
    well = torch.full((dim,), 0.6, dtype=torch.float64)
    well[0] = 1.6
    A = curvature * torch.eye(dim, dtype=torch.float64)
    A[1, 1] = 0.0
    b = curvature * well
    b[1] = 0.5
    return closed_form_problem(name, GaussianMixture.isotropic(means, 0.4), b, A)


def broad_gaussian(name: str, *, dim: int) -> Problem:
    """Return the problem of N(0, I) in ``dim`` dimensions under r = -|x|²/20."""
    base = GaussianMixture.isotropic(torch.zeros(1, dim, dtype=torch.float64), 1.0)
    zero = torch.zeros(dim, dtype=torch.float64)
    return closed_form_problem(name, base, zero, 0.1 * torch.eye(dim, dtype=torch.float64))


def embedded_ring(name: str, *, dim: int) -> Problem:
    """Return the problem of eight Gaussians on a circle in a random plane of ``dim`` dimensions.

    In the plane they are the target ``ring`` of the toy application under its reward ``linear``.
    """
    generator = torch.Generator().manual_seed(dim)
    square = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    axes = torch.linalg.qr(square)[0]
    plane = axes[:, :2]
    angle = math.pi / 4 * torch.arange(8, dtype=torch.float64)
    means = 2.4 * torch.stack([angle.cos(), angle.sin()], 1) @ plane.T
    variances = torch.full((dim,), 0.1, dtype=torch.float64)
    variances[:2] = 0.25**2
    covariance = axes @ variances.diag() @ axes.T
    weights = torch.ones(8, dtype=torch.float64)
    base = GaussianMixture(weights, means, covariance.expand(8, dim, dim))
    return closed_form_problem(name, base, plane @ torch.tensor([0.8, 0.5], dtype=torch.float64))


def _column(values: list[float]) -> Tensor:
    """Return a float64 column (N, 1) of numbers."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


HARD: dict[str, Callable[[str], Problem]] = {
    "narrow_two/linear": partial(two_modes, std=0.1),
    "narrower_two/linear": partial(two_modes, std=0.05),
    "rare_1e-2/linear": partial(two_modes, std=0.1, weight=1e-2),
    "rare_1e-3/linear": partial(two_modes, std=0.1, weight=1e-3),
    "weights_1_10_100/linear": three_weights,
    "strong/quadratic": strong_quadratic,
    "mixture-64d": lambda name: mixture_problem(64),
    "mixture-256d": lambda name: mixture_problem(256, components=2),  # the base's own time counts
    "gaussian-256d": partial(broad_gaussian, dim=256),
    "ring-64d": partial(embedded_ring, dim=64),
}
"""Makers of the hard problems by name; each takes the name."""
