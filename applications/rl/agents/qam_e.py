r"""QAM-E: QAM whose action is edited by a small Gaussian step that climbs the critics.

Besides the losses of QAM, an editor e ~ tanh-Gaussian on [s, u] is trained on u, the clipped action
of the policy flow, which is held constant:

    a = clip(u + scale e),
    L_edit = -mean Q(s, a) + α mean log p(e),     α = exp(p) not differentiated,
    L_α    = exp(p) (-mean log p(e) - H),         H = -d/2, log p not differentiated,

as in soft actor-critic.  The critics are the online ones and are held constant, log p(e) is not
corrected for the scale, and windows are not weighted.  The agent acts, and bootstraps, by a sample
of e.  With scale 0 there is no editor, and the agent is QAM.

Source: Li and Levine, "Q-learning with adjoint matching" (arXiv 2601.14234); Haarnoja et al.,
"Soft actor-critic algorithms and applications" (arXiv 1812.05905) for the temperature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from applications.rl.agents.base import Metrics, Noise, Shapes, require
from applications.rl.agents.networks import TanhGaussianActor
from applications.rl.agents.qam import AdjointMatching, AdjointMatchingConfig
from applications.rl.agents.samples import Samples

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class QAMEConfig(AdjointMatchingConfig):
    """Options of QAM-E."""

    edit_scale: float = 0.1
    """Largest edit of each action; 0 leaves the editor out."""
    target_entropy: float = -0.5
    """Entropy of the editor's e that its temperature aims at, nats per dimension."""

    def __post_init__(self) -> None:
        """Refuse values out of range; see `AgentConfig`."""
        super().__post_init__()
        require(0 <= self.edit_scale <= 2, "edit_scale", self.edit_scale, "in [0, 2]")
        finite = math.isfinite(self.target_entropy)
        require(finite, "target_entropy", self.target_entropy, "finite")


class QAME(AdjointMatching):
    """QAM-E: QAM whose action is edited by a small Gaussian step that climbs the critics.

    Attributes:
        editor: `TanhGaussianActor` on [s, u], or None where the scale is 0.
        log_alpha: p, a scalar.
    """

    config: QAMEConfig

    def __init__(self, config: QAMEConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.editor: TanhGaussianActor | None = None
        if config.edit_scale:
            self.editor = TanhGaussianActor(
                observation_dim + self.chunk_dim, self.chunk_dim, hidden=config.hidden
            )
            self.log_alpha = nn.Parameter(torch.zeros(()))

    def policy_noises(self) -> dict[str, str]:
        """Start of the flow and noise of the edit."""
        names = super().policy_noises()
        return names if self.editor is None else names | {"edit_eps": "next_edit_eps"}

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Those of QAM, and the noises of the flow's action and of its edit."""
        shapes = super().noise_shapes(batch_size)
        if self.editor is not None:
            shape = (batch_size, self.chunk_dim)
            shapes |= {"extra_base_noise": shape, "edit_eps": shape}
        return shapes

    def edit(self, observations: Tensor, chunks: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """clip(u + scale e) (B, chunk_dim) and log p(e) (B,) for u ``chunks``, by noise ``eps``."""
        assert self.editor is not None
        edit, log_prob = self.editor.sample(torch.cat([observations, chunks], dim=1), eps)
        return (chunks + self.config.edit_scale * edit).clamp(-1, 1), log_prob

    def propose(self, observations: Tensor, noise: Noise) -> Tensor:
        """The edited action of the policy flow."""
        chunks = self.flow_action(observations, noise["noise"])
        if self.editor is None:
            return chunks
        return self.edit(observations, chunks, noise["edit_eps"])[0]

    @torch.no_grad()
    def samples(self, batch: Batch, noise: Noise) -> Samples:
        """Those of QAM, edited, and the flow's chunks u at the observations."""
        if self.editor is None:
            return super().samples(batch, noise)
        rows, own = self.rows(batch.next_observations, self.next_noise(noise))
        observations = torch.cat([rows, batch.observations])
        x = torch.cat([own["noise"], noise["extra_base_noise"]])
        chain, chunks = self.run(batch, noise, observations, x)
        proposals, flow_chunks = chunks.split([len(rows), len(batch.observations)])
        edited, _ = self.edit(rows, proposals, own["edit_eps"])
        return Samples(self.best(rows, edited), flow_chunks, chain)

    def actor_loss(self, batch: Batch, noise: Noise, samples: Samples) -> tuple[Tensor, Metrics]:
        """L_BC + L_AM + L_edit + L_α."""
        loss, metrics = self.tilt_loss(batch, noise, samples)
        if self.editor is None:
            return loss, metrics
        assert samples.flow_chunks is not None
        own, others = self.edit_loss(batch.observations, samples.flow_chunks, noise["edit_eps"])
        return loss + own, {**metrics, **others}

    def edit_loss(
        self, observations: Tensor, chunks: Tensor, eps: Tensor
    ) -> tuple[Tensor, Metrics]:
        """L_edit + L_α of the edit of u ``chunks`` by noise ``eps``, and metrics."""
        edited, log_prob = self.edit(observations, chunks, eps)
        q = self.critic(observations, edited, stop_weight_gradient=True).mean()
        negentropy = log_prob.mean()
        alpha = self.log_alpha.exp()
        excess = -negentropy.detach() - self.config.target_entropy * self.chunk_dim
        loss = -q + alpha.detach() * negentropy + alpha * excess
        return loss, {
            "actor/q_loss": -q.detach(),
            "actor/edit_entropy": -negentropy.detach(),
            "actor/edit_alpha": alpha.detach(),
        }
