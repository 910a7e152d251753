r"""DSRL: a Gaussian policy that chooses the noise from which a behaviour flow makes its action.

    L = L_Q + L_BC + L_Z + L_π + L_entropy

with `critic_loss` and `behaviour_loss` of `applications.rl.agents.losses` and `entropy_loss` of
`applications.rl.agents.losses_gaussian`.  The flow b only imitates the data; its target network b̄
decodes noise n into the action clip ODE_b̄(s, n).  Critics Z_i(s, n) of noise stand for Q_i at the
decoded action, member by member, so that the policy climbs them without a gradient through the ODE:

    L_Z = mean over critics and batch of (Z_i(s, n) - Q_i(s, clip ODE_b̄(s, n)))²,     n ~ N(0, I),
    z   = tanh(m(s) + σ(s) ε),
    L_π = -mean Z(s, scale z),
    L_entropy = α mean log p(z) + exp(log α) (-mean log p(z) - H),     H = -d/2.

The agent acts, and bootstraps, by clip ODE_b̄(s, scale z).  As published, Z is fitted at unbounded
Gaussian noise, while the policy asks for noise of at most ``latent_scale`` in each dimension; log p
is that of z, before scaling; no loss but L_Q and L_BC weights windows; gradients are not clipped.

Source: Wagenmaker et al., "Steering your diffusion policy with latent space reinforcement learning"
(arXiv 2506.15799), with chunks and an ensemble of critics as in Li and Levine (arXiv 2601.14234).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from applications.rl.agents.base import Agent, Shapes, Uniform
from applications.rl.agents.domains import by_domain
from applications.rl.agents.losses import (
    Term,
    behaviour_loss,
    critic_loss,
    td_target,
)
from applications.rl.agents.losses_gaussian import entropy_loss
from applications.rl.agents.networks import Critics, TanhGaussianActor
from applications.rl.agents.options import (
    AgentConfig,
    BestOfOptions,
    CriticOptions,
    EntropyOptions,
    above,
    checked_option,
)
from applications.rl.agents.rollouts import (
    Noise,
    best_of,
    candidates,
    first_ranked,
    flow_action,
)
from flows import frozen

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class DSRLConfig(EntropyOptions, BestOfOptions, CriticOptions, AgentConfig):
    """Options of DSRL."""

    latent_scale: float = checked_option(1.0, above(0))
    """Largest noise that the policy may choose in each dimension."""


class DSRL(Agent):
    """DSRL: a Gaussian policy that chooses the noise of a behaviour flow.

    Attributes:
        critic, target_critic: `Critics` of actions.
        latent_critic: `Critics` of noise, without a target network.
        behaviour, target_behaviour: `FlowActor`; the second decodes noise into actions.
        actor: `TanhGaussianActor` on s, which chooses the noise.
        log_alpha: logarithm of the temperature of its entropy, a scalar.
    """

    config: DSRLConfig
    config_class = DSRLConfig
    color = "#6f7ff7"
    page = "docs/agents/dsrl.md"
    published = by_domain(latent_scale=(1, 0.4, 1, 0.8, 0.6, 1.4, 1.4, 1, 1.2, 0.8))

    def __init__(self, config: DSRLConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.critic = self.critics(config.critics)
        self.target_critic = frozen(self.critic)
        self.latent_critic = self.critics(config.critics)
        self.behaviour = self.flow_actor()
        self.target_behaviour = frozen(self.behaviour)
        self.actor = TanhGaussianActor(observation_dim, self.chunk_dim, hidden=config.hidden)
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Declare the noises of the next actions and of the losses."""
        chunk = (batch_size, self.chunk_dim)
        return {
            "next_latent_eps": (batch_size, self.config.best_of_n, self.chunk_dim),
            "distill_noise": chunk,
            "bc_x0": chunk,
            "bc_t": Uniform((batch_size, 1)),
            "latent_eps": chunk,
        }

    def act_shapes(self, batch_size: int) -> Shapes:
        """Declare the noise of the Gaussian policy for each candidate."""
        return {"latent_eps": (batch_size, self.config.best_of_n, self.chunk_dim)}

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Term]:
        """Compute the terms of L = L_Q + L_BC + L_Z + L_π + L_entropy."""
        config, s, actions = self.config, batch.observations, self.flatten(batch.actions)
        latents = noise["distill_noise"]
        next_actions, decoded = self.rollouts(batch, noise)
        y = td_target(self.target_critic, batch, next_actions, config.window_discount, config.rho)
        z, log_prob = self.actor.sample(s, noise["latent_eps"])
        entropy = config.target_entropy * self.chunk_dim
        return {
            "critic": critic_loss(self.critic, s, actions, y, batch.valid),
            "behaviour": behaviour_loss(self.behaviour, s, actions, batch.valid, noise),
            "latent_critic": latent_critic_loss(
                self.latent_critic, self.critic, s, latents, decoded
            ),
            "actor": latent_actor_loss(self.latent_critic, s, config.latent_scale * z),
            "entropy": entropy_loss(log_prob, self.log_alpha, entropy),
        }

    @torch.no_grad()
    def rollouts(self, batch: Batch, noise: Noise) -> tuple[Tensor, Tensor]:
        """Decode chosen noise at the next observations and Gaussian noise at the others, as one."""
        s, eps = batch.observations, noise["next_latent_eps"]
        rows, own = candidates(batch.next_observations, eps)
        starts = torch.cat([self.latents(rows, own), noise["distill_noise"]])
        both = self.decode(torch.cat([rows, s]), starts)
        actions, decoded = both.split([len(rows), len(s)])
        return best_of(self.critic, rows, actions, eps.shape[1]), decoded

    def latents(self, observations: Tensor, eps: Tensor) -> Tensor:
        """Choose the noise (B, chunk_dim) at which the flow starts."""
        return self.config.latent_scale * self.actor.sample(observations, eps)[0]

    def decode(self, observations: Tensor, latents: Tensor) -> Tensor:
        """Decode noise (B, chunk_dim) into actions by the ODE of the target network of the flow."""
        config = self.config
        return flow_action(
            self.target_behaviour, observations, latents, config.flow_steps, config.solver
        )

    def propose(self, observations: Tensor, noise: Noise) -> Tensor:
        """Propose one candidate: the action decoded from the noise that the policy chooses."""
        return self.decode(observations, self.latents(observations, noise["latent_eps"]))

    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """Choose the candidate that the critics rank first."""
        return first_ranked(self.propose, self.critic, observations, noise)


def latent_critic_loss(
    latent_critic: Critics,
    critic: Critics,
    observations: Tensor,
    latents: Tensor,
    decoded: Tensor,
) -> Term:
    """Compute the squared distance of critics of noise to the critics of the decoded action.

    Arguments:
        latent_critic: the critics Z of noise, which are trained.
        critic: the online critics Q, of as many members; constants.
        observations: (B, observation_dim).
        latents: noise n (B, chunk_dim).
        decoded: the action that the flow makes of it (B, chunk_dim).
    """
    with torch.no_grad():
        q = critic(observations, decoded)
    loss = (latent_critic(observations, latents) - q).square().mean()
    return loss, {"critic/distill_loss": loss.detach()}


def latent_actor_loss(latent_critic: Critics, observations: Tensor, latents: Tensor) -> Term:
    """Compute minus the mean value of the noise (B, chunk_dim) that a policy chooses."""
    q = latent_critic(observations, latents, stop_weight_gradient=True).mean()
    return -q, {"actor/q_loss": -q.detach()}
