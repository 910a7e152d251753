r"""DAC: diffusion actor-critic, a diffusion whose predicted noise descends along the critics.

    L   = L_Q + L_π,
    L_π = α mean_B mean_d (ε - ε_θ)² + mean_B mean_d √(1 - ᾱ_t) ∇_x mean_i Q̄_i(s, x_t) ε_θ

with `critic_loss` of `applications.rl.agents.losses`, and noise, weights of windows and sampler as
in `applications.rl.agents.diffusion`.  The gradient is that of the target critics at the noised
actions x_t, which are not clipped.  At the minimum

    ε_θ = E[ε | x_t] - √(1 - ᾱ_t) ∇_x mean_i Q̄_i(s, x_t) / (2α),

so the score -ε_θ / √(1 - ᾱ_t) is that of the noised data plus the gradient of Q̄ / (2α): guidance
toward exp(τ Q) with τ = 1 / (2α).  The sampler goes by the posterior's mean.

Sources: Fang et al., "Diffusion actor-critic" (arXiv 2405.20555), as a baseline of Li and Levine,
"Q-learning with adjoint matching" (arXiv 2601.14234).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from applications.rl.agents.base import Agent, Shapes
from applications.rl.agents.diffusion import (
    NoisePredictor,
    acting_shapes,
    ddpm_action,
    denoising_loss,
    noised,
    update_shapes,
)
from applications.rl.agents.domains import by_domain
from applications.rl.agents.losses import Term, critic_loss, critic_reward, td_target
from applications.rl.agents.options import (
    AgentConfig,
    CriticOptions,
    DiffusionOptions,
    at_least,
    checked_option,
)
from applications.rl.agents.rollouts import Noise, condition
from flows import frozen

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class DACConfig(DiffusionOptions, CriticOptions, AgentConfig):
    """Options of DAC."""

    alpha: float = checked_option(1.0, at_least(0.0))
    """Weight α of the imitation of the data; the policy has the inverse temperature 1 / (2α)."""


class DAC(Agent):
    """DAC: a diffusion whose predicted noise descends along the critics.

    Attributes:
        critic, target_critic: `Critics`.
        policy: `NoisePredictor` ε_θ.
    """

    config: DACConfig
    config_class = DACConfig
    color = "#b05cc6"
    page = "docs/agents/dac.md"
    published = by_domain(alpha=(1, 1, 3, 0.3, 1, 0.3, 1, 1, 0.3, 0.3))

    def __init__(self, config: DACConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.critic = self.critics(config.critics)
        self.target_critic = frozen(self.critic)
        self.policy = NoisePredictor(
            observation_dim,
            self.chunk_dim,
            hidden=config.hidden,
            time_features=config.time_features,
            layer_norm=config.actor_layer_norm,
        )

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Declare the noises of the next actions and of the noised actions of the data."""
        return update_shapes(batch_size, self.chunk_dim, self.config.flow_steps)

    def act_shapes(self, batch_size: int) -> Shapes:
        """Declare the start of the diffusion and the noise of its steps."""
        return acting_shapes(batch_size, self.chunk_dim, self.config.flow_steps)

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Term]:
        """Compute the terms of L = L_Q + L_π."""
        config, s, actions = self.config, batch.observations, self.flatten(batch.actions)
        with torch.no_grad():
            own = {"noise": noise["next_action_noise"], "ddpm_z": noise["next_ddpm_z"]}
            next_actions = self.chunks(batch.next_observations, own)
        y = td_target(self.target_critic, batch, next_actions, config.window_discount, config.rho)
        x, t, deviation = noised(actions, noise, config.flow_steps)
        reward = critic_reward(self.target_critic, 1.0, clip=False)
        _, gradient, _ = reward.value_and_gradient(x, condition(s))
        predicted = self.policy(x, t, s)
        guidance = (deviation * gradient * predicted).mean(1)
        eps, w = noise["denoise_eps"], batch.valid
        return {
            "critic": critic_loss(self.critic, s, actions, y, w),
            "policy": denoising_loss(predicted, eps, guidance, w, config.alpha),
        }

    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """Run the sampler of the diffusion, by the posterior's means."""
        steps = self.config.flow_steps
        return ddpm_action(self.policy, observations, noise, steps, posterior=True)
