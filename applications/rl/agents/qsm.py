r"""QSM: Q-score matching, a diffusion whose predicted noise follows the critics' gradient.

    L   = L_Q + L_π,
    L_π = α mean_B mean_d (ε - ε_θ)² + mean_B mean_d (-τ ∇_x mean_i Q̄_i(s, x_t) - ε_θ)²

with `critic_loss` of `applications.rl.agents.losses`, and noise, weights of windows and sampler as
in `applications.rl.agents.diffusion`.  The gradient is that of the target critics at the noised
actions x_t, which are not clipped.  The minimum is a mean of the noise of the data and of the
negative gradient,

    ε_θ = (α E[ε | x_t] - τ ∇_x mean_i Q̄_i(s, x_t)) / (α + 1).

The sampler goes from one predicted action to the next, not by the posterior's mean.

Sources: Psenka et al., "Learning a diffusion model policy from rewards via Q-score matching" (arXiv
2312.11752), as a baseline of Li and Levine, "Q-learning with adjoint matching" (arXiv 2601.14234).
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
    above,
    at_least,
    checked_option,
)
from applications.rl.agents.rollouts import Noise, condition
from flows import frozen

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class QSMConfig(DiffusionOptions, CriticOptions, AgentConfig):
    """Options of QSM."""

    inverse_temperature: float = checked_option(10.0, above(0))
    """Inverse temperature τ, the factor of the critics' gradient."""
    alpha: float = checked_option(10.0, at_least(0.0))
    """Weight α of the imitation of the data."""


class QSM(Agent):
    """QSM: a diffusion whose predicted noise follows the critics' gradient.

    Attributes:
        critic, target_critic: `Critics`.
        policy: `NoisePredictor` ε_θ.
    """

    config: QSMConfig
    config_class = QSMConfig
    color = "#5fd4e0"
    page = "docs/agents/qsm.md"
    published = by_domain(
        inverse_temperature=(10, 3, 1, 10, 10, 10, 1, 10, 10, 10),
        alpha=(30, 30, 10, 10, 30, 10, 10, 1, 10, 30),
    )

    def __init__(self, config: QSMConfig, observation_dim: int, action_dim: int) -> None:
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
        x, t, _ = noised(actions, noise, config.flow_steps)
        reward = critic_reward(self.target_critic, config.inverse_temperature, clip=False)
        _, gradient, _ = reward.value_and_gradient(x, condition(s))
        predicted = self.policy(x, t, s)
        guidance = (-gradient - predicted).square().mean(1)
        eps, w = noise["denoise_eps"], batch.valid
        return {
            "critic": critic_loss(self.critic, s, actions, y, w),
            "policy": denoising_loss(predicted, eps, guidance, w, config.alpha),
        }

    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """Run the sampler of the diffusion, by its predicted actions."""
        steps = self.config.flow_steps
        return ddpm_action(self.policy, observations, noise, steps, posterior=False)
