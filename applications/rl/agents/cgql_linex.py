r"""CGQL-L: a behaviour flow guided by critics that learn the exponential mean of a noisy action.

    L   = L_Q + L_BC + c L_N
    L_N = mean over critics and batch of w l(δ),      δ = τ (Q̄_i(s, A, 1) - Q_i(s, x_t, t)),
    l   = exp(δ) + τ Q_i(s, x_t, t)  if δ <= 5,  else δ,
    x_t = (1 - t) ε + t A,           t uniform on [0, 1), ε normal noise,

with `critic_loss` and `behaviour_loss` of `applications.rl.agents.losses`.  The gradient of the
linear-exponential error with respect to Q_i is τ (1 - exp δ), so its mean vanishes where
exp(τ Q_i(s, x_t, t)) = E[exp(τ Q̄_i(s, A, 1)) | x_t].  This is the factor by which the density of
x_t changes if the actions are tilted by exp(τ Q): its score is the exact guidance, of which the
mean value of CGQL-M is an approximation.  The agent acts, and bootstraps, by the ODE of the target
behaviour b̄ with the guidance of these critics at the time of the state
(`applications.rl.agents.guidance`),

    v(x, t | s) = b̄(x, t | s) + ϑ [x + (1 - t) τ ∇_x mean_i Q_i(s, x, t)] / t.

Where δ > 5 the gradient is -τ, as published; the value of the loss jumps there, and it may be
negative.  Each critic learns from its own target critic, without pessimism.  The gradient in v is
that of the online critics.  Gradients of the weights are not clipped.

Source: Li and Levine, "Q-learning with adjoint matching" (arXiv 2601.14234), baseline CGQL-L.
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

LARGEST_EXPONENT = 5.0
"""Bound of δ, from which on the error is linear."""


@dataclass(frozen=True)
class CGQLLinexConfig(NoisyCriticOptions, BestOfOptions, CriticOptions, AgentConfig):
    """Options of CGQL-L."""


class CGQLLinex(Agent):
    """CGQL-L: a behaviour flow guided by critics that learn the exponential mean of noisy actions.

    Attributes:
        critic, target_critic: `TimedCritics`.
        behaviour, target_behaviour: `FlowActor`; the agent acts by the second.
    """

    config: CGQLLinexConfig
    config_class = CGQLLinexConfig
    color = "#2f7f99"
    page = "docs/agents/cgql-linex.md"
    published = by_domain(
        guidance=(0.1, 0.1, 0.01, 0.1, 0.1, 0.1, 0.01, 1, 0.1, 0.1),
        noisy_weight=(0.001, 0.1, 0.001, 0.001, 0.1, 0.001, 0.1, 0.001, 0.001, 0.1),
    )

    def __init__(self, config: CGQLLinexConfig, observation_dim: int, action_dim: int) -> None:
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
            "critic_noisy": noisy_linex_loss(
                noisy, batch.valid, config.inverse_temperature, config.noisy_weight
            ),
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


def noisy_linex_loss(
    noisy: NoisyValues, valid: Tensor, inverse_temperature: float, weight: float
) -> Term:
    """Compute the linear-exponential error of critics at noisy actions, times the weight c.

    Arguments:
        noisy: values that are trained, and their targets.
        valid: w (B,).
        inverse_temperature: τ.
        weight: c.
    """
    delta = inverse_temperature * (noisy.targets - noisy.values)
    # The bound inside exp keeps infinity out of the branch that is not taken, and its gradient.
    exponential = delta.clamp_max(LARGEST_EXPONENT).exp() + inverse_temperature * noisy.values
    loss = (valid * torch.where(delta > LARGEST_EXPONENT, delta, exponential)).mean()
    return weight * loss, {
        "critic/noisy_loss": loss.detach(),
        "critic/noisy_exponent": delta.detach().amax(),
    }
