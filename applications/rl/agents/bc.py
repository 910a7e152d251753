"""BC: a flow fitted to the actions of the data, without critics; the baseline of the others.

The loss is L_BC of `applications.rl.agents.flow_policy`, the policy its ODE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from applications.rl.agents.base import Agent, AgentConfig, Metrics, Noise, Shapes
from applications.rl.agents.flow_policy import behaviour_loss, flow_action

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class BCConfig(AgentConfig):
    """Options of behaviour cloning."""


class BC(Agent):
    """BC: a flow fitted to the actions of the data, without critics.

    Attributes:
        base: `FlowActor`.
    """

    config: BCConfig

    def __init__(self, config: BCConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.behaviour = self.flow_actor()

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Start and time of the flow's path."""
        return {"bc_x0": (batch_size, self.chunk_dim), "bc_t": (batch_size, 1)}

    def act_shapes(self, batch_size: int) -> Shapes:
        """Start of the flow; the middle axis is that of the candidates of other agents."""
        return {"noise": (batch_size, 1, self.chunk_dim)}

    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """The ODE of the flow."""
        x = noise["noise"].squeeze(1)
        return flow_action(
            self.behaviour, observations, x, self.config.flow_steps, self.config.solver
        )

    def total_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """L_BC, and itself as ``actor/flow_loss``."""
        chunks = self.flatten(batch.actions)
        loss = behaviour_loss(self.behaviour, batch.observations, chunks, batch.valid, noise)
        return loss, {"actor/flow_loss": loss.detach()}

    def update_targets(self) -> None:
        """Nothing: there are no target networks."""
