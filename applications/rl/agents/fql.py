r"""FQL: a behaviour flow, and a one-step policy that imitates it and climbs the critics.

    L = L_Q + L_BC + L_g

with `critic_loss`, `behaviour_loss` and `one_step_loss` of `applications.rl.agents.losses`, the
last imitating the behaviour flow.  The agent acts, and bootstraps, by clip g(s, z).  Gradients are
not clipped, and only the critics have target networks.

Source: Park et al., "Flow Q-learning" (arXiv 2502.02538), with chunks and an ensemble of critics as
in Li and Levine (arXiv 2601.14234).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from applications.rl.agents.base import Agent, Options, Shapes, Uniform
from applications.rl.agents.domains import by_domain
from applications.rl.agents.losses import (
    Term,
    behaviour_loss,
    critic_loss,
    one_step_loss,
    td_target,
)
from applications.rl.agents.options import (
    AgentConfig,
    BestOfOptions,
    CriticOptions,
    at_least,
    checked_option,
)
from applications.rl.agents.rollouts import Noise, first_ranked, flow_action
from flows import frozen

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class FQLConfig(BestOfOptions, CriticOptions, AgentConfig):
    """Options of FQL."""

    alpha: float = checked_option(100.0, at_least(0.0))
    """Weight α of the imitation."""


class FQL(Agent):
    """FQL: a one-step policy that imitates a behaviour flow and climbs the critics.

    Attributes:
        critic, target_critic: `Critics`.
        behaviour: `FlowActor`.
        one_step: `OneStepActor`, the policy.
    """

    config: FQLConfig
    config_class = FQLConfig
    color = "#4fd1a5"
    page = "docs/agents/fql.md"
    published = by_domain(alpha=(300, 300, 300, 3, 30, 30, 100, 1, 3, 30))
    small: ClassVar[Options] = {
        "pointmaze-medium": {"alpha": 10.0},
        "cube-single": {"alpha": 300.0},
    }

    def __init__(self, config: FQLConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.critic = self.critics(config.critics)
        self.target_critic = frozen(self.critic)
        self.behaviour = self.flow_actor()
        self.one_step = self.one_step_actor()

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Declare the noises of the next actions, of the behaviour loss and of the other losses."""
        chunk = (batch_size, self.chunk_dim)
        return {
            "next_action_noise": (batch_size, self.config.best_of_n, self.chunk_dim),
            "bc_x0": chunk,
            "bc_t": Uniform((batch_size, 1)),
            "distill_noise": chunk,
        }

    def act_shapes(self, batch_size: int) -> Shapes:
        """Declare noise z of each candidate."""
        return {"noise": (batch_size, self.config.best_of_n, self.chunk_dim)}

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Term]:
        """Compute the terms of L = L_Q + L_BC + L_g."""
        config, s, actions = self.config, batch.observations, self.flatten(batch.actions)
        next_actions, flow_actions = self.rollouts(batch, noise)
        y = td_target(self.target_critic, batch, next_actions, config.window_discount, config.rho)
        z = noise["distill_noise"]
        return {
            "critic": critic_loss(self.critic, s, actions, y, batch.valid),
            "behaviour": behaviour_loss(self.behaviour, s, actions, batch.valid, noise),
            "one_step": one_step_loss(self.one_step, self.critic, s, z, flow_actions, config.alpha),
        }

    @torch.no_grad()
    def rollouts(self, batch: Batch, noise: Noise) -> tuple[Tensor, Tensor]:
        """Sample actions of the policy at the next observations, and of the flow from noise z."""
        config, z = self.config, noise["distill_noise"]
        next_actions = self.chunks(batch.next_observations, {"noise": noise["next_action_noise"]})
        return next_actions, flow_action(
            self.behaviour, batch.observations, z, config.flow_steps, config.solver
        )

    def propose(self, observations: Tensor, noise: Noise) -> Tensor:
        """Propose one candidate: clip g(s, z)."""
        return self.one_step(observations, noise["noise"]).clamp(-1, 1)

    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """Choose the candidate that the critics rank first."""
        return first_ranked(self.propose, self.critic, observations, noise)
