r"""ReBRAC: a deterministic policy that climbs the critics and is held near the actions of the data.

    L   = L_Q + L_μ,
    L_μ = -mean q / λ + α mean_B w ‖μ(s) - A‖²,
    q   = mean Q(s, μ(s)) - ρ sd Q(s, μ(s)),      λ = mean |q|, held constant,

with `critic_loss` of `applications.rl.agents.losses`.  The policy is μ(s) = tanh(f(s)), whose last
layer starts a tenth as wide as others, so that the first actions are near 0.  Division by λ frees α
from the scale of the rewards.  Targets smooth the policy as TD3 does, by clipped noise on the
action of the target network μ̄, and the agent acts by μ with the same noise:

    a'  = clip(μ̄(s') + ξ),     a = clip(μ(s) + ξ),     ξ = clip(noise N, -c, c),     N ~ N(0, I).

As published, the agent adds the noise wherever it acts, in evaluations too; the imitation is a sum
over the chunk, not its mean; the policy is trained in every update, but the target networks move in
every second one only.  Gradients are not clipped.

Source: Tarasov et al., "Revisiting the minimalist approach to offline reinforcement learning"
(arXiv 2305.09836), with chunks and an ensemble of critics as in Li and Levine (arXiv 2601.14234).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from applications.rl.agents.base import Agent, Shapes
from applications.rl.agents.domains import by_domain
from applications.rl.agents.losses import Term, critic_loss, pessimistic, td_target
from applications.rl.agents.networks import Critics, DeterministicActor
from applications.rl.agents.options import (
    AgentConfig,
    CriticOptions,
    at_least,
    checked_option,
)
from applications.rl.agents.rollouts import Noise
from flows import frozen

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class ReBRACConfig(CriticOptions, AgentConfig):
    """Options of ReBRAC."""

    alpha: float = checked_option(0.01, at_least(0.0))
    """Weight α of the imitation."""
    action_noise: float = checked_option(0.2, at_least(0.0))
    """Standard deviation of the noise on actions, in targets and wherever the agent acts."""
    noise_clip: float = checked_option(0.5, at_least(0.0))
    """Largest noise c on an action."""
    target_every: int = checked_option(2, at_least(1))
    """Updates from one step of the target networks to the next."""


class ReBRAC(Agent):
    """ReBRAC: a deterministic policy that climbs the critics near the actions of the data.

    Attributes:
        critic, target_critic: `Critics`.
        actor, target_actor: `DeterministicActor`.
    """

    config: ReBRACConfig
    config_class = ReBRACConfig
    color = "#d64f6f"
    page = "docs/agents/rebrac.md"
    published = by_domain(
        alpha=(0.1, 0.03, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01),
        action_noise=(0, 0, 0, 0, 0, 0.2, 0.2, 0.2, 0, 0.1),
    )

    def __init__(self, config: ReBRACConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.critic = self.critics(config.critics)
        self.target_critic = frozen(self.critic)
        self.actor = DeterministicActor(
            observation_dim,
            self.chunk_dim,
            hidden=config.hidden,
            layer_norm=config.actor_layer_norm,
        )
        self.target_actor = frozen(self.actor)

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Declare the noise on the next actions."""
        return {"next_action_noise": (batch_size, self.chunk_dim)}

    def act_shapes(self, batch_size: int) -> Shapes:
        """Declare the noise on the actions."""
        return {"noise": (batch_size, self.chunk_dim)}

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Term]:
        """Compute the terms of L = L_Q + L_μ."""
        config, s, actions = self.config, batch.observations, self.flatten(batch.actions)
        next_actions = self.next_actions(batch, noise)
        y = td_target(self.target_critic, batch, next_actions, config.window_discount, config.rho)
        return {
            "critic": critic_loss(self.critic, s, actions, y, batch.valid),
            "actor": imitating_actor_loss(
                self.actor, self.critic, s, actions, batch.valid, config.alpha, config.rho
            ),
        }

    @torch.no_grad()
    def next_actions(self, batch: Batch, noise: Noise) -> Tensor:
        """Compute the noisy actions (B, chunk_dim) of the target policy at next observations."""
        return self.noisy(self.target_actor(batch.next_observations), noise["next_action_noise"])

    def noisy(self, actions: Tensor, noise: Tensor) -> Tensor:
        """Add clipped noise to actions, both (B, chunk_dim), and clip them."""
        clip = self.config.noise_clip
        return (actions + (self.config.action_noise * noise).clamp(-clip, clip)).clamp(-1, 1)

    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """Compute the noisy actions of the policy."""
        return self.noisy(self.actor(observations), noise["noise"])


def imitating_actor_loss(
    actor: DeterministicActor,
    critic: Critics,
    observations: Tensor,
    actions: Tensor,
    valid: Tensor,
    alpha: float,
    rho: float,
) -> Term:
    """Compute the loss of a policy that climbs normalised critics and imitates the data.

    Arguments:
        actor: the policy μ that is trained.
        critic: the online critics.
        observations: (B, observation_dim).
        actions: chunks of the data (B, chunk_dim).
        valid: w (B,), which weighs the imitation alone.
        alpha: weight α of the imitation.
        rho: pessimism ρ of the value that is climbed.
    """
    own = actor(observations)
    q = pessimistic(critic(observations, own, stop_weight_gradient=True), rho)
    scale = q.detach().abs().mean()
    imitation = (valid * (own - actions).square().sum(1)).mean()
    return alpha * imitation - q.mean() / scale, {
        "actor/bc_loss": imitation.detach(),
        "actor/q": q.detach().mean(),
        "actor/q_scale": scale,
    }
