r"""Agents with critics: the temporal-difference loss, target networks, and the best of n proposals.

Q_i are the critics, Q̄_i their target networks, sd the population standard deviation over them.
With R the discounted rewards of a window, m the mask after it and s' its last valid next
observation,

    y   = R + γ^h m [mean Q̄(s', a') - ρ sd Q̄(s', a')],      a' of the agent's own policy,
    L_Q = mean over critics and batch of w (Q_i(s, A) - y)².

Target networks follow the weights from before the optimiser's step, θ̄ <- rate θ + (1 - rate) θ̄.
Candidates for an action are ranked by the online critics, also within y.

An update first samples what its losses take from the agent as it is
(`applications.rl.agents.samples`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from applications.rl.agents.base import Agent, AgentConfig, Metrics, Noise, Shapes, require
from applications.rl.agents.networks import Critics
from applications.rl.agents.samples import Samples
from flows import frozen

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class CriticConfig(AgentConfig):
    """Options of the agents that have critics; those of every agent come first."""

    critics: int = 10
    """Members of the ensemble."""
    rho: float = 0.5
    """ρ, pessimism of the target: mean - ρ sd over the target critics."""
    target_rate: float = 0.005
    """Polyak rate at which target networks follow their networks."""
    best_of_n: int = 1
    """Candidates of which the critics choose an action, when acting and in targets."""

    def __post_init__(self) -> None:
        """Refuse values out of range; see `AgentConfig`."""
        super().__post_init__()
        require(self.critics >= 1, "critics", self.critics, "at least 1")
        require(0 <= self.rho < math.inf, "rho", self.rho, "finite, at least 0")
        require(0 < self.target_rate <= 1, "target_rate", self.target_rate, "in (0, 1]")
        require(self.best_of_n >= 1, "best_of_n", self.best_of_n, "at least 1")


def pessimistic(values: Tensor, rho: float) -> Tensor:
    """mean - ρ sd over the critics, (E, B) -> (B,)."""
    mean = values.mean(0)
    return mean - rho * values.std(0, correction=0) if rho else mean


class ActorCritic(Agent):
    """An agent with critics.

    A subclass says how it proposes an action (`propose`) and how its actors learn (`actor_loss`);
    the other methods without underscore are defaults that it may replace.

    Attributes:
        critic, target_critic: `Critics`.
    """

    config: CriticConfig

    def __init__(self, config: CriticConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.critic = Critics(
            observation_dim, self.chunk_dim, hidden=config.hidden, members=config.critics
        )
        self.target_critic = frozen(self.critic)
        self.candidates = config.best_of_n

    @abstractmethod
    def propose(self, observations: Tensor, noise: Noise) -> Tensor:
        """A chunk (B, chunk_dim) in [-1, 1] an observation; noises (B, chunk_dim)."""

    @abstractmethod
    def actor_loss(self, batch: Batch, noise: Noise, samples: Samples) -> tuple[Tensor, Metrics]:
        """Sum of the losses of everything but the critics, and metrics."""

    def policy_noises(self) -> dict[str, str]:
        """The noises of `propose`, and under which name the noise of an update holds them."""
        return {"noise": "next_action_noise"}

    def target_pairs(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        """Pairs of a network and its target network."""
        return ((self.critic, self.target_critic),)

    def rank(self, values: Tensor) -> Tensor:
        """By what candidates are ranked: (E, M) -> (M,)."""
        return values.mean(0)

    @torch.no_grad()
    def samples(self, batch: Batch, noise: Noise) -> Samples:
        """What the losses use."""
        return Samples(next_chunks=self.next_chunks(batch, noise))

    @torch.no_grad()
    def next_value(self, batch: Batch, samples: Samples) -> Tensor:
        """Value (B,) of the next observations: that of the policy's action there."""
        assert samples.next_chunks is not None
        values = self.target_critic(batch.next_observations, samples.next_chunks)
        return pessimistic(values, self.config.rho)

    def act_shapes(self, batch_size: int) -> Shapes:
        """Each noise of `propose`, for each candidate: (B, n, chunk_dim)."""
        shape = (batch_size, self.candidates, self.chunk_dim)
        return dict.fromkeys(self.policy_noises(), shape)

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Noise of the policy at the next observation and of the behaviour flow's loss."""
        shape = (batch_size, self.candidates, self.chunk_dim)
        shapes: Shapes = dict.fromkeys(self.policy_noises().values(), shape)
        return shapes | {"bc_x0": (batch_size, self.chunk_dim), "bc_t": (batch_size, 1)}

    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """The best of the candidates, flattened (B, chunk_dim)."""
        rows, own = self.rows(observations, noise)
        return self.best(rows, self.propose(rows, own))

    def rows(self, observations: Tensor, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        """Observations and noises of `propose`, a row for each of the n·B candidates."""
        n = self.candidates
        repeated = observations if n == 1 else observations.repeat_interleave(n, dim=0)
        return repeated, {name: noise[name].flatten(0, 1) for name in self.policy_noises()}

    def best(self, rows: Tensor, proposals: Tensor) -> Tensor:
        """Of proposals (n·B, chunk_dim) at ``rows`` those ranked first, (B, chunk_dim)."""
        n = self.candidates
        if n == 1:
            return proposals
        best = self.rank(self.critic(rows, proposals)).reshape(-1, n).argmax(1)
        index = best[:, None, None].expand(-1, 1, self.chunk_dim)
        return proposals.reshape(-1, n, self.chunk_dim).gather(1, index).squeeze(1)

    def next_noise(self, noise: Noise) -> dict[str, Tensor]:
        """The noises of the policy at the next observations, by its own names for them."""
        return {name: noise[source] for name, source in self.policy_noises().items()}

    @torch.no_grad()
    def next_chunks(self, batch: Batch, noise: Noise) -> Tensor:
        """The policy's chunks (B, chunk_dim) at the next observations."""
        return self.chunks(batch.next_observations, self.next_noise(noise))

    def target(self, batch: Batch, samples: Samples) -> Tensor:
        """y, (B,), without gradient."""
        discount = self.config.discount**self.config.horizon
        return batch.rewards + discount * batch.masks * self.next_value(batch, samples)

    def critic_loss(self, batch: Batch, target: Tensor) -> tuple[Tensor, Metrics]:
        """L_Q toward ``target`` (B,), and metrics."""
        values = self.critic(batch.observations, self.flatten(batch.actions))
        loss = (batch.valid * (values - target).square()).mean()
        seen = values.detach()
        return loss, {
            "critic/loss": loss.detach(),
            "critic/q_mean": seen.mean(),
            "critic/q_min": seen.amin(),
            "critic/q_max": seen.amax(),
            "critic/q_spread": seen.std(0, correction=0).mean(),
        }

    def total_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """L_Q and the losses of the actors, summed; see `Agent.total_loss`."""
        samples = self.samples(batch, noise)
        critic, metrics = self.critic_loss(batch, self.target(batch, samples))
        actor, others = self.actor_loss(batch, noise, samples)
        return critic + actor, {**metrics, **others}

    @torch.no_grad()
    def update_targets(self) -> None:
        """θ̄ <- rate θ + (1 - rate) θ̄; call before the optimiser's step."""
        pairs = self.target_pairs()
        targets: list[Tensor] = [p for _, copy in pairs for p in copy.parameters()]
        online: list[Tensor] = [p for network, _ in pairs for p in network.parameters()]
        torch._foreach_lerp_(targets, online, self.config.target_rate)
