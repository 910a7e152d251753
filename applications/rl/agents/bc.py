"""BC: a flow fitted to the actions of the data, without critics; the baseline of the others.

    L = L_BC

with `applications.rl.agents.losses.behaviour_loss`.  The policy is the flow's ODE.

Source: Lipman et al., "Flow matching for generative modeling" (arXiv 2210.02747).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from applications.rl.agents.base import Agent, Shapes, Uniform
from applications.rl.agents.losses import Term, behaviour_loss
from applications.rl.agents.options import AgentConfig
from applications.rl.agents.rollouts import Noise, flow_action

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class BCConfig(AgentConfig):
    """Options of behaviour cloning."""


class BC(Agent):
    """BC: a flow fitted to the actions of the data, without critics.

    Attributes:
        behaviour: `FlowActor`.
    """

    config: BCConfig
    config_class = BCConfig
    color = "#58b4f5"
    page = "docs/agents/bc.md"

    def __init__(self, config: BCConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.behaviour = self.flow_actor()

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Declare start and time of the flow's path."""
        return {"bc_x0": (batch_size, self.chunk_dim), "bc_t": Uniform((batch_size, 1))}

    def act_shapes(self, batch_size: int) -> Shapes:
        """Declare the start of the flow; the middle axis counts candidates, as for other agents."""
        return {"noise": (batch_size, 1, self.chunk_dim)}

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Term]:
        """Compute the terms of L = L_BC."""
        s, actions = batch.observations, self.flatten(batch.actions)
        return {"behaviour": behaviour_loss(self.behaviour, s, actions, batch.valid, noise)}

    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """Run the ODE of the flow."""
        config, x = self.config, noise["noise"].squeeze(1)
        return flow_action(self.behaviour, observations, x, config.flow_steps, config.solver)
