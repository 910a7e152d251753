"""Tilting problems whose base flow, exact tilt and optimal velocity are known.

There are two families.  In the plane, a mixture target of `applications.toy2d` under one of its
rewards: the tilt by quadrature on a grid, and the optimal velocity

    v*(x, t) = E*[X_1 - X_0 | X_t = x],   X_0 = (x - t X_1)/(1-t),

as an average over the grid's cells, weighted by p*(x_1) N(x; t x_1, (1-t)² I).  In d dimensions, a
random Gaussian mixture under a quadratic reward, whose tilt is a mixture in closed form.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adjoint import ValueFunction
from applications.toy2d.exact_tilt import GridTilt, grid_tilt
from applications.toy2d.rewards import make_reward
from applications.toy2d.targets import find_target
from flows import GaussianMixture, VelocityField

PLANE_TARGETS = ("ring", "grid", "two_gaussians")
PLANE_REWARDS = ("linear", "ring", "half_plane", "peaks")
MIXTURE_DIMS = (2, 8, 32)


@dataclass(frozen=True, eq=False)
class Problem:
    """A base, a reward, and the exact tilt.

    Attributes:
        name, dim: name of the problem, and dimension of a sample.
        base: closed-form flow, float32.
        reward: (x, cond) → (B,).
        sample: (n, generator) → exact samples (n, dim), float32.
        velocity: (x, t) → optimal velocity (B, dim) at a float t.
        modes: (C, dim) centres whose cells partition the space.
        frequencies: (C,) exact probability of each cell.
        log_z: exact log Z.
    """

    name: str
    dim: int
    base: GaussianMixture
    reward: ValueFunction
    sample: Callable[[int, torch.Generator], Tensor]
    velocity: VelocityField
    modes: Tensor
    frequencies: Tensor
    log_z: float


def grid_velocity(exact: GridTilt) -> VelocityField:
    """Return the optimal velocity, as an average over those cells of a grid that hold mass."""
    points, weight = exact.points, exact.density.flatten()
    kept = weight > 1e-12 * weight.max()
    cells, log_w = points[kept].float(), weight[kept].log().float()

    def velocity(x: Tensor, t: Tensor, cond: object = None) -> Tensor:
        parts = []
        for part in x.split(256):
            square = (part[:, None] - t * cells).square().sum(2)
            posterior = torch.softmax(log_w - square / (2 * (1 - t) ** 2), 1)
            parts.append((posterior @ cells - part) / (1 - t))
        return torch.cat(parts)

    return velocity


def plane_problem(target_name: str, reward_name: str) -> Problem:
    """Return the problem of a mixture target in the plane under a toy reward."""
    target = find_target(target_name)
    assert target.mixture is not None
    assert target.modes is not None
    reward = make_reward(reward_name, target)
    fine = grid_tilt(target.mixture.log_prob, reward, target.extent + 2.0, 600)
    coarse = grid_tilt(target.mixture.log_prob, reward, target.extent + 1.0, 100)
    return Problem(
        name=f"{target_name}/{reward_name}",
        dim=2,
        base=copy.deepcopy(target.mixture).float(),
        reward=reward,
        sample=fine.sample,
        velocity=grid_velocity(coarse),
        modes=target.modes,
        frequencies=fine.mode_frequencies(target.modes),
        log_z=fine.log_z,
    )


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
    A, b = 0.3 * torch.outer(curve, curve), 0.6 * push
    tilted, log_z = base.tilt(A, b)

    def reward(x: Tensor, cond: object = None) -> Tensor:
        return x @ b.to(x) - 0.15 * (x @ curve.to(x)).square()

    many = tilted.sample(400_000, generator=g)
    centres = tilted.means.float()
    nearest = torch.cdist(many.float(), centres).argmin(1)
    return Problem(
        name=f"mixture-{dim}d",
        dim=dim,
        base=copy.deepcopy(base).float(),
        reward=reward,
        sample=lambda n, generator: tilted.sample(n, generator=generator).float(),
        velocity=copy.deepcopy(tilted).float(),
        modes=centres,
        frequencies=nearest.bincount(minlength=len(centres)).double() / len(many),
        log_z=float(log_z),
    )


def names() -> list[str]:
    """Return all names: targets × rewards in the plane, then mixtures by dimension."""
    plane = [f"{target}/{reward}" for target in PLANE_TARGETS for reward in PLANE_REWARDS]
    return plane + [f"mixture-{dim}d" for dim in MIXTURE_DIMS]


def make_problem(name: str) -> Problem:
    """Make the problem called ``name``.

    Raises:
        ValueError: the name is unknown; the message lists the known names.
    """
    if name not in names():
        raise ValueError(f"unknown problem {name!r}; expected one of {', '.join(names())}")
    if name.startswith("mixture-"):
        return mixture_problem(int(name.removeprefix("mixture-").removesuffix("d")))
    return plane_problem(*name.split("/"))
