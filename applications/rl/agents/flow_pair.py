r"""Agents of two flows: the behaviour b, fitted to the data, and the policy f, its tilt.

Both are initialised independently; f is not copied from b.  b̄, the target network of b, is what f
is compared with: the base of the memoryless chain and of its adjoint.  The policy acts by its ODE.
With ``residual`` f is a correction: the chain's velocity is b̄ + f, that of acting b + f (as
published).  A chain and an ODE of K steps need f at the same times k / K, and can share its
evaluations (`FlowPair.shared_velocity`).

A chain, its adjoint and its reading are a table (`adjoint.chain.kernels`).  All but one are
constants; ``moment_matched`` depends on the base, which learns, and is rebuilt for each update from
the running error of b̄ (`applications.rl.agents.base_error`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adjoint import KERNELS, Kernel, make_kernel, own_time_kernel
from applications.rl.agents.actor_critic import ActorCritic, CriticConfig
from applications.rl.agents.base import Noise, Shapes, require
from applications.rl.agents.base_error import BaseError
from applications.rl.agents.flow_policy import FlowODE, condition
from applications.rl.agents.networks import FlowActor
from flows import Cond, VelocityField, frozen
from flows import grid as grids

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch

AGENT_KERNELS = tuple(name for name in KERNELS if name != "covariance_matched")
"""Schemes of an agent: all but the one that costs a product per dimension and step."""


@dataclass(frozen=True)
class FlowPairConfig(CriticConfig):
    """Options of the agents with a behaviour and a policy flow."""

    inverse_temperature: float = 1.0
    """τ: the policy is the behaviour tilted by exp(τ Q)."""
    residual: bool = False
    """f is a correction of the behaviour's velocity rather than a velocity of its own."""
    grad_clip: float = 1.0
    """Largest norm of the gradient over all networks; 0 turns clipping off."""

    def __post_init__(self) -> None:
        """Refuse values out of range; see `AgentConfig`."""
        super().__post_init__()
        tau = self.inverse_temperature
        require(0 < tau < math.inf, "inverse_temperature", tau, "positive and finite")
        require(self.flow_steps >= 2, "flow_steps", self.flow_steps, "at least 2 for a chain")


class FlowPair(ActorCritic):
    """An agent with a behaviour flow, its target network and a policy flow.

    Arguments:
        config, observation_dim, action_dim: see `Agent`.
        kernel: scheme of the memoryless chain, of `AGENT_KERNELS`.
        target_behaviour: compare the policy with the target network of the behaviour.

    Attributes:
        base, target_behaviour, policy: `FlowActor`; target_behaviour is None if it is not used.
        error: `BaseError` of the reference, for ``moment_matched``; else None.
    """

    config: FlowPairConfig

    def __init__(
        self,
        config: FlowPairConfig,
        observation_dim: int,
        action_dim: int,
        *,
        kernel: str,
        target_behaviour: bool = True,
    ) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.behaviour = self.flow_actor()
        self.target_behaviour = frozen(self.behaviour) if target_behaviour else None
        self.policy = self.flow_actor()
        grid = grids.uniform(config.flow_steps)
        matched = kernel == "moment_matched"
        self.error = BaseError(grid) if matched else None
        self._kernel = own_time_kernel(grid, torch.ones(config.flow_steps, dtype=torch.float64))
        if not matched:
            self._kernel = make_kernel(kernel, grid)

    @property
    def reference(self) -> FlowActor:
        """b̄, with which the policy is compared."""
        return self.behaviour if self.target_behaviour is None else self.target_behaviour

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Velocity of the policy in the chain, of the shape of ``x``.

        Gradients reach f and ``x``, never the weights of the base.
        """
        return self._on(self.reference, self.policy(x, t, cond), x, t, cond)

    def acting_velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Velocity of the policy when it acts, of the shape of ``x``; gradients as above."""
        return self._on(self.behaviour, self.policy(x, t, cond), x, t, cond)

    def shared_velocity(self, ode: FlowODE) -> VelocityField:
        """`velocity` for a chain that starts with ``ode``, which each call also moves a step.

        The ODE moves by `acting_velocity`.  One evaluation of f serves both.
        """

        def velocity(x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
            assert cond is not None
            rows = {name: torch.cat([c, ode.cond[name]]) for name, c in cond.items()}
            f = self.policy(torch.cat([x, ode.x]), t, rows)
            own, others = f.split([len(x), len(ode.x)])
            ode.advance(self._on(self.behaviour, others, ode.x, t, ode.cond))
            return self._on(self.reference, own, x, t, cond)

        return velocity

    def _on(self, base: FlowActor, f: Tensor, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        """The velocity that ``f`` means: itself, or as a correction of ``base``."""
        if not self.config.residual:
            return f
        held = {name: p.detach() for name, p in base.named_parameters()}
        return f + functional_call(base, held, (x, t, cond))

    def kernel(self) -> Kernel:
        """The table of the chain, on the device of the agent."""
        device = next(self.parameters()).device
        if self._kernel.t.device != device:
            self._kernel = self._kernel.to(device)
        if self.error is None:
            return self._kernel
        return own_time_kernel(self._kernel.t, self.error.mmse())

    def measure_error(self, batch: Batch, noise: Noise) -> None:
        """Take a batch into the running error of b̄, where the kernel depends on it."""
        if self.error is not None:
            chunks, cond = self.flatten(batch.actions), condition(batch.observations)
            self.error.update(self.reference, noise["bc_x0"], chunks, batch.valid, cond)

    def flow_action(self, observations: Tensor, x: Tensor) -> Tensor:
        """Chunk (B, chunk_dim) of the policy's ODE from noise ``x`` of its shape, clipped."""
        return self.ode(observations, x).finish(self.acting_velocity)

    def ode(self, observations: Tensor, x: Tensor) -> FlowODE:
        """The policy's ODE at its start, noise ``x`` (B, chunk_dim)."""
        return FlowODE(observations, x, self.config.flow_steps, self.config.solver)

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Besides the noises of every agent with critics, start and steps of the chain."""
        shape = (batch_size, self.chunk_dim)
        chain = {"sde_x0": shape, "sde_eps": (self.config.flow_steps, *shape)}
        return super().noise_shapes(batch_size) | chain

    def target_pairs(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        """The critics and, where it is used, the target network of the behaviour."""
        pairs = super().target_pairs()
        return (
            pairs
            if self.target_behaviour is None
            else (*pairs, (self.behaviour, self.target_behaviour))
        )
