r"""CGQL: a behaviour flow that critics guide while it acts; no policy is trained.

    L = L_Q + L_BC

with `critic_loss` and `behaviour_loss` of `applications.rl.agents.losses`.  The agent acts, and
bootstraps, by the ODE of the target behaviour b̄ with the guidance of `applications.rl.agents.
guidance`,

    v(x, t | s) = b̄(x, t | s) + ϑ [x + (1 - t) τ ∇_x mean_i Q_i(s, x, 1)] / t.

The critics take a time, as those of the variants CGQL-M and CGQL-L do, but here they are trained
and evaluated at time 1 only: they value the unfinished action x as if it were executed.  The
gradient is that of the online critics.  Gradients of the weights are not clipped.

Source: Li and Levine, "Q-learning with adjoint matching" (arXiv 2601.14234), baseline CGQL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from applications.rl.agents.base import Agent, Shapes, Uniform
from applications.rl.agents.domains import by_domain
from applications.rl.agents.guidance import GuidanceOptions, GuidedFlow
from applications.rl.agents.losses import Term, behaviour_loss, critic_loss, td_target
from applications.rl.agents.networks import TimedCritics
from applications.rl.agents.options import AgentConfig, BestOfOptions, CriticOptions
from applications.rl.agents.rollouts import Noise, first_ranked
from flows import frozen

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class CGQLConfig(GuidanceOptions, BestOfOptions, CriticOptions, AgentConfig):
    """Options of CGQL."""


class CGQL(Agent):
    """CGQL: a behaviour flow that critics of finished actions guide while it acts.

    Attributes:
        critic, target_critic: `TimedCritics`.
        behaviour, target_behaviour: `FlowActor`; the agent acts by the second.
    """

    config: CGQLConfig
    config_class = CGQLConfig
    color = "#5fd0d6"
    page = "docs/agents/cgql.md"
    published = by_domain(guidance=(0.1, 0.1, 0.01, 0.1, 0.01, 0.1, 0.1, 0.1, 0.1, 0.01))

    def __init__(self, config: CGQLConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.critic = TimedCritics(
            observation_dim, self.chunk_dim, hidden=config.hidden, members=config.critics
        )
        self.target_critic = frozen(self.critic)
        self.behaviour = self.flow_actor()
        self.target_behaviour = frozen(self.behaviour)

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Declare the noises of the next actions and of the behaviour loss."""
        return {
            "next_action_noise": (batch_size, self.config.best_of_n, self.chunk_dim),
            "bc_x0": (batch_size, self.chunk_dim),
            "bc_t": Uniform((batch_size, 1)),
        }

    def act_shapes(self, batch_size: int) -> Shapes:
        """Declare the start of the flow for each candidate."""
        return {"noise": (batch_size, self.config.best_of_n, self.chunk_dim)}

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Term]:
        """Compute the terms of L = L_Q + L_BC."""
        config, s, actions = self.config, batch.observations, self.flatten(batch.actions)
        with torch.no_grad():
            starts = {"noise": noise["next_action_noise"]}
            next_actions = self.chunks(batch.next_observations, starts)
        y = td_target(self.target_critic, batch, next_actions, config.window_discount, config.rho)
        return {
            "critic": critic_loss(self.critic, s, actions, y, batch.valid),
            "behaviour": behaviour_loss(self.behaviour, s, actions, batch.valid, noise),
        }

    @property
    def flow(self) -> GuidedFlow:
        """Return the guided flow of the target behaviour."""
        return GuidedFlow(self.target_behaviour, self.critic, self.config, noisy=False)

    def propose(self, observations: Tensor, noise: Noise) -> Tensor:
        """Propose one candidate: the ODE of the guided flow."""
        config, x = self.config, noise["noise"]
        return self.flow.action(observations, x, config.flow_steps, config.solver)

    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """Choose the candidate that the critics rank first."""
        return first_ranked(self.propose, self.critic, observations, noise)
