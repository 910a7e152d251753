r"""QAM: the behaviour flow tilted toward exp(τ Q) by adjoint matching.

The critic is the reward and the observation the condition; chain, adjoint and loss are those of the
core (`adjoint`).  With K steps, x_0 and ε independent normal noise, and the published kernel,

    x_{k+1} = chain of f with ε (its last, noiseless step by b̄),
    a_K = -τ ∇_x mean_i Q̄_i(s, clip(x_K, -1, 1)),     zero outside the box,
    a_k by vector-Jacobian products of b̄,
    L_AM = mean_B Σ_k ‖(2/σ_k) (f - b̄)(s, x_k, t_k) + σ_k a_k‖²,

in which only f is trained and windows are not weighted.  The total is L_Q + L_BC + L_AM; the policy
is the ODE of f.  An update takes the K steps of the chain and of its ODEs together, by one
evaluation of f each.

Source: Li and Levine, "Q-learning with adjoint matching" (arXiv 2601.14234).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adjoint import (
    Adjoint,
    Kernel,
    Reward,
    adjoint_matching_loss,
    lean_adjoint,
    rollout,
    velocity_along,
)
from applications.rl.agents.base import Metrics, Noise, require
from applications.rl.agents.flow_pair import AGENT_KERNELS, FlowPair, FlowPairConfig
from applications.rl.agents.flow_policy import behaviour_loss, condition
from applications.rl.agents.samples import Chain, Samples
from flows import Cond

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class AdjointMatchingConfig(FlowPairConfig):
    """Options of every agent that tilts by adjoint matching."""

    kernel: str = "euler_published"
    """Memoryless scheme, one of adjoint.KERNELS but ``covariance_matched``; ``moment_matched`` is
    the most exact at few steps."""
    clip_terminal: bool = True
    """Take the critics' gradient at the action clipped to [-1, 1]."""
    target_gradient: bool = True
    """Take it of the target critics."""
    target_behaviour: bool = True
    """Compare the policy with the target network of the behaviour."""

    def __post_init__(self) -> None:
        """Refuse values out of range; see `AgentConfig`."""
        super().__post_init__()
        require(
            self.kernel in AGENT_KERNELS,
            "kernel",
            self.kernel,
            f"one of {', '.join(AGENT_KERNELS)}",
        )


class AdjointMatching(FlowPair):
    """An agent whose policy flow is trained by adjoint matching; see the module docstring."""

    config: AdjointMatchingConfig

    def __init__(
        self, config: AdjointMatchingConfig, observation_dim: int, action_dim: int
    ) -> None:
        super().__init__(
            config,
            observation_dim,
            action_dim,
            kernel=config.kernel,
            target_behaviour=config.target_behaviour,
        )

    def value(self, x: Tensor, cond: Cond | None) -> Tensor:
        """Mean over the critics of Q(s, x) (B,), weights held constant: the reward of the tilt."""
        assert cond is not None
        critics = self.target_critic if self.config.target_gradient else self.critic
        x = x.clamp(-1, 1) if self.config.clip_terminal else x
        return critics(cond["observation"], x, stop_weight_gradient=True).mean(0)

    @torch.no_grad()
    def run(
        self, batch: Batch, noise: Noise, observations: Tensor, x: Tensor
    ) -> tuple[Chain, Tensor]:
        """The chain at the batch's observations, and `flow_action` at others from noise ``x``."""
        kernel, cond = self.kernel(), condition(batch.observations)
        ode, x0, eps = self.ode(observations, x), noise["sde_x0"], noise["sde_eps"]
        xs = rollout(self.shared_velocity(ode), self.reference, kernel, x0, eps, cond).xs
        # A noiseless last step follows the base, and leaves that of the ODE to be taken.
        return Chain(kernel, xs), ode.finish(self.acting_velocity)

    @torch.no_grad()
    def samples(self, batch: Batch, noise: Noise) -> Samples:
        """The ODE at the next observations and the chain."""
        rows, own = self.rows(batch.next_observations, self.next_noise(noise))
        chain, proposals = self.run(batch, noise, rows, own["noise"])
        return Samples(next_chunks=self.best(rows, proposals), chain=chain)

    def adjoint(self, kernel: Kernel, observations: Tensor, xs: Tensor) -> Adjoint:
        """Lean adjoint along states ``xs`` (K+1, B, chunk_dim) of the chain."""
        cond = condition(observations)
        reward = Reward(self.value, scale=self.config.inverse_temperature)
        _, gradient = reward.value_and_gradient(xs[-1], cond)
        return lean_adjoint(self.reference, kernel, xs, -gradient, cond)

    def matching_loss(self, observations: Tensor, chain: Chain) -> tuple[Tensor, Metrics]:
        """L_AM along the chain at observations (B, observation_dim), and metrics."""
        kernel, xs = chain.kernel, chain.xs
        adjoint = self.adjoint(kernel, observations, xs)
        v = velocity_along(self.velocity, xs[:-1], kernel.t[:-1], condition(observations))
        loss, metrics = adjoint_matching_loss(v, adjoint, kernel)
        return loss, {
            "actor/matching_loss": loss.detach(),
            "actor/adjoint_norm": metrics["adjoint_norm"],
            "actor/control_norm": metrics["control_norm"],
            "actor/q_gradient": adjoint.values[-1].norm(dim=1).mean(),
        }

    def tilt_loss(self, batch: Batch, noise: Noise, samples: Samples) -> tuple[Tensor, Metrics]:
        """L_BC + L_AM, and metrics."""
        assert samples.chain is not None
        chunks = self.flatten(batch.actions)
        flow = behaviour_loss(self.behaviour, batch.observations, chunks, batch.valid, noise)
        matching, metrics = self.matching_loss(batch.observations, samples.chain)
        return flow + matching, {"actor/flow_loss": flow.detach(), **metrics}

    def total_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """The losses, by the kernel of the error that the batch has been taken into."""
        self.measure_error(batch, noise)
        return super().total_loss(batch, noise)


@dataclass(frozen=True)
class QAMConfig(AdjointMatchingConfig):
    """Options of QAM."""


class QAM(AdjointMatching):
    """QAM: the behaviour flow tilted toward exp(τ Q) by adjoint matching."""

    def propose(self, observations: Tensor, noise: Noise) -> Tensor:
        """The ODE of the policy flow from ``noise``."""
        return self.flow_action(observations, noise["noise"])

    def actor_loss(self, batch: Batch, noise: Noise, samples: Samples) -> tuple[Tensor, Metrics]:
        """L_BC + L_AM."""
        return self.tilt_loss(batch, noise, samples)
