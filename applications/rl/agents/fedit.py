r"""FEdit: a behaviour flow whose action is edited by a small Gaussian step that climbs the critics.

    L = L_Q + L_BC + L_edit

with `critic_loss` and `behaviour_loss` of `applications.rl.agents.losses` and `edit_loss` of
`applications.rl.agents.losses_gaussian`.  The flow b only imitates the data.  The editor, a
tanh-Gaussian e on [s, u], is trained on u, the clipped action of the flow, which is held constant:

    a = clip(u + scale e),
    L_edit = -mean Q(s, a) + α mean log p(e) + exp(log α) (-mean log p(e) - H),     H = -d/2.

The agent acts, and bootstraps, by a sample of e.  It is QAM-E without the tilt: the scale bounds
how far an action may leave the behaviour.  Gradients are not clipped, and only the critics have
target networks.

Source: Li and Levine, "Q-learning with adjoint matching" (arXiv 2601.14234), baseline; Dong et al.,
"EXPO: Stable reinforcement learning with expressive policies" (arXiv 2507.07986) for the editor;
Haarnoja et al., "Soft actor-critic algorithms and applications" (arXiv 1812.05905) for the
temperature.
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
from applications.rl.agents.losses_gaussian import edit_loss, edited
from applications.rl.agents.networks import TanhGaussianActor
from applications.rl.agents.options import (
    AgentConfig,
    BestOfOptions,
    CriticOptions,
    EntropyOptions,
    Range,
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
class FEditConfig(EntropyOptions, BestOfOptions, CriticOptions, AgentConfig):
    """Options of FEdit."""

    edit_scale: float = checked_option(0.2, Range("in (0, 2]", lambda scale: 0 < scale <= 2))
    """Largest edit of each action."""


class FEdit(Agent):
    """FEdit: a behaviour flow whose action is edited by a small Gaussian step that climbs Q.

    Attributes:
        critic, target_critic: `Critics`.
        behaviour: `FlowActor`.
        editor: `TanhGaussianActor` on [s, u].
        log_alpha: logarithm of the temperature of its entropy, a scalar.
    """

    config: FEditConfig
    config_class = FEditConfig
    color = "#c9de5a"
    page = "docs/agents/fedit.md"
    published = by_domain(edit_scale=(0.2, 0.2, 0.2, 0.2, 0.5, 0.3, 0.4, 0.8, 0.3, 0.1))

    def __init__(self, config: FEditConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.critic = self.critics(config.critics)
        self.target_critic = frozen(self.critic)
        self.behaviour = self.flow_actor()
        self.editor = TanhGaussianActor(
            observation_dim + self.chunk_dim, self.chunk_dim, hidden=config.hidden
        )
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Declare the noises of the next actions, of the behaviour loss and of the editor's."""
        chunk = (batch_size, self.chunk_dim)
        candidate = (batch_size, self.config.best_of_n, self.chunk_dim)
        return {
            "next_action_noise": candidate,
            "next_edit_eps": candidate,
            "bc_x0": chunk,
            "bc_t": Uniform((batch_size, 1)),
            "base_noise": chunk,
            "edit_eps": chunk,
        }

    def act_shapes(self, batch_size: int) -> Shapes:
        """Declare the start of the ODE and noise of the edit for each candidate."""
        shape = (batch_size, self.config.best_of_n, self.chunk_dim)
        return {"noise": shape, "edit_eps": shape}

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Term]:
        """Compute the terms of L = L_Q + L_BC + L_edit."""
        config, s, actions = self.config, batch.observations, self.flatten(batch.actions)
        next_actions, flow_actions = self.rollouts(batch, noise)
        y = td_target(self.target_critic, batch, next_actions, config.window_discount, config.rho)
        return {
            "critic": critic_loss(self.critic, s, actions, y, batch.valid),
            "behaviour": behaviour_loss(self.behaviour, s, actions, batch.valid, noise),
            "edit": edit_loss(
                self.editor,
                self.log_alpha,
                self.critic,
                s,
                flow_actions,
                noise["edit_eps"],
                scale=config.edit_scale,
                target_entropy=config.target_entropy * self.chunk_dim,
            ),
        }

    @torch.no_grad()
    def rollouts(self, batch: Batch, noise: Noise) -> tuple[Tensor, Tensor]:
        """Run one ODE for the edited actions at the next observations and for u at the others."""
        config, s = self.config, batch.observations
        rows, x = candidates(batch.next_observations, noise["next_action_noise"])
        starts = torch.cat([x, noise["base_noise"]])
        both = flow_action(
            self.behaviour, torch.cat([rows, s]), starts, config.flow_steps, config.solver
        )
        actions, flow_actions = both.split([len(rows), len(s)])
        actions = self.edit(rows, actions, noise["next_edit_eps"].flatten(0, 1))
        return best_of(self.critic, rows, actions, config.best_of_n), flow_actions

    def edit(self, observations: Tensor, actions: Tensor, eps: Tensor) -> Tensor:
        """Compute the edited actions (B, chunk_dim) of the flow's ``actions``, by noise ``eps``."""
        return edited(self.editor, observations, actions, eps, self.config.edit_scale)[0]

    def propose(self, observations: Tensor, noise: Noise) -> Tensor:
        """Propose one candidate: the edited ODE of the behaviour flow."""
        config, x = self.config, noise["noise"]
        actions = flow_action(self.behaviour, observations, x, config.flow_steps, config.solver)
        return self.edit(observations, actions, noise["edit_eps"])

    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """Choose the candidate that the critics rank first."""
        return first_ranked(self.propose, self.critic, observations, noise)
