r"""SQAM: TRQAM with the scalar adjoint, and critics that are penalised at the policy's actions.

    L = L_Q + L_BC + L_AM + c [mean Q_i(s, clip x_1) - mean Q_i(s, A)]

are the losses of TRQAM and the value penalty, by the online critics and not weighted by windows.
The end x_1 is that of the policy's ODE, not clipped; there is no chain.  With fresh noise ε_j,

    x_j  = (1 - t_j) ε_j + t_j x_1,     t_j = j/K, j = 1, ..., K,
    a_j  = -t_j ∇ mean_i Q̄_i(s, clip(x_1, -1, 1)),
    L_AM = mean_B Σ_j ‖(2/σ_j) (f - b̄)(s, x_j, t_j) + σ_j a_j‖²,     σ_j = g_j/√Λ,

(`applications.rl.agents.bridge`), and Λ by the path KL at these states.  Penalty, adjoint and trust
region are the options ``value_penalty``, ``adjoint`` and ``kl_budget`` that all agents of adjoint
matching have.

Source: "SQAM" (arXiv 2610.10437).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adjoint import Reward
from applications.rl.agents.base import Agent, Shapes, Uniform
from applications.rl.agents.chain_kernel import ChainKernel
from applications.rl.agents.domains import by_domain
from applications.rl.agents.losses import (
    Term,
    td_target,
    tilt_reward,
    tilt_terms,
)
from applications.rl.agents.options import (
    BUDGET,
    Adjoint,
    AgentConfig,
    BestOfOptions,
    CriticOptions,
    MatchingOptions,
    Range,
    at_least,
    checked_option,
    one_of,
)
from applications.rl.agents.rollouts import (
    FlowODE,
    Noise,
    PolicyFlow,
    Rollouts,
    best_of,
    candidates,
    chain_and_actions,
    condition,
    first_ranked,
    flow_action,
)
from applications.rl.agents.trust_region import trust_region
from flows import frozen

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class SQAMConfig(MatchingOptions, BestOfOptions, CriticOptions, AgentConfig):
    """Options of SQAM."""

    kl_budget: float | None = checked_option(0.5, BUDGET)
    """Path KL ε in nats per action at which the multiplier holds the policy; None turns it off."""
    value_penalty: float = checked_option(0.3, at_least(0.0))
    """Weight c of the penalty of the critics at the policy's actions."""
    adjoint: Adjoint = checked_option("scalar", one_of("lean", "scalar"))  # noqa: RUF009 — a field
    """Adjoint: "scalar" as published, or "lean", which makes TRQAM with a value penalty."""
    discount: float = checked_option(0.995, Range("in (0, 1]", lambda value: 0 < value <= 1))
    """Discount γ per environment step."""


class SQAM(Agent):
    """SQAM: TRQAM with the scalar adjoint, and critics penalised at the policy's actions.

    Attributes:
        critic, target_critic: `Critics`.
        behaviour, target_behaviour, policy: `FlowActor`; the second is None if it is not used.
        kernel: `ChainKernel` of the memoryless chain.
        trust_region: `TrustRegion` of a ``kl_budget``, or None.
    """

    config: SQAMConfig
    config_class = SQAMConfig
    color = "#c9a0dc"
    page = "docs/agents/sqam.md"
    published = by_domain(
        value_penalty=(0.3, 0.3, 0, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3),
        discount=(0.995, 0.995, 0.995, 0.995, 0.999, 0.995, 0.995, 0.995, 0.995, 0.999),
    )

    def __init__(self, config: SQAMConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.critic = self.critics(config.critics)
        self.target_critic = frozen(self.critic)
        self.behaviour = self.flow_actor()
        self.target_behaviour = frozen(self.behaviour) if config.target_behaviour else None
        self.policy = self.flow_actor()
        self.kernel = ChainKernel(config.kernel, config.flow_steps, config.adjoint)
        self.trust_region = trust_region(config)

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Declare the noises of the next actions, of the behaviour loss and of the bridge."""
        chunk = (batch_size, self.chunk_dim)
        return {
            "next_action_noise": (batch_size, self.config.best_of_n, self.chunk_dim),
            "bc_x0": chunk,
            "bc_t": Uniform((batch_size, 1)),
            "sde_x0": chunk,
            "sde_eps": (self.config.flow_steps, *chunk),
        }

    def act_shapes(self, batch_size: int) -> Shapes:
        """Declare the start of the ODE for each candidate."""
        return {"noise": (batch_size, self.config.best_of_n, self.chunk_dim)}

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Term]:
        """Compute the terms of L = L_Q + L_BC + L_AM (`tilt_terms`)."""
        config, s, flow = self.config, batch.observations, self.flow
        x0, actions = noise["bc_x0"], self.flatten(batch.actions)
        self.kernel.measure(flow.reference, x0, actions, batch.valid, condition(s))
        next_actions, chain, _ = self.rollouts(batch, noise)
        y = td_target(self.target_critic, batch, next_actions, config.window_discount, config.rho)
        return tilt_terms(
            self.critic,
            flow,
            self.reward,
            chain,
            batch,
            actions,
            y,
            noise,
            value_penalty=config.value_penalty,
            trust_region=self.trust_region,
        )

    @property
    def flow(self) -> PolicyFlow:
        """Return the velocity of the policy, in the chain and when it acts."""
        return PolicyFlow(self.policy, self.behaviour, self.target_behaviour, self.config.residual)

    @property
    def reward(self) -> Reward:
        """Return the reward τ Q of the tilt."""
        return tilt_reward(self.critic, self.target_critic, self.config)

    @torch.no_grad()
    def rollouts(self, batch: Batch, noise: Noise) -> Rollouts:
        """Run the ODE at the next observations and the chain at the observations, together."""
        config, kernel = self.config, self.kernel.on(batch.actions.device)
        rows, x = candidates(batch.next_observations, noise["next_action_noise"])
        ode = FlowODE(rows, x, config.flow_steps, config.solver)
        chain, actions = chain_and_actions(self.flow, kernel, batch.observations, noise, ode)
        return Rollouts(best_of(self.critic, rows, actions, config.best_of_n), chain)

    def propose(self, observations: Tensor, noise: Noise) -> Tensor:
        """Propose one candidate: the ODE of the policy flow."""
        config, field, x = self.config, self.flow.acting_velocity, noise["noise"]
        return flow_action(field, observations, x, config.flow_steps, config.solver)

    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """Choose the candidate that the critics rank first."""
        return first_ranked(self.propose, self.critic, observations, noise)
