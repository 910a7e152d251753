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

from flows import Cond, VelocityField, flow_matching_loss

if TYPE_CHECKING:
    from applications.rl.agents.base import Noise

Solver = Literal["euler", "ab2"]


def condition(observations: Tensor) -> Cond:
    """Observations (B, observation_dim) as the condition of a flow actor."""
    return {"observation": observations}


class FlowODE:
    """The ODE of a flow under way, after some of its steps.

    Agrees with `flows.sampling.sample` on a uniform grid, but is differentiable, never waits for
    the device, and takes each step when it is told to.

    Arguments:
        observations: (B, observation_dim).
        x: noise (B, d).
        steps: K.
        solver: Euler as published, or two-step Adams-Bashforth (first step Euler), which is of
            second order at the same cost.

    Attributes:
        x: state (B, d) at time k / K.
        k: steps taken.
        cond: condition of the field.
    """

    def __init__(
        self, observations: Tensor, x: Tensor, steps: int, solver: Solver = "euler"
    ) -> None:
        self.cond, self.x, self.k = condition(observations), x, 0
        self.steps, self.solver = steps, solver
        self._previous: Tensor | None = None

    def advance(self, v: Tensor) -> None:
        """Take a step, given the velocity (B, d) at ``x`` and time k / K."""
        previous, self._previous = self._previous, v
        move = v if self.solver == "euler" or previous is None else 1.5 * v - 0.5 * previous
        self.x = self.x + move / self.steps
        self.k += 1

    def finish(self, field: VelocityField) -> Tensor:
        """Take the steps that are left with ``field``; the action (B, d), clipped."""
        while self.k < self.steps:
            t = torch.full((), self.k / self.steps, dtype=self.x.dtype, device=self.x.device)
            self.advance(field(self.x, t, self.cond))
        return self.x.clamp(-1, 1)


def flow_action(
    field: VelocityField, observations: Tensor, x: Tensor, steps: int, solver: Solver = "euler"
) -> Tensor:
    """Action (B, d) of the flow from noise ``x``; arguments as for `FlowODE`."""
    return FlowODE(observations, x, steps, solver).finish(field)


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
