r"""FBRAC: a flow that imitates the data and climbs the critics through all steps of its ODE.

    L   = L_Q + L_BC + L_π
    L_π = -(1/α) mean Q(s, clip ODE_b(s, z)),      z normal noise,

with `critic_loss` and `behaviour_loss` of `applications.rl.agents.losses`.  L_BC and L_π train the
same flow b, which is the policy.  The gradient of L_π passes through the K steps of the ODE; the
online critics are held constant, a component that ends outside of [-1, 1] has no gradient, and
windows are not weighted.  α divides the value, as published: a large one keeps the flow at the
data.  Gradients are not clipped.

Source: Park et al., "Flow Q-learning" (arXiv 2502.02538), section on baselines, after Wu et al.,
"Behavior regularized offline reinforcement learning" (arXiv 1911.11361), in the form of Li and
Levine (arXiv 2601.14234).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from applications.rl.agents.base import Agent, Shapes, Uniform
from applications.rl.agents.domains import by_domain
from applications.rl.agents.losses import Term, behaviour_loss, critic_loss, td_target
from applications.rl.agents.networks import Critics
from applications.rl.agents.options import (
    AgentConfig,
    BestOfOptions,
    CriticOptions,
    above,
    checked_option,
)
from applications.rl.agents.rollouts import Noise, first_ranked, flow_action
from flows import frozen

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class FBRACConfig(BestOfOptions, CriticOptions, AgentConfig):
    """Options of FBRAC."""

    alpha: float = checked_option(1.0, above(0))
    """Weight α of the imitation: the value is divided by it."""


class FBRAC(Agent):
    """FBRAC: a flow that imitates the data and climbs the critics through its whole ODE.

    Attributes:
        critic, target_critic: `Critics`.
        policy: `FlowActor`.
    """

    config: FBRACConfig
    config_class = FBRACConfig
    color = "#9fb3c8"
    page = "docs/agents/fbrac.md"
    published = by_domain(alpha=(0.03, 100, 0.1, 0.1, 30, 0.03, 1, 0.3, 0.1, 10))

    def __init__(self, config: FBRACConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.critic = self.critics(config.critics)
        self.target_critic = frozen(self.critic)
        self.policy = self.flow_actor()

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Declare the noises of the next actions, of the flow's path and of its own actions."""
        chunk = (batch_size, self.chunk_dim)
        return {
            "next_action_noise": (batch_size, self.config.best_of_n, self.chunk_dim),
            "bc_x0": chunk,
            "bc_t": Uniform((batch_size, 1)),
            "bptt_noise": chunk,
        }

    def act_shapes(self, batch_size: int) -> Shapes:
        """Declare the start of the flow for each candidate."""
        return {"noise": (batch_size, self.config.best_of_n, self.chunk_dim)}

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Term]:
        """Compute the terms of L = L_Q + L_BC + L_π."""
        config, s, actions = self.config, batch.observations, self.flatten(batch.actions)
        with torch.no_grad():
            starts = {"noise": noise["next_action_noise"]}
            next_actions = self.chunks(batch.next_observations, starts)
        y = td_target(self.target_critic, batch, next_actions, config.window_discount, config.rho)
        own = self.propose(s, {"noise": noise["bptt_noise"]})
        return {
            "critic": critic_loss(self.critic, s, actions, y, batch.valid),
            "behaviour": behaviour_loss(self.policy, s, actions, batch.valid, noise),
            "value": climbing_loss(self.critic, s, own, config.alpha),
        }

    def propose(self, observations: Tensor, noise: Noise) -> Tensor:
        """Propose one candidate: the ODE of the flow."""
        config, x = self.config, noise["noise"]
        return flow_action(self.policy, observations, x, config.flow_steps, config.solver)

    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """Choose the candidate that the critics rank first."""
        return first_ranked(self.propose, self.critic, observations, noise)


def climbing_loss(critic: Critics, observations: Tensor, actions: Tensor, alpha: float) -> Term:
    """Compute minus the mean value of the policy's own actions, divided by α.

    Arguments:
        critic: the online critics, held constant.
        observations: (B, observation_dim).
        actions: the policy's actions (B, chunk_dim), with gradient.
        alpha: α.
    """
    q = critic(observations, actions, stop_weight_gradient=True).mean()
    return -q / alpha, {"actor/q_loss": -q.detach()}
