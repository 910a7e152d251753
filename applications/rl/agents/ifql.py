r"""IFQL: implicit Q-learning with a behaviour flow, acting by the best of many samples of it.

    L   = L_Q + L_V + L_BC,
    L_V = mean |κ - 1[d < 0]| d²,     d = mean Q̄(s, A) - ρ sd Q̄(s, A) - V(s),
    y   = R + γ^h m V(s')

with `critic_loss`, `expectile_loss` and `behaviour_loss` of `applications.rl.agents.losses`; L_V
does not weight windows.  The agent acts by that of ``best_of_n`` samples of the flow of which the
least online critic is greatest.  Gradients are not clipped.

Source: Park et al., "Flow Q-learning" (arXiv 2502.02538), section on baselines, after Kostrikov et
al., "Offline reinforcement learning with implicit Q-learning" (arXiv 2110.06169).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from applications.rl.agents.base import Agent, Shapes, Uniform
from applications.rl.agents.domains import by_domain
from applications.rl.agents.losses import (
    Term,
    behaviour_loss,
    bootstrap,
    critic_loss,
    expectile_loss,
    pessimistic,
)
from applications.rl.agents.networks import ValueNetwork
from applications.rl.agents.options import (
    AgentConfig,
    CriticOptions,
    Range,
    at_least,
    checked_option,
)
from applications.rl.agents.rollouts import (
    Noise,
    ensemble_minimum,
    first_ranked,
    flow_action,
)
from flows import frozen

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class IFQLConfig(CriticOptions, AgentConfig):
    """Options of IFQL."""

    expectile: float = checked_option(0.9, Range("in (0, 1)", lambda value: 0 < value < 1))
    """Expectile κ: above 1/2 the value leans to the best actions of the data."""
    best_of_n: int = checked_option(32, at_least(1))
    """Samples of the flow of which the critics choose an action when acting."""


class IFQL(Agent):
    """IFQL: implicit Q-learning that acts by the best of many samples of a behaviour flow.

    Attributes:
        critic, target_critic: `Critics`.
        behaviour: `FlowActor`.
        value: `ValueNetwork`.
    """

    config: IFQLConfig
    config_class = IFQLConfig
    color = "#b79cf7"
    page = "docs/agents/ifql.md"
    published = by_domain(expectile=(0.95, 0.9, 0.9, 0.9, 0.7, 0.95, 0.95, 0.9, 0.8, 0.8))

    def __init__(self, config: IFQLConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.critic = self.critics(config.critics)
        self.target_critic = frozen(self.critic)
        self.behaviour = self.flow_actor()
        self.value = ValueNetwork(observation_dim, hidden=config.hidden)

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Declare start and time of the flow's path; targets need no action."""
        return {"bc_x0": (batch_size, self.chunk_dim), "bc_t": Uniform((batch_size, 1))}

    def act_shapes(self, batch_size: int) -> Shapes:
        """Declare the start of the flow for each candidate."""
        return {"noise": (batch_size, self.config.best_of_n, self.chunk_dim)}

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Term]:
        """Compute the terms of L = L_Q + L_BC + L_V."""
        config, s, actions = self.config, batch.observations, self.flatten(batch.actions)
        with torch.no_grad():
            y = bootstrap(batch, self.value(batch.next_observations), config.window_discount)
            q = pessimistic(self.target_critic(s, actions), config.rho)
        return {
            "critic": critic_loss(self.critic, s, actions, y, batch.valid),
            "behaviour": behaviour_loss(self.behaviour, s, actions, batch.valid, noise),
            "value": expectile_loss(self.value(s), q, config.expectile),
        }

    def propose(self, observations: Tensor, noise: Noise) -> Tensor:
        """Propose one candidate: the ODE of the behaviour flow."""
        config, x = self.config, noise["noise"]
        return flow_action(self.behaviour, observations, x, config.flow_steps, config.solver)

    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """Choose the candidate whose least critic is greatest."""
        return first_ranked(self.propose, self.critic, observations, noise, ensemble_minimum)
