r"""IFQL: implicit Q-learning with a behaviour flow, acting by the best of many samples of it.

A value network is fitted to an upper expectile of the target critics on the data's actions,

    L_V = mean |κ - 1[d < 0]| d²,     d = mean Q̄(s, A) - ρ sd Q̄(s, A) - V(s),

and the critics to y = R + γ^h m V(s').  The total is L_Q + L_V + L_BC; L_V does not weight windows.
The agent acts by that of ``best_of_n`` samples of the flow of which the least online critic is
greatest.  Gradients are not clipped.

Source: Park et al., "Flow Q-learning" (arXiv 2502.02538), section on baselines, after Kostrikov et
al., "Offline reinforcement learning with implicit Q-learning" (arXiv 2110.06169).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from applications.rl.agents.actor_critic import ActorCritic, CriticConfig, pessimistic
from applications.rl.agents.base import Metrics, Noise, Shapes, require
from applications.rl.agents.flow_policy import behaviour_loss, flow_action
from applications.rl.agents.networks import ValueNetwork
from applications.rl.agents.samples import Samples

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class IFQLConfig(CriticConfig):
    """Options of IFQL."""

    expectile: float = 0.9
    """κ: above 1/2 the value leans to the best actions of the data."""
    best_of_n: int = 32
    """Samples of the flow of which the critics choose an action when acting."""

    def __post_init__(self) -> None:
        """Refuse values out of range; see `AgentConfig`."""
        super().__post_init__()
        require(0 < self.expectile < 1, "expectile", self.expectile, "in (0, 1)")


class IFQL(ActorCritic):
    """IFQL: implicit Q-learning that acts by the best of many samples of a behaviour flow.

    Attributes:
        base: `FlowActor` of the behaviour.
        value: `ValueNetwork`.
    """

    config: IFQLConfig

    def __init__(self, config: IFQLConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.behaviour = self.flow_actor()
        self.value = ValueNetwork(observation_dim, hidden=config.hidden)

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Start and time of the flow's path; targets need no action."""
        return {"bc_x0": (batch_size, self.chunk_dim), "bc_t": (batch_size, 1)}

    def propose(self, observations: Tensor, noise: Noise) -> Tensor:
        """A sample of the behaviour flow."""
        config = self.config
        return flow_action(
            self.behaviour, observations, noise["noise"], config.flow_steps, config.solver
        )

    def rank(self, values: Tensor) -> Tensor:
        """The least of the critics: (E, M) -> (M,)."""
        return values.amin(0)

    def samples(self, batch: Batch, noise: Noise) -> Samples:
        """Nothing: the policy is not asked."""
        return Samples()

    @torch.no_grad()
    def next_value(self, batch: Batch, samples: Samples) -> Tensor:
        """V(s') (B,)."""
        return self.value(batch.next_observations)

    def actor_loss(self, batch: Batch, noise: Noise, samples: Samples) -> tuple[Tensor, Metrics]:
        """L_BC + L_V."""
        observations, chunks = batch.observations, self.flatten(batch.actions)
        flow = behaviour_loss(self.behaviour, observations, chunks, batch.valid, noise)
        with torch.no_grad():
            q = pessimistic(self.target_critic(observations, chunks), self.config.rho)
        v = self.value(observations)
        loss = expectile_loss(q - v, self.config.expectile)
        return flow + loss, {
            "actor/flow_loss": flow.detach(),
            "value/loss": loss.detach(),
            "value/v_mean": v.detach().mean(),
            "value/advantage": (q - v.detach()).mean(),
        }


def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    """Mean of κ d² where d >= 0 and of (1 - κ) d² elsewhere, for d (B,)."""
    squares = difference.square()
    return torch.where(difference >= 0, expectile * squares, (1 - expectile) * squares).mean()
