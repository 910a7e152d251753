r"""FAWAC: a flow fitted to the actions of the data, weighted by their advantage.

    L   = L_Q + L_V + L_π
    L_V = mean over critics and batch of w (Q̄_i(s, A) - V(s))²
    L_π = mean_B w ω mean_d (v(s, x_t, t) - (A - x_0))²,
    ω   = min(exp(τ (mean_i Q_i(s, A) - V(s))), 100)

with `critic_loss` and `behaviour_loss` of `applications.rl.agents.losses`, x_t = (1 - t) x_0 + t A.
The minimiser of E[exp(τ advantage) (-log π(A | s))] is π ∝ π_data exp(τ advantage), so the flow
learns the tilt of the data by sampling the data more or less often, and never leaves them.  V is
fitted to each of the target critics, without pessimism; the advantage in ω is that of the online
critics, and ω has no gradient.  The policy is the ODE of v; no candidates are compared.  Gradients
are not clipped.

Source: Park et al., "Flow Q-learning" (arXiv 2502.02538), section on baselines, after Nair et al.,
"AWAC: accelerating online reinforcement learning with offline datasets" (arXiv 2006.09359), in the
form of Li and Levine (arXiv 2601.14234).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from applications.rl.agents.base import Agent, Shapes, Uniform
from applications.rl.agents.domains import by_domain
from applications.rl.agents.losses import Term, behaviour_loss, critic_loss, td_target
from applications.rl.agents.networks import ValueNetwork
from applications.rl.agents.options import AgentConfig, CriticOptions, above, checked_option
from applications.rl.agents.rollouts import Noise, flow_action
from flows import frozen

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch

LARGEST_WEIGHT = 100.0
"""Bound of the weight ω of a transition."""


@dataclass(frozen=True)
class FAWACConfig(CriticOptions, AgentConfig):
    """Options of FAWAC."""

    inverse_temperature: float = checked_option(1.0, above(0))
    """Inverse temperature τ: the policy is the behaviour of the data tilted by exp(τ advantage)."""


class FAWAC(Agent):
    """FAWAC: a flow fitted to the actions of the data, weighted by their advantage.

    Attributes:
        critic, target_critic: `Critics`.
        policy: `FlowActor`.
        value: `ValueNetwork`.
    """

    config: FAWACConfig
    config_class = FAWACConfig
    color = "#c9a26b"
    page = "docs/agents/fawac.md"
    published = by_domain(inverse_temperature=(0.8, 6.4, 0.8, 6.4, 6.4, 0.8, 0.8, 0.8, 0.8, 0.8))

    def __init__(self, config: FAWACConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.critic = self.critics(config.critics)
        self.target_critic = frozen(self.critic)
        self.policy = self.flow_actor()
        self.value = ValueNetwork(observation_dim, hidden=config.hidden)

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Declare the noises of the next actions and of the flow's path."""
        chunk = (batch_size, self.chunk_dim)
        return {"next_action_noise": chunk, "bc_x0": chunk, "bc_t": Uniform((batch_size, 1))}

    def act_shapes(self, batch_size: int) -> Shapes:
        """Declare the start of the flow."""
        return {"noise": (batch_size, self.chunk_dim)}

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Term]:
        """Compute the terms of L = L_Q + L_V + L_π."""
        config, s, w = self.config, batch.observations, batch.valid
        actions, v = self.flatten(batch.actions), self.value(s)
        with torch.no_grad():
            next_actions = self.chunks(
                batch.next_observations, {"noise": noise["next_action_noise"]}
            )
            target_values = self.target_critic(s, actions)
            advantage = self.critic(s, actions).mean(0) - v
            weight = (config.inverse_temperature * advantage).exp().clamp_max(LARGEST_WEIGHT)
        y = td_target(self.target_critic, batch, next_actions, config.window_discount, config.rho)
        imitation, metrics = behaviour_loss(self.policy, s, actions, w * weight, noise)
        return {
            "critic": critic_loss(self.critic, s, actions, y, w),
            "value": value_loss(v, target_values, w),
            "policy": (imitation, metrics | {"actor/weight": weight.mean()}),
        }

    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """Run the ODE of the flow."""
        config, x = self.config, noise["noise"]
        return flow_action(self.policy, observations, x, config.flow_steps, config.solver)


def value_loss(values: Tensor, targets: Tensor, valid: Tensor) -> Term:
    """Compute the squared error of values (B,) against the values (E, B) of each target critic."""
    loss = (valid * (targets - values).square()).mean()
    return loss, {"value/loss": loss.detach(), "value/v_mean": values.detach().mean()}
