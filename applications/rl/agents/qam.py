r"""QAM: the behaviour flow tilted toward exp(τ Q) by adjoint matching.

    L = L_Q + L_BC + L_AM

with `critic_loss`, `behaviour_loss` and `matching_loss` of `applications.rl.agents.losses`.  The
critic is the reward and the observation the condition; chain, adjoint and loss are those of
`adjoint`.  The behaviour b is fitted to the data.  The policy f is initialised independently of it
and compared with its target network b̄, the base of the memoryless chain and of its adjoint.  With K
steps, x_0 and ε independent normal noise, and the published kernel,

    x_{k+1} = chain of f with ε (its last, noiseless step by b̄),
    a_K = -τ ∇_x mean_i Q̄_i(s, clip(x_K, -1, 1)),     zero outside the box,
    a_k by vector-Jacobian products of b̄,
    L_AM = mean_B Σ_k ‖(2/σ_k) (f - b̄)(s, x_k, t_k) + σ_k a_k‖²,

in which only f is trained and windows are not weighted.  The policy is the ODE of f.  An update
takes the K steps of the chain and of its ODEs together, by one evaluation of f each
(`applications.rl.agents.rollouts`).

Source: Li and Levine, "Q-learning with adjoint matching" (arXiv 2601.14234).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

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
from applications.rl.agents.options import (
    AgentConfig,
    BestOfOptions,
    CriticOptions,
    MatchingOptions,
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
class QAMConfig(MatchingOptions, BestOfOptions, CriticOptions, AgentConfig):
    """Options of QAM."""


class QAM(Agent):
    """QAM: the behaviour flow tilted toward exp(τ Q) by adjoint matching.

    Attributes:
        critic, target_critic: `Critics`.
        behaviour, target_behaviour, policy: `FlowActor`; the second is None if it is not used.
        kernel: `ChainKernel` of the memoryless chain.
        trust_region: `TrustRegion` of a ``kl_budget``, or None.
    """

    config: QAMConfig
    config_class = QAMConfig
    color = "#ffb14e"
    page = "docs/agents/qam.md"
    published = by_domain(inverse_temperature=(3, 1, 1, 10, 3, 3, 1, 30, 3, 3))
    small: ClassVar[Options] = {
        "pointmaze-medium": {"inverse_temperature": 1.0},
        "cube-single": {"inverse_temperature": 1.0},
    }

    def __init__(self, config: QAMConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.critic = self.critics(config.critics)
        self.target_critic = frozen(self.critic)
        self.behaviour = self.flow_actor()
        self.target_behaviour = frozen(self.behaviour) if config.target_behaviour else None
        self.policy = self.flow_actor()
        self.kernel = ChainKernel(config.kernel, config.flow_steps, config.adjoint)
        self.trust_region = trust_region(config)

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Declare the noises of the next actions, of the behaviour loss and of the other losses."""
        chunk = (batch_size, self.chunk_dim)
        return {
            "next_action_noise": (batch_size, self.config.best_of_n, self.chunk_dim),
            "bc_x0": chunk,
            "bc_t": Uniform((batch_size, 1)),
            "sde_x0": chunk,
            "sde_eps": (self.config.flow_steps, *chunk),
        }

    def act_shapes(self, batch_size: int) -> Shapes:
        """Declare the start of the ODE for each candidate."""
        return {"noise": (batch_size, self.config.best_of_n, self.chunk_dim)}

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Term]:
        """Compute the terms of L = L_Q + L_BC + L_AM (`tilt_terms`)."""
        config, s, flow = self.config, batch.observations, self.flow
        x0, actions = noise["bc_x0"], self.flatten(batch.actions)
        self.kernel.measure(flow.reference, x0, actions, batch.valid, condition(s))
        next_actions, chain, _ = self.rollouts(batch, noise)
        y = td_target(self.target_critic, batch, next_actions, config.window_discount, config.rho)
        return tilt_terms(
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
        """Run the ODE at the next observations and the chain at the observations, together."""
        config, kernel = self.config, self.kernel.on(batch.actions.device)
        rows, x = candidates(batch.next_observations, noise["next_action_noise"])
        ode = FlowODE(rows, x, config.flow_steps, config.solver)
        chain, actions = chain_and_actions(self.flow, kernel, batch.observations, noise, ode)
        return Rollouts(best_of(self.critic, rows, actions, config.best_of_n), chain)

    def propose(self, observations: Tensor, noise: Noise) -> Tensor:
        """Propose one candidate: the ODE of the policy flow."""
        config, field, x = self.config, self.flow.acting_velocity, noise["noise"]
        return flow_action(field, observations, x, config.flow_steps, config.solver)

    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """Choose the candidate that the critics rank first."""
        return first_ranked(self.propose, self.critic, observations, noise)
