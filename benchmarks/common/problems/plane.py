"""A problem in the plane tilts a target of `applications.toy2d` by one of its rewards.

The tilt is known by quadrature on a grid, and the optimal velocity

    v*(x, t) = E*[X_1 - X_0 | X_t = x],   X_0 = (x - t X_1)/(1-t),

is an average over the grid's cells, weighted by p*(x_1) N(x; t x_1, (1-t)² I).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from applications.toy2d.exact_tilt import GridTilt, grid_tilt
from applications.toy2d.rewards import make_reward
from applications.toy2d.targets import find_target
from benchmarks.common.problems.problem import Problem
from flows import VelocityField

PLANE_TARGETS = ("ring", "grid", "two_gaussians")
PLANE_REWARDS = ("linear", "ring", "half_plane", "peaks")


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
