r"""BAM: the objective of QAM by backpropagation through the chain, its peer in cost and purpose.

    L = L_Q + L_BC + L_path

with `critic_loss` and `behaviour_loss` of `applications.rl.agents.losses`.  The chain of QAM's
published kernel is run with gradient, and f minimises

    L_path = -τ mean [mean Q(s, x_K) - ρ sd Q(s, x_K)] + mean_B Σ_{k<K-1} 2 ‖f - b̄‖² / σ_k²

with the online critics, held constant, and x_K not clipped.  The second term is the path's
Kullback-Leibler divergence but for the step 1/K, as published: so τ is K times that of QAM.  The
last step follows b̄ and has no term.  Without a target behaviour b̄ is b itself, its weights held
constant.  The policy is the ODE of f.

Source: Li and Levine, "Q-learning with adjoint matching" (arXiv 2601.14234), baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from adjoint import Kernel, velocity_along
from applications.rl.agents.base import Agent, Options, Shapes, Uniform
from applications.rl.agents.chain_kernel import ChainKernel
from applications.rl.agents.domains import by_domain
from applications.rl.agents.losses import (
    Term,
    behaviour_loss,
    critic_loss,
    pessimistic,
    td_target,
)
from applications.rl.agents.networks import Critics
from applications.rl.agents.options import (
    AgentConfig,
    BestOfOptions,
    CriticOptions,
    TiltOptions,
    above,
    checked_option,
)
from applications.rl.agents.rollouts import (
    Noise,
    PolicyFlow,
    condition,
    first_ranked,
    flow_action,
    stop_weight_gradient,
)
from flows import frozen

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class BAMConfig(TiltOptions, BestOfOptions, CriticOptions, AgentConfig):
    """Options of BAM."""

    inverse_temperature: float = checked_option(10.0, above(0))
    """Inverse temperature τ, K times that of QAM."""


class BAM(Agent):
    """BAM: the objective of QAM by backpropagation through the chain.

    Attributes:
        critic, target_critic: `Critics`.
        behaviour, target_behaviour, policy: `FlowActor`; the second is None if it is not used.
        kernel: `ChainKernel` of the published chain.
    """

    config: BAMConfig
    config_class = BAMConfig
    color = "#f58fcb"
    page = "docs/agents/bam.md"
    published = by_domain(inverse_temperature=(10, 10, 10, 30, 10, 30, 10, 30, 30, 30))
    small: ClassVar[Options] = {"pointmaze-medium": {"inverse_temperature": 10.0}}

    def __init__(self, config: BAMConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.critic = self.critics(config.critics)
        self.target_critic = frozen(self.critic)
        self.behaviour = self.flow_actor()
        self.target_behaviour = frozen(self.behaviour) if config.target_behaviour else None
        self.policy = self.flow_actor()
        self.kernel = ChainKernel("euler_published", config.flow_steps)

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
        """Compute the terms of L = L_Q + L_BC + L_path."""
        config, s, actions = self.config, batch.observations, self.flatten(batch.actions)
        with torch.no_grad():
            starts = {"noise": noise["next_action_noise"]}
            next_actions = self.chunks(batch.next_observations, starts)
        y = td_target(self.target_critic, batch, next_actions, config.window_discount, config.rho)
        return {
            "critic": critic_loss(self.critic, s, actions, y, batch.valid),
            "behaviour": behaviour_loss(self.behaviour, s, actions, batch.valid, noise),
            "path": path_loss(
                self.flow,
                self.kernel.on(s.device),
                self.critic,
                s,
                noise,
                inverse_temperature=config.inverse_temperature,
                rho=config.rho,
            ),
        }

    @property
    def flow(self) -> PolicyFlow:
        """Return the velocity of the policy, in the chain and when it acts."""
        return PolicyFlow(self.policy, self.behaviour, self.target_behaviour, self.config.residual)

    def propose(self, observations: Tensor, noise: Noise) -> Tensor:
        """Propose one candidate: the ODE of the policy flow."""
        config, field, x = self.config, self.flow.acting_velocity, noise["noise"]
        return flow_action(field, observations, x, config.flow_steps, config.solver)

    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """Choose the candidate that the critics rank first."""
        return first_ranked(self.propose, self.critic, observations, noise)


def differentiable_chain(
    flow: PolicyFlow, kernel: Kernel, observations: Tensor, noise: Noise
) -> tuple[Tensor, Tensor]:
    """Run the chain with gradient; return states (K+1, B, d), velocities of f (K-1, B, d)."""
    cond, reference = condition(observations), stop_weight_gradient(flow.reference)
    x, eps = noise["sde_x0"], noise["sde_eps"]
    xs, vs = [x], []
    last = kernel.steps - 1
    for k in range(kernel.steps):
        field = flow.velocity if k < last else reference
        v = field(x, kernel.t[k].to(x.dtype), cond)
        x = kernel.mean_x[k] * x + kernel.mean_v[k] * v
        if k < last:
            x = x + kernel.std[k] * eps[k]
            vs.append(v)
        xs.append(x)
    return torch.stack(xs), torch.stack(vs)


def path_loss(
    flow: PolicyFlow,
    kernel: Kernel,
    critic: Critics,
    observations: Tensor,
    noise: Noise,
    *,
    inverse_temperature: float,
    rho: float,
) -> Term:
    """Compute the cost of the policy's path, minus the value of its end.

    Arguments:
        flow: the policy that is trained, and the behaviour it is compared with.
        kernel: the published kernel.
        critic: the online critics.
        observations: (B, observation_dim).
        noise: ``sde_x0`` (B, chunk_dim) and ``sde_eps`` (K, B, chunk_dim).
        inverse_temperature: τ.
        rho: pessimism ρ of the value.
    """
    xs, vs = differentiable_chain(flow, kernel, observations, noise)
    reference = stop_weight_gradient(flow.reference)
    base = velocity_along(reference, xs[:-2], kernel.t[:-2], condition(observations))
    weight = 0.5 * kernel.residual_v[:-1].to(vs.dtype).square()  # 2 / σ²
    penalty = (weight[:, None, None] * (vs - base).square()).sum((0, 2)).mean()
    q = pessimistic(critic(observations, xs[-1], stop_weight_gradient=True), rho).mean()
    loss = penalty - inverse_temperature * q
    return loss, {
        "actor/path_loss": loss.detach(),
        "actor/path_penalty": penalty.detach(),
        "actor/q": q.detach(),
    }
