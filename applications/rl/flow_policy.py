r"""A flow as a policy: its condition, its action by the ODE, its behaviour-cloning loss.

The policy is the end of dx/dt = v(x, t | s) from Gaussian noise, in K equal steps and clipped to
[-1, 1] at the end only.  Behaviour cloning is flow matching on the chunks of the data (Lipman et
al., arXiv 2210.02747), with windows that cross the end of an episode (w = 0) left out of the sum
but not of the count:

    L_BC = mean_B [w mean_d (v(x_t, t | s) - (A - x_0))²],   x_t = (1 - t) x_0 + t A.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from flows.field import Cond, VelocityField
from flows.matching import flow_matching_loss

if TYPE_CHECKING:
    from applications.rl.agent import Noise

Solver = Literal["euler", "ab2"]


def condition(observations: Tensor) -> Cond:
    """Observations (B, observation_dim) as the condition of a flow actor."""
    return {"observation": observations}


def flow_action(
    field: VelocityField, observations: Tensor, x: Tensor, steps: int, solver: Solver = "euler"
) -> Tensor:
    """Action (B, d) of the flow from noise ``x`` (B, d) at observations (B, observation_dim).

    Agrees with `flows.sampling.sample` on a uniform grid, but is differentiable and never waits
    for the device.

    Arguments:
        field: velocity field conditioned on the observation.
        steps: K.
        solver: Euler as published, or two-step Adams-Bashforth (first step Euler), which is of
            second order at the same cost.
    """
    cond = condition(observations)
    previous: Tensor | None = None
    for k in range(steps):
        v = field(x, torch.full((), k / steps, dtype=x.dtype, device=x.device), cond)
        move = v if solver == "euler" or previous is None else 1.5 * v - 0.5 * previous
        x, previous = x + move / steps, v
    return x.clamp(-1, 1)


def behaviour_loss(
    field: VelocityField, observations: Tensor, chunks: Tensor, valid: Tensor, noise: Noise
) -> Tensor:
    """L_BC of chunks (B, d) weighted by ``valid`` (B,); noise ``bc_x0`` (B, d), ``bc_t`` (B, 1)."""
    loss, _ = flow_matching_loss(
        field,
        chunks,
        x0=noise["bc_x0"],
        t=noise["bc_t"].squeeze(1),
        cond=condition(observations),
        weights=valid,
    )
    return loss
