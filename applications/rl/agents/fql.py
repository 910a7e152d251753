r"""FQL: a behaviour flow, and a one-step policy that imitates it and climbs the critics.

The total is L_Q + L_BC + the loss of `applications.rl.agents.one_step`, in which the flow imitated
is that of the behaviour.  The agent acts, and bootstraps, by clip g(s, z).  Gradients are not
clipped, and only the critics have target networks.

Source: Park et al., "Flow Q-learning" (arXiv 2502.02538), with chunks and an ensemble of critics as
in Li and Levine (arXiv 2601.14234).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from applications.rl.agents.actor_critic import ActorCritic, CriticConfig
from applications.rl.agents.base import Metrics, Noise, Shapes, require
from applications.rl.agents.flow_policy import behaviour_loss, flow_action
from applications.rl.agents.one_step import one_step_loss
from applications.rl.agents.samples import Samples

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class FQLConfig(CriticConfig):
    """Options of FQL."""

    alpha: float = 100.0
    """α, weight of the imitation."""

    def __post_init__(self) -> None:
        """Refuse values out of range; see `AgentConfig`."""
        super().__post_init__()
        require(0 <= self.alpha < math.inf, "alpha", self.alpha, "finite, at least 0")


class FQL(ActorCritic):
    """FQL: a one-step policy that imitates a behaviour flow and climbs the critics.

    Attributes:
        base: `FlowActor` of the behaviour.
        one_step: `OneStepActor`, the policy.
    """

    config: FQLConfig

    def __init__(self, config: FQLConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.behaviour = self.flow_actor()
        self.one_step = self.one_step_actor()

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Besides the noises of every agent with critics, the noise z of the imitation."""
        shape = (batch_size, self.chunk_dim)
        return super().noise_shapes(batch_size) | {"distill_noise": shape}

    def propose(self, observations: Tensor, noise: Noise) -> Tensor:
        """clip g(s, z)."""
        return self.one_step(observations, noise["noise"]).clamp(-1, 1)

    @torch.no_grad()
    def samples(self, batch: Batch, noise: Noise) -> Samples:
        """The policy's chunks, and those of the behaviour flow from noise z."""
        z, config = noise["distill_noise"], self.config
        return Samples(
            next_chunks=self.next_chunks(batch, noise),
            flow_chunks=flow_action(
                self.behaviour, batch.observations, z, config.flow_steps, config.solver
            ),
        )

    def actor_loss(self, batch: Batch, noise: Noise, samples: Samples) -> tuple[Tensor, Metrics]:
        """L_BC and the loss of the one-step policy."""
        observations, z = batch.observations, noise["distill_noise"]
        chunks = self.flatten(batch.actions)
        flow = behaviour_loss(self.behaviour, observations, chunks, batch.valid, noise)
        assert samples.flow_chunks is not None
        own, metrics = one_step_loss(
            self.one_step, self.critic, observations, z, samples.flow_chunks, self.config.alpha
        )
        return flow + own, {"actor/flow_loss": flow.detach(), **metrics}
