"""Random Gaussian mixtures of a few wide components make problems in any dimension."""

from __future__ import annotations

import torch

from benchmarks.common.problems.closed_form import closed_form_problem
from benchmarks.common.problems.problem import Problem
from flows import GaussianMixture

MIXTURE_DIMS = (2, 8, 32)


def mixture_problem(dim: int, components: int = 4, seed: int = 0) -> Problem:
    """Return the problem of a random mixture in ``dim`` dimensions under a quadratic reward.

    Component means lie on a sphere of radius 2.5, covariances have eigenvalues between 0.1 and 0.5;
    the reward is quadratic along one random direction and linear along another, scaled so that the
    tilt moves most of the mass in any dimension.  The seed fixes both.
    """
    g = torch.Generator().manual_seed(1000 * dim + seed)
    directions = torch.randn(components + 2, dim, generator=g, dtype=torch.float64)
    directions = directions / directions.norm(dim=1, keepdim=True)
    means = 2.5 * directions[:components]
    bases = torch.linalg.qr(torch.randn(components, dim, dim, generator=g, dtype=torch.float64))[0]
    scales = 0.1 + 0.4 * torch.rand(components, dim, generator=g, dtype=torch.float64)
    covariances = bases @ torch.diag_embed(scales) @ bases.transpose(1, 2)
    weights = torch.ones(components, dtype=torch.float64)
    base = GaussianMixture(weights, means, covariances)
    curve, push = directions[components], means[0] / means[0].norm()
    return closed_form_problem(
        f"mixture-{dim}d", base, b=0.6 * push, A=0.3 * torch.outer(curve, curve)
    )
