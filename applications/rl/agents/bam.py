r"""BAM: the objective of QAM by backpropagation through the chain, its peer in cost and purpose.

The chain of QAM's published kernel is run with gradient, and f minimises

    -τ mean [mean Q(s, x_K) - ρ sd Q(s, x_K)] + mean_B Σ_{k<K-1} 2 ‖f - b̄‖² / σ_k²

with the online critics, held constant, and x_K not clipped.  The second term is the path's
Kullback-Leibler divergence but for the step 1/K, as published: so τ is K times that of QAM.  The
last step follows b̄ and has no term.  The total adds L_Q + L_BC; the policy is the ODE of f.

Source: Li and Levine, "Q-learning with adjoint matching" (arXiv 2601.14234), baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adjoint import Kernel, velocity_along
from applications.rl.agents.actor_critic import pessimistic
from applications.rl.agents.base import Metrics, Noise
from applications.rl.agents.flow_pair import FlowPair, FlowPairConfig
from applications.rl.agents.flow_policy import behaviour_loss, condition
from applications.rl.agents.samples import Samples

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class BAMConfig(FlowPairConfig):
    """Options of BAM."""

    inverse_temperature: float = 10.0
    """τ; K times that of QAM."""


class BAM(FlowPair):
    """BAM: the objective of QAM by backpropagation through the chain."""

    config: BAMConfig

    def __init__(self, config: BAMConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim, kernel="euler_published")

    def propose(self, observations: Tensor, noise: Noise) -> Tensor:
        """The ODE of the policy flow from ``noise``."""
        return self.flow_action(observations, noise["noise"])

    def trajectory(
        self, kernel: Kernel, observations: Tensor, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """States (K+1, B, chunk_dim) and velocities of f (K-1, B, chunk_dim), with gradient."""
        cond = condition(observations)
        x, eps = noise["sde_x0"], noise["sde_eps"]
        xs, vs = [x], []
        last = kernel.steps - 1
        for k in range(kernel.steps):
            field = self.velocity if k < last else self.reference
            v = field(x, kernel.t[k].to(x.dtype), cond)
            x = kernel.mean_x[k] * x + kernel.mean_v[k] * v
            if k < last:
                x = x + kernel.std[k] * eps[k]
                vs.append(v)
            xs.append(x)
        return torch.stack(xs), torch.stack(vs)

    def path_loss(self, observations: Tensor, noise: Noise) -> tuple[Tensor, Metrics]:
        """The objective of f at observations (B, observation_dim), and metrics."""
        kernel, cond = self.kernel(), condition(observations)
        xs, vs = self.trajectory(kernel, observations, noise)
        base = velocity_along(self.reference, xs[:-2], kernel.t[:-2], cond)
        weight = 0.5 * kernel.residual_v[:-1].to(vs.dtype).square()  # 2 / σ²
        penalty = (weight[:, None, None] * (vs - base).square()).sum((0, 2)).mean()
        values = self.critic(observations, xs[-1], stop_weight_gradient=True)
        q = pessimistic(values, self.config.rho).mean()
        return penalty - self.config.inverse_temperature * q, {
            "actor/path_penalty": penalty.detach(),
            "actor/q": q.detach(),
        }

    def actor_loss(self, batch: Batch, noise: Noise, samples: Samples) -> tuple[Tensor, Metrics]:
        """L_BC and the objective of f."""
        chunks = self.flatten(batch.actions)
        flow = behaviour_loss(self.behaviour, batch.observations, chunks, batch.valid, noise)
        path, metrics = self.path_loss(batch.observations, noise)
        own = {"actor/flow_loss": flow.detach(), "actor/path_loss": path.detach()}
        return flow + path, {**own, **metrics}
