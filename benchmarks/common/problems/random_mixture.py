"""A seed draws problems at random: mixtures in 1 to 16 dimensions.

For each the seed draws the dimension, 2 to 6 components of random weights, covariances with random
axes and variances from .03 to .33, and means: each lies 2 to 4 times the largest standard deviation
from an earlier one, in a random direction, and no nearer to any other.  The reward is linear or
quadratic in a random direction, scaled so that its standard deviation under the base, which for a
mixture is in closed form, is between 1 and 2.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from benchmarks.common.problems.closed_form import closed_form_problem
from benchmarks.common.problems.problem import Problem
from flows import GaussianMixture

MOST_DIMS = 16
COMPONENTS = (2, 6)
VARIANCES = (0.03, 0.33)
SEPARATION = (2.0, 4.0)
"""Distance of neighbouring means, in standard deviations of the widest component."""
REWARD_STD = (1.0, 2.0)
NAME = re.compile(r"random-(\d+)-(\d+)")


def random_name(seed: int, index: int) -> str:
    """Return the name of a problem that a seed draws; indices count from 0."""
    return f"random-{seed}-{index}"


def random_problem(name: str) -> Problem:
    """Return the problem of the name random-SEED-INDEX, a function of both numbers.

    Raises:
        ValueError: the name has another form.
    """
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"name must have the form random-SEED-INDEX, got {name!r}")
    seed, index = map(int, match.groups())
    g = torch.Generator().manual_seed(1_000_003 * seed + index)
    dim, count = _integer(1, MOST_DIMS, g), _integer(*COMPONENTS, g)
    axes = torch.linalg.qr(torch.randn(count, dim, dim, generator=g, dtype=torch.float64))[0]
    variances = _uniform(VARIANCES, (count, dim), g)
    covariances = axes @ torch.diag_embed(variances) @ axes.mT
    means = _means(dim, count, float(variances.max().sqrt()), g)
    weights = torch.randn(count, generator=g, dtype=torch.float64).exp()
    base = GaussianMixture(weights, means, covariances)
    A, b = torch.zeros(dim, dim, dtype=torch.float64), _direction(dim, g)
    if torch.rand((), generator=g) < 0.5:
        curve = _direction(dim, g)
        A = torch.outer(curve, curve)
    scale = float(_uniform(REWARD_STD, (), g)) / reward_std(base, A, b)
    return closed_form_problem(name, base, scale * b, scale * A if A.any() else None)


def reward_std(base: GaussianMixture, A: Tensor, b: Tensor) -> float:
    """Return the standard deviation of r(x) = bᵀx - ½ xᵀA x under a mixture.

    In a component N(m, S) the mean of r is bᵀm - ½ (mᵀA m + tr AS) and its variance
    gᵀS g + ½ tr (AS)² with g = b - A m.
    """
    m, AS = base.means, A @ base.covariances
    mean = m @ b - 0.5 * ((m @ A) * m).sum(1) - 0.5 * AS.diagonal(dim1=1, dim2=2).sum(1)
    g = b - m @ A
    variance = torch.einsum("ki,kij,kj->k", g, base.covariances, g)
    variance = variance + 0.5 * (AS @ AS).diagonal(dim1=1, dim2=2).sum(1)
    second = base.weights @ (variance + mean.square())
    return float((second - (base.weights @ mean).square()).sqrt())


def _means(dim: int, count: int, std: float, g: torch.Generator) -> Tensor:
    """Return means (count, dim), each some standard deviations from an earlier one, centred."""
    means = torch.zeros(1, dim, dtype=torch.float64)
    while len(means) < count:
        start = means[_integer(0, len(means) - 1, g)]
        new = start + std * _uniform(SEPARATION, (), g) * _direction(dim, g)
        if float((means - new).norm(dim=1).min()) > SEPARATION[0] * std * (1 - 1e-9):
            means = torch.cat([means, new[None]])
    return means - means.mean(0)


def _direction(dim: int, g: torch.Generator) -> Tensor:
    """Return a random unit vector (dim,)."""
    x = torch.randn(dim, generator=g, dtype=torch.float64)
    return x / x.norm()


def _uniform(bounds: tuple[float, float], shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Return uniform random numbers between two bounds."""
    low, high = bounds
    return low + (high - low) * torch.rand(shape, generator=g, dtype=torch.float64)


def _integer(low: int, high: int, g: torch.Generator) -> int:
    """Return a uniform random integer from ``low`` to ``high``, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))
