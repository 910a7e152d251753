r"""A one-step policy g(s, z): it imitates a flow's action from the same noise, and climbs Q.

    α mean (g(s, z) - clip ODE(s, z))² - mean Q(s, clip g(s, z)),

means over the batch and the dimensions, or the critics.  The imitation is of the unclipped g, the
critics are the online ones and are held constant, and windows are not weighted.

Source: Park et al., "Flow Q-learning" (arXiv 2502.02538).
"""

from __future__ import annotations

from torch import Tensor

from applications.rl.agents.base import Metrics
from applications.rl.agents.networks import Critics, OneStepActor


def one_step_loss(
    actor: OneStepActor,
    critic: Critics,
    observations: Tensor,
    z: Tensor,
    imitated: Tensor,
    alpha: float,
) -> tuple[Tensor, Metrics]:
    """Loss of ``actor`` and metrics.

    Arguments:
        observations: (B, observation_dim).
        z: noise (B, chunk_dim).
        imitated: the flow's action from z (B, chunk_dim), without gradient.
        alpha: α.
    """
    chunks = actor(observations, z)
    distill = (chunks - imitated).square().mean()
    q = critic(observations, chunks.clamp(-1, 1), stop_weight_gradient=True).mean()
    return alpha * distill - q, {
        "actor/distill_loss": distill.detach(),
        "actor/q_loss": -q.detach(),
    }
