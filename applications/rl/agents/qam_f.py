r"""QAM-F: QAM whose policy flow is imitated by a one-step policy that climbs the critics.

Besides the losses of QAM, g(s, z) is trained by `applications.rl.agents.one_step` on the action of
the tilted flow from the same z.  The agent acts, and bootstraps, by clip g(s, z).  With α = 0 there
is no g, and the agent is QAM.

Source: Li and Levine, "Q-learning with adjoint matching" (arXiv 2601.14234).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from applications.rl.agents.base import Metrics, Noise, Shapes, require
from applications.rl.agents.networks import OneStepActor
from applications.rl.agents.one_step import one_step_loss
from applications.rl.agents.qam import AdjointMatching, AdjointMatchingConfig
from applications.rl.agents.samples import Samples

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class QAMFConfig(AdjointMatchingConfig):
    """Options of QAM-F."""

    alpha: float = 30.0
    """α, weight of the imitation; 0 leaves the one-step policy out."""

    def __post_init__(self) -> None:
        """Refuse values out of range; see `AgentConfig`."""
        super().__post_init__()
        require(0 <= self.alpha < math.inf, "alpha", self.alpha, "finite, at least 0")


class QAMF(AdjointMatching):
    """QAM-F: QAM whose flow is imitated by a one-step policy that climbs the critics.

    Attributes:
        one_step: `OneStepActor`, or None where α = 0.
    """

    config: QAMFConfig

    def __init__(self, config: QAMFConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.one_step: OneStepActor | None = None
        if config.alpha:
            self.one_step = self.one_step_actor()

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Those of QAM, and the noise z of the imitation."""
        shapes = super().noise_shapes(batch_size)
        if self.one_step is not None:
            shapes["extra_base_noise"] = (batch_size, self.chunk_dim)
        return shapes

    def propose(self, observations: Tensor, noise: Noise) -> Tensor:
        """clip g(s, z)."""
        if self.one_step is None:
            return self.flow_action(observations, noise["noise"])
        return self.one_step(observations, noise["noise"]).clamp(-1, 1)

    @torch.no_grad()
    def samples(self, batch: Batch, noise: Noise) -> Samples:
        """Those of QAM without g; else the chain, the flow's chunks from z, and g's."""
        if self.one_step is None:
            return super().samples(batch, noise)
        chain, chunks = self.run(batch, noise, batch.observations, noise["extra_base_noise"])
        return Samples(self.next_chunks(batch, noise), chunks, chain)

    def actor_loss(self, batch: Batch, noise: Noise, samples: Samples) -> tuple[Tensor, Metrics]:
        """L_BC + L_AM and the loss of the one-step policy."""
        loss, metrics = self.tilt_loss(batch, noise, samples)
        if self.one_step is None:
            return loss, metrics
        assert samples.flow_chunks is not None
        own, others = one_step_loss(
            self.one_step,
            self.critic,
            batch.observations,
            noise["extra_base_noise"],
            samples.flow_chunks,
            self.config.alpha,
        )
        return loss + own, {**metrics, **others}
