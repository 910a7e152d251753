"""A tilted flow is compared with the exact tilt of a problem.

velocity_error
    E‖v_θ - v*‖² / E‖v* - v_β‖² under p*_t, averaged over t = .1, .3, .5, .7, .9: 1 is the
    untilted base, 0 the optimum.  A ratio of squares, as in `benchmarks.fixed_points`.
mode_tv
    total variation between mode frequencies of ODE samples and the exact ones.
w2_ratio
    sliced Wasserstein distance to exact samples over that between two exact sets: the floor is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from applications.toy2d.distances import mode_frequencies
from applications.toy2d.distances import w2_ratio as ratio_of_distances
from benchmarks.common.problems import Problem
from flows import VelocityField, sample

Row = dict[str, str | int | float]
"""Row of a record: plain values by name."""

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
SAMPLES = 20_000
"""Exact samples of w2_ratio, half of them in each of the two sets."""


def velocity_error(problem: Problem, v: VelocityField, n: int = 2048) -> float:
    """Return the relative velocity error E‖v_θ - v*‖² / E‖v* - v_β‖², averaged over `TIMES`."""
    generator = torch.Generator().manual_seed(7)
    errors = []
    for time_ in TIMES:
        t = torch.tensor(time_)
        x1 = problem.sample(n, generator)
        x = t * x1 + (1 - t) * torch.randn(x1.shape, generator=generator)
        with torch.no_grad():
            best = problem.velocity(x, t)
            wrong = (v(x, t) - best).square().sum()
            whole = (problem.base(x, t) - best).square().sum()
        errors.append(float(wrong / whole))
    return sum(errors) / len(errors)


def flow_samples(v: VelocityField, dim: int, n: int, steps: int = 40) -> Tensor:
    """Draw ODE samples (n, dim) from fixed noise."""
    x0 = torch.randn(n, dim, generator=torch.Generator().manual_seed(8))
    return torch.cat([sample(v, part, grid=steps, method="ab2") for part in x0.split(8192)])


def mode_tv(problem: Problem, x: Tensor) -> float:
    """Return the total variation between mode frequencies of samples x (n, dim) and exact ones."""
    difference = mode_frequencies(x, problem.modes) - problem.frequencies
    return 0.5 * float(difference.abs().sum())


def w2_ratio(problem: Problem, x: Tensor) -> float:
    """Return the sliced Wasserstein distance of x (n, dim) to exact samples over its floor."""
    generator = torch.Generator().manual_seed(9)
    exact = [problem.sample(SAMPLES // 2, generator) for _ in range(2)]
    return ratio_of_distances(x[: SAMPLES // 2], *exact, size=SAMPLES // 16, generator=generator)
