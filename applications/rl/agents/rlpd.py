r"""RLPD: soft actor-critic on chunks of actions, learning online with the data beside it.

    L = L_Q + L_π + L_entropy + L_imitation,
    e = tanh(m(s) + σ(s) ε),      ε ~ N(0, I),
    L_π         = -mean [mean Q(s, e) - ρ sd Q(s, e)],
    L_entropy   = α mean log p(e) + exp(log α) (-mean log p(e) - H),     H = -d/2,
    L_imitation = -bc_alpha mean_B w log p(clip(A, -1 + 10⁻⁵, 1 - 10⁻⁵))

with `critic_loss` of `applications.rl.agents.losses` and `entropy_loss` of
`applications.rl.agents.losses_gaussian`.  The agent acts, and bootstraps, by a sample of e.  The
target y has no term of entropy.  Gradients are not clipped.  With ``bc_alpha`` 0 there is no
imitation.

What makes it RLPD is how it is trained: without offline updates, and with batches of which one half
comes from the data and the other from the online transitions, after a beginning of random actions
(``balanced_sampling`` of `applications.rl.training.config.TrainConfig`).

Source: Ball et al., "Efficient online reinforcement learning with offline data" (arXiv 2302.02948);
Haarnoja et al., "Soft actor-critic algorithms and applications" (arXiv 1812.05905); with chunks, an
ensemble of critics and the imitation as in Li and Levine (arXiv 2601.14234).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from applications.rl.agents.base import Agent, Shapes
from applications.rl.agents.domains import by_domain
from applications.rl.agents.losses import Term, critic_loss, pessimistic, td_target
from applications.rl.agents.losses_gaussian import entropy_loss
from applications.rl.agents.networks import (
    Critics,
    TanhGaussianActor,
    tanh_gaussian_log_prob,
)
from applications.rl.agents.options import (
    AgentConfig,
    CriticOptions,
    EntropyOptions,
    at_least,
    checked_option,
)
from applications.rl.agents.rollouts import Noise
from flows import frozen

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch

INSIDE = 1 - 1e-5
"""Largest imitated action: at 1 the density of a tanh-Gaussian actor is no number."""


@dataclass(frozen=True)
class RLPDConfig(EntropyOptions, CriticOptions, AgentConfig):
    """Options of RLPD."""

    bc_alpha: float = checked_option(0.0, at_least(0.0))
    """Weight of the imitation of the batch's actions; 0 leaves it out."""


class RLPD(Agent):
    """RLPD: soft actor-critic on chunks of actions, with the data beside the online transitions.

    Attributes:
        critic, target_critic: `Critics`.
        actor: `TanhGaussianActor` on s.
        log_alpha: logarithm of the temperature of its entropy, a scalar.
    """

    config: RLPDConfig
    config_class = RLPDConfig
    color = "#e6d3b3"
    page = "docs/agents/rlpd.md"
    published = by_domain(bc_alpha=(0.01, 0.3, 0.1, 0, 0.03, 0, 0, 0, 0.01, 0))

    def __init__(self, config: RLPDConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.critic = self.critics(config.critics)
        self.target_critic = frozen(self.critic)
        self.actor = TanhGaussianActor(observation_dim, self.chunk_dim, hidden=config.hidden)
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Declare the noises of the next actions and of the actions of the actor's loss."""
        chunk = (batch_size, self.chunk_dim)
        return {"next_action_noise": chunk, "actor_noise": chunk}

    def act_shapes(self, batch_size: int) -> Shapes:
        """Declare the noise of the action."""
        return {"noise": (batch_size, self.chunk_dim)}

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Term]:
        """Compute the terms of L = L_Q + L_π + L_entropy + L_imitation."""
        config, s, actions = self.config, batch.observations, self.flatten(batch.actions)
        with torch.no_grad():
            next_actions, _ = self.actor.sample(batch.next_observations, noise["next_action_noise"])
        y = td_target(self.target_critic, batch, next_actions, config.window_discount, config.rho)
        mean, log_std = self.actor(s)
        u = mean + log_std.exp() * noise["actor_noise"]
        log_prob = tanh_gaussian_log_prob(u, mean, log_std)
        entropy = config.target_entropy * self.chunk_dim
        terms = {
            "critic": critic_loss(self.critic, s, actions, y, batch.valid),
            "actor": climbing_loss(self.critic, s, u.tanh(), config.rho),
            "entropy": entropy_loss(log_prob, self.log_alpha, entropy),
        }
        if config.bc_alpha:
            terms["imitation"] = imitation_loss(
                mean, log_std, actions, batch.valid, config.bc_alpha
            )
        return terms

    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """Sample actions of the actor."""
        return self.actor.sample(observations, noise["noise"])[0]


def climbing_loss(critic: Critics, observations: Tensor, actions: Tensor, rho: float) -> Term:
    """Compute minus the mean pessimistic value of actions (B, chunk_dim) that are differentiable.

    Arguments:
        critic: the online critics, of constant weights.
        observations: (B, observation_dim).
        actions: the actor's.
        rho: pessimism ρ.
    """
    q = pessimistic(critic(observations, actions, stop_weight_gradient=True), rho).mean()
    return -q, {"actor/q_loss": -q.detach()}


def imitation_loss(
    mean: Tensor, log_std: Tensor, actions: Tensor, valid: Tensor, weight: float
) -> Term:
    """Compute the weighted negative log-density of the data's actions under a tanh-Gaussian actor.

    Arguments:
        mean, log_std: of the actor before its tanh, (B, chunk_dim).
        actions: chunks of the data (B, chunk_dim).
        valid: w (B,).
        weight: factor of the loss.
    """
    u = actions.clamp(-INSIDE, INSIDE).atanh()
    loss = -(valid * tanh_gaussian_log_prob(u, mean, log_std)).mean()
    return weight * loss, {"actor/bc_loss": loss.detach()}
