r"""QAM-F: QAM whose policy flow is imitated by a one-step policy that climbs the critics.

    L = L_Q + L_BC + L_AM + L_g

with `one_step_loss` of `applications.rl.agents.losses` beside the losses of QAM: g(s, z) is trained
on the action of the tilted flow from the same z.  The agent acts, and bootstraps, by clip g(s, z).
With α = 0 there is no g, and the agent is QAM.

Source: Li and Levine, "Q-learning with adjoint matching" (arXiv 2601.14234).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from adjoint import Reward
from applications.rl.agents.base import Agent, Options, Shapes, Uniform
from applications.rl.agents.chain_kernel import ChainKernel
from applications.rl.agents.domains import by_domain
from applications.rl.agents.losses import (
    Term,
    one_step_loss,
    td_target,
    tilt_reward,
    tilt_terms,
)
from applications.rl.agents.networks import OneStepActor
from applications.rl.agents.options import (
    AgentConfig,
    BestOfOptions,
    CriticOptions,
    MatchingOptions,
    at_least,
    checked_option,
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
class QAMFConfig(MatchingOptions, BestOfOptions, CriticOptions, AgentConfig):
    """Options of QAM-F."""

    alpha: float = checked_option(30.0, at_least(0.0))
    """Weight α of the imitation; 0 leaves the one-step policy out."""


class QAMF(Agent):
    """QAM-F: QAM whose flow is imitated by a one-step policy that climbs the critics.

    Attributes:
        critic, target_critic: `Critics`.
        behaviour, target_behaviour, policy: `FlowActor`; the second is None if it is not used.
        kernel: `ChainKernel` of the memoryless chain.
        trust_region: `TrustRegion` of a ``kl_budget``, or None.
        one_step: `OneStepActor`, or None where α = 0.
    """

    config: QAMFConfig
    config_class = QAMFConfig
    color = "#ff6f61"
    page = "docs/agents/qam-f.md"
    published = by_domain(
        inverse_temperature=(3, 1, 1, 3, 1, 10, 0.3, 3, 3, 0.3),
        alpha=(0, 300, 0, 30, 30, 300, 30, 3, 30, 30),
    )
    small: ClassVar[Options] = {
        "pointmaze-medium": {"inverse_temperature": 1.0, "alpha": 10.0},
        "cube-single": {"inverse_temperature": 1.0, "alpha": 300.0},
    }

    def __init__(self, config: QAMFConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.critic = self.critics(config.critics)
        self.target_critic = frozen(self.critic)
        self.behaviour = self.flow_actor()
        self.target_behaviour = frozen(self.behaviour) if config.target_behaviour else None
        self.policy = self.flow_actor()
        self.kernel = ChainKernel(config.kernel, config.flow_steps, config.adjoint)
        self.trust_region = trust_region(config)
        self.one_step: OneStepActor | None = self.one_step_actor() if config.alpha else None

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Declare the noises of the next actions, of the behaviour loss and of the other losses."""
        chunk = (batch_size, self.chunk_dim)
        return {
            "next_action_noise": (batch_size, self.config.best_of_n, self.chunk_dim),
            "bc_x0": chunk,
            "bc_t": Uniform((batch_size, 1)),
            "sde_x0": chunk,
            "sde_eps": (self.config.flow_steps, *chunk),
            **({"extra_base_noise": chunk} if self.one_step is not None else {}),
        }

    def act_shapes(self, batch_size: int) -> Shapes:
        """Declare noise z, or start of the ODE where there is no g, for each candidate."""
        return {"noise": (batch_size, self.config.best_of_n, self.chunk_dim)}

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Term]:
        """Compute the terms of L = L_Q + L_BC + L_AM (`tilt_terms`) + L_g."""
        config, s, flow = self.config, batch.observations, self.flow
        x0, actions = noise["bc_x0"], self.flatten(batch.actions)
        self.kernel.measure(flow.reference, x0, actions, batch.valid, condition(s))
        next_actions, chain, flow_actions = self.rollouts(batch, noise)
        y = td_target(self.target_critic, batch, next_actions, config.window_discount, config.rho)
        terms = tilt_terms(
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
        if self.one_step is not None:
            assert flow_actions is not None
            z = noise["extra_base_noise"]
            terms["one_step"] = one_step_loss(
                self.one_step, self.critic, s, z, flow_actions, config.alpha
            )
        return terms

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
        """Run the ODE that g imitates, or that of the next observations, and the chain together."""
        config, s, kernel = self.config, batch.observations, self.kernel.on(batch.actions.device)
        next_s, next_noise = batch.next_observations, noise["next_action_noise"]
        if self.one_step is None:
            rows, x = candidates(next_s, next_noise)
            ode = FlowODE(rows, x, config.flow_steps, config.solver)
            chain, actions = chain_and_actions(self.flow, kernel, s, noise, ode)
            return Rollouts(best_of(self.critic, rows, actions, config.best_of_n), chain)
        ode = FlowODE(s, noise["extra_base_noise"], config.flow_steps, config.solver)
        chain, flow_actions = chain_and_actions(self.flow, kernel, s, noise, ode)
        return Rollouts(self.chunks(next_s, {"noise": next_noise}), chain, flow_actions)

    def propose(self, observations: Tensor, noise: Noise) -> Tensor:
        """Propose one candidate: clip g(s, z), or without g the ODE of the policy flow."""
        if self.one_step is not None:
            return self.one_step(observations, noise["noise"]).clamp(-1, 1)
        config, field, x = self.config, self.flow.acting_velocity, noise["noise"]
        return flow_action(field, observations, x, config.flow_steps, config.solver)

    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """Choose the candidate that the critics rank first."""
        return first_ranked(self.propose, self.critic, observations, noise)
