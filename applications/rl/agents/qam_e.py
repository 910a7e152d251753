r"""QAM-E: QAM whose action is edited by a small Gaussian step that climbs the critics.

    L = L_Q + L_BC + L_AM + L_edit

with `edit_loss` of `applications.rl.agents.losses_gaussian` beside the losses of QAM.  The editor,
a tanh-Gaussian e on [s, u], is trained on u, the clipped action of the policy flow, which is held
constant:

    a = clip(u + scale e),
    L_edit = -mean Q(s, a) + α mean log p(e) + exp(log α) (-mean log p(e) - H),     H = -d/2.

The agent acts, and bootstraps, by a sample of e.  With scale 0 there is no editor, and the agent is
QAM.

Source: Li and Levine, "Q-learning with adjoint matching" (arXiv 2601.14234); Haarnoja et al.,
"Soft actor-critic algorithms and applications" (arXiv 1812.05905) for the temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from adjoint import Reward
from applications.rl.agents.base import Agent, Options, Shapes, Uniform
from applications.rl.agents.chain_kernel import ChainKernel
from applications.rl.agents.domains import by_domain
from applications.rl.agents.losses import (
    Term,
    td_target,
    tilt_reward,
    tilt_terms,
)
from applications.rl.agents.losses_gaussian import edit_loss, edited
from applications.rl.agents.networks import TanhGaussianActor
from applications.rl.agents.options import (
    AgentConfig,
    BestOfOptions,
    CriticOptions,
    EntropyOptions,
    MatchingOptions,
    Range,
    checked_option,
)
from applications.rl.agents.rollouts import (
    FlowODE,
    Noise,
    PolicyFlow,
    Rollouts,
    best_of,
    candidates,
    chain_and_actions,
    condition,
    first_ranked,
    flow_action,
)
from applications.rl.agents.trust_region import trust_region
from flows import frozen

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class QAMEConfig(MatchingOptions, EntropyOptions, BestOfOptions, CriticOptions, AgentConfig):
    """Options of QAM-E."""

    edit_scale: float = checked_option(0.1, Range("in [0, 2]", lambda scale: 0 <= scale <= 2))
    """Largest edit of each action; 0 leaves the editor out."""


class QAME(Agent):
    """QAM-E: QAM whose action is edited by a small Gaussian step that climbs the critics.

    Attributes:
        critic, target_critic: `Critics`.
        behaviour, target_behaviour, policy: `FlowActor`; the second is None if it is not used.
        kernel: `ChainKernel` of the memoryless chain.
        trust_region: `TrustRegion` of a ``kl_budget``, or None.
        editor: `TanhGaussianActor` on [s, u], or None where the scale is 0.
        log_alpha: logarithm of the temperature of its entropy, a scalar.
    """

    config: QAMEConfig
    config_class = QAMEConfig
    color = "#f4e06d"
    page = "docs/agents/qam-e.md"
    published = by_domain(
        inverse_temperature=(1, 1, 1, 1, 3, 3, 3, 0.1, 10, 3),
        edit_scale=(0.1, 0, 0, 0.1, 0.1, 0.1, 0.1, 0.9, 0.1, 0.1),
    )
    small: ClassVar[Options] = {
        "pointmaze-medium": {"inverse_temperature": 1.0},
        "cube-single": {"inverse_temperature": 1.0},
    }

    def __init__(self, config: QAMEConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.critic = self.critics(config.critics)
        self.target_critic = frozen(self.critic)
        self.behaviour = self.flow_actor()
        self.target_behaviour = frozen(self.behaviour) if config.target_behaviour else None
        self.policy = self.flow_actor()
        self.kernel = ChainKernel(config.kernel, config.flow_steps, config.adjoint)
        self.trust_region = trust_region(config)
        self.editor: TanhGaussianActor | None = None
        if config.edit_scale:
            self.editor = TanhGaussianActor(
                observation_dim + self.chunk_dim, self.chunk_dim, hidden=config.hidden
            )
            self.log_alpha = nn.Parameter(torch.zeros(()))

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Declare the noises of the next actions, of the behaviour loss and of the other losses."""
        chunk = (batch_size, self.chunk_dim)
        candidate = (batch_size, self.config.best_of_n, self.chunk_dim)
        edits = self.editor is not None
        return {
            "next_action_noise": candidate,
            **({"next_edit_eps": candidate} if edits else {}),
            "bc_x0": chunk,
            "bc_t": Uniform((batch_size, 1)),
            "sde_x0": chunk,
            "sde_eps": (self.config.flow_steps, *chunk),
            **({"extra_base_noise": chunk, "edit_eps": chunk} if edits else {}),
        }

    def act_shapes(self, batch_size: int) -> Shapes:
        """Declare the start of the ODE and noise of the edit for each candidate."""
        names = ["noise"] if self.editor is None else ["noise", "edit_eps"]
        return dict.fromkeys(names, (batch_size, self.config.best_of_n, self.chunk_dim))

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Term]:
        """Compute the terms of L = L_Q + L_BC + L_AM (`tilt_terms`) + L_edit."""
        config, s, flow = self.config, batch.observations, self.flow
        x0, actions = noise["bc_x0"], self.flatten(batch.actions)
        self.kernel.measure(flow.reference, x0, actions, batch.valid, condition(s))
        next_actions, chain, flow_actions = self.rollouts(batch, noise)
        y = td_target(self.target_critic, batch, next_actions, config.window_discount, config.rho)
        terms = tilt_terms(
            self.critic,
            flow,
            self.reward,
            chain,
            batch,
            actions,
            y,
            noise,
            value_penalty=config.value_penalty,
            trust_region=self.trust_region,
        )
        if self.editor is not None:
            assert flow_actions is not None
            terms["edit"] = edit_loss(
                self.editor,
                self.log_alpha,
                self.critic,
                s,
                flow_actions,
                noise["edit_eps"],
                scale=config.edit_scale,
                target_entropy=config.target_entropy * self.chunk_dim,
            )
        return terms

    @property
    def flow(self) -> PolicyFlow:
        """Return the velocity of the policy, in the chain and when it acts."""
        return PolicyFlow(self.policy, self.behaviour, self.target_behaviour, self.config.residual)

    @property
    def reward(self) -> Reward:
        """Return the reward τ Q of the tilt."""
        return tilt_reward(self.critic, self.target_critic, self.config)

    @torch.no_grad()
    def rollouts(self, batch: Batch, noise: Noise) -> Rollouts:
        """Run the ODE at both observations and the chain at the first together, and edit."""
        config, s, kernel = self.config, batch.observations, self.kernel.on(batch.actions.device)
        rows, x = candidates(batch.next_observations, noise["next_action_noise"])
        starts = (x,) if self.editor is None else (x, noise["extra_base_noise"])
        at = rows if self.editor is None else torch.cat([rows, s])
        ode = FlowODE(at, torch.cat(starts), config.flow_steps, config.solver)
        chain, actions = chain_and_actions(self.flow, kernel, s, noise, ode)
        flow_actions = None
        if self.editor is not None:
            actions, flow_actions = actions.split([len(rows), len(s)])
            actions = self.edit(rows, actions, noise["next_edit_eps"].flatten(0, 1))
        return Rollouts(best_of(self.critic, rows, actions, config.best_of_n), chain, flow_actions)

    def edit(self, observations: Tensor, actions: Tensor, eps: Tensor) -> Tensor:
        """Compute the edited actions (B, chunk_dim) of the flow's ``actions``, by noise ``eps``."""
        assert self.editor is not None
        return edited(self.editor, observations, actions, eps, self.config.edit_scale)[0]

    def propose(self, observations: Tensor, noise: Noise) -> Tensor:
        """Propose one candidate: the edited ODE of the policy flow."""
        config, field, x = self.config, self.flow.acting_velocity, noise["noise"]
        actions = flow_action(field, observations, x, config.flow_steps, config.solver)
        return (
            actions if self.editor is None else self.edit(observations, actions, noise["edit_eps"])
        )

    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """Choose the candidate that the critics rank first."""
        return first_ranked(self.propose, self.critic, observations, noise)
