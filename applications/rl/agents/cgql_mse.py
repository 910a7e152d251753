r"""CGQL-M: a behaviour flow guided by critics that learn the mean value of a noisy action.

    L   = L_Q + L_BC + c L_N
    L_N = mean over critics and batch of w (Q_i(s, x_t, t) - Q̄_i(s, A, 1))²,
    x_t = (1 - t) ε + t A,      t uniform on [0, 1), ε normal noise,

with `critic_loss` and `behaviour_loss` of `applications.rl.agents.losses`.  A critic at time t so
learns the mean of the values of the actions that x_t may have been made from.  The agent acts, and
bootstraps, by the ODE of the target behaviour b̄ with the guidance of these critics at the time of
the state (`applications.rl.agents.guidance`),

    v(x, t | s) = b̄(x, t | s) + ϑ [x + (1 - t) τ ∇_x mean_i Q_i(s, x, t)] / t.

Each critic learns from its own target critic, without pessimism.  The gradient in v is that of the
online critics.  Gradients of the weights are not clipped.

Source: Li and Levine, "Q-learning with adjoint matching" (arXiv 2601.14234), baseline CGQL-M.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from applications.rl.agents.base import Agent, Shapes, Uniform
from applications.rl.agents.domains import by_domain
from applications.rl.agents.guidance import (
    GuidedFlow,
    NoisyCriticOptions,
    NoisyValues,
    noisy_values,
)
from applications.rl.agents.losses import Term, behaviour_loss, critic_loss, td_target
from applications.rl.agents.networks import TimedCritics
from applications.rl.agents.options import AgentConfig, BestOfOptions, CriticOptions
from applications.rl.agents.rollouts import Noise, first_ranked
from flows import frozen

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class CGQLMSEConfig(NoisyCriticOptions, BestOfOptions, CriticOptions, AgentConfig):
    """Options of CGQL-M."""


class CGQLMSE(Agent):
    """CGQL-M: a behaviour flow guided by critics that learn the mean value of a noisy action.

    Attributes:
        critic, target_critic: `TimedCritics`.
        behaviour, target_behaviour: `FlowActor`; the agent acts by the second.
    """

    config: CGQLMSEConfig
    config_class = CGQLMSEConfig
    color = "#3fa9b5"
    page = "docs/agents/cgql-mse.md"
    published = by_domain(
        guidance=(0.1, 0.1, 0.01, 0.1, 0.1, 0.1, 0.01, 1, 0.1, 0.1),
        noisy_weight=(0.1, 0.1, 0.001, 0.1, 0.1, 0.001, 0.1, 0.001, 0.001, 0.1),
    )

    def __init__(self, config: CGQLMSEConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.critic = TimedCritics(
            observation_dim, self.chunk_dim, hidden=config.hidden, members=config.critics
        )
        self.target_critic = frozen(self.critic)
        self.behaviour = self.flow_actor()
        self.target_behaviour = frozen(self.behaviour)

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Declare the noises of the next actions, of the behaviour loss and of noisy actions."""
        chunk, times = (batch_size, self.chunk_dim), Uniform((batch_size, 1))
        return {
            "next_action_noise": (batch_size, self.config.best_of_n, self.chunk_dim),
            "noisy_t": times,
            "noisy_eps": chunk,
            "bc_x0": chunk,
            "bc_t": times,
        }

    def act_shapes(self, batch_size: int) -> Shapes:
        """Declare the start of the flow for each candidate."""
        return {"noise": (batch_size, self.config.best_of_n, self.chunk_dim)}

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Term]:
        """Compute the terms of L = L_Q + L_BC + c L_N."""
        config, s, actions = self.config, batch.observations, self.flatten(batch.actions)
        with torch.no_grad():
            starts = {"noise": noise["next_action_noise"]}
            next_actions = self.chunks(batch.next_observations, starts)
        y = td_target(self.target_critic, batch, next_actions, config.window_discount, config.rho)
        noisy = noisy_values(self.critic, self.target_critic, s, actions, noise)
        return {
            "critic": critic_loss(self.critic, s, actions, y, batch.valid),
            "critic_noisy": noisy_mse_loss(noisy, batch.valid, config.noisy_weight),
            "behaviour": behaviour_loss(self.behaviour, s, actions, batch.valid, noise),
        }

    @property
    def flow(self) -> GuidedFlow:
        """Return the guided flow of the target behaviour."""
        return GuidedFlow(self.target_behaviour, self.critic, self.config, noisy=True)

    def propose(self, observations: Tensor, noise: Noise) -> Tensor:
        """Propose one candidate: the ODE of the guided flow."""
        config, x = self.config, noise["noise"]
        return self.flow.action(observations, x, config.flow_steps, config.solver)

    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """Choose the candidate that the critics rank first."""
        return first_ranked(self.propose, self.critic, observations, noise)


def noisy_mse_loss(noisy: NoisyValues, valid: Tensor, weight: float) -> Term:
    """Compute the squared error of critics at noisy actions, times the weight c.

    Arguments:
        noisy: values that are trained, and their targets.
        valid: w (B,).
        weight: c.
    """
    loss = (valid * (noisy.values - noisy.targets).square()).mean()
    return weight * loss, {"critic/noisy_loss": loss.detach()}
