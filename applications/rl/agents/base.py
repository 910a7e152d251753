r"""What every agent is: options, seeded noise, one summed loss, actions as a pure function.

A chunk is h actions flattened time-major, A (B, chunk_dim); s is the first observation of the
window, w = valid[h-1].  An update minimises one sum of losses by one optimiser.  In each term the
networks it does not train are held constant: targets, rollouts and the actions to imitate are made
without gradient, and a critic that is to be maximised is called with ``stop_weight_gradient=True``.

No random number is drawn here but by `Agent.draw_noise` and `Agent.act_noise`: `Agent.loss` and
`Agent.act` are functions of the weights, their inputs and a dictionary of noise.  Nothing waits for
the device.

Source: Li and Levine, "Q-learning with adjoint matching" (arXiv 2601.14234) and its released code;
chunks after Li et al., "Reinforcement learning with action chunking" (arXiv 2507.07969).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from applications.rl.agents.flow_policy import Solver
from applications.rl.agents.networks import FlowActor, OneStepActor

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch

Noise = Mapping[str, Tensor]
Metrics = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

UNIFORM = ("bc_t",)
"""Noises that are uniform on [0, 1); all others are standard normal."""


@dataclass(frozen=True)
class AgentConfig:
    """Options that every agent has."""

    hidden: tuple[int, ...] = (512, 512, 512, 512)
    """Widths of the hidden layers of every network."""
    actor_layer_norm: bool = False
    """Layer norm in the flow and one-step actors."""
    horizon: int = 5
    """Steps h of a window: the length of a chunk of actions and of the n-step return."""
    observation_scale: float = 0.0
    """Standardise observations by the data's mean and deviation, then multiply by this; 0 leaves
    them as they are, as published.  Small networks resolve a maze only if it is several wide.
    Without data, so for learning online alone, mean 0 and deviation 1 are taken: it then multiplies
    the observations as they come."""
    action_chunking: bool = True
    """Act in chunks of h actions; otherwise in single actions, with returns over h steps."""
    discount: float = 0.99
    """γ, per environment step."""
    flow_steps: int = 10
    """Steps K of the flow, when acting and in the training chain."""
    solver: Solver = "euler"
    """Of the flow's ODE: "euler" as published, or "ab2", of second order at the same cost."""
    lr: float = 3e-4
    """Learning rate of Adam."""
    grad_clip: float = 0.0
    """Largest norm of the gradient over all networks; 0 turns clipping off."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            ValueError: naming the option, its value and what was expected.
        """
        widths = bool(self.hidden) and min(self.hidden) >= 1
        require(widths, "hidden", self.hidden, "one or more positive widths")
        require(self.horizon >= 1, "horizon", self.horizon, "at least 1")
        scale = self.observation_scale
        require(0 <= scale < math.inf, "observation_scale", scale, "finite, at least 0")
        require(0 < self.discount <= 1, "discount", self.discount, "in (0, 1]")
        require(self.flow_steps >= 1, "flow_steps", self.flow_steps, "at least 1")
        require(self.solver in ("euler", "ab2"), "solver", self.solver, "'euler' or 'ab2'")
        require(0 < self.lr < math.inf, "lr", self.lr, "positive and finite")
        require(0 <= self.grad_clip < math.inf, "grad_clip", self.grad_clip, "finite, at least 0")

    @property
    def chunk_length(self) -> int:
        """Actions the policy emits at once."""
        return self.horizon if self.action_chunking else 1


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Raise a ValueError that names an option, its value and what was expected, unless it holds."""
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


class Agent(nn.Module, ABC):
    """A policy over chunks of actions and the loss that trains it.

    Arguments:
        config: options.
        observation_dim: size of an observation.
        action_dim: size d_a of one action.

    Attributes:
        chunk_length: actions the policy emits at once.
        chunk_dim: size of a flattened chunk.
        observation_mean, observation_deviation: (observation_dim,), see `fit_normalizer`.

    Raises:
        ValueError: a size is not positive.
    """

    observation_mean: Tensor
    observation_deviation: Tensor

    def __init__(self, config: AgentConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__()
        require(observation_dim >= 1, "observation_dim", observation_dim, "at least 1")
        require(action_dim >= 1, "action_dim", action_dim, "at least 1")
        self.config = config
        self.observation_dim, self.action_dim = observation_dim, action_dim
        self.chunk_length = config.chunk_length
        self.chunk_dim = self.chunk_length * action_dim
        self.register_buffer("observation_mean", torch.zeros(observation_dim))
        self.register_buffer("observation_deviation", torch.ones(observation_dim))

    @abstractmethod
    def noise_shapes(self, batch_size: int) -> Shapes:
        """Name and shape of every random number of one update."""

    @abstractmethod
    def act_shapes(self, batch_size: int) -> Shapes:
        """Name and shape of every random number of acting at ``batch_size`` observations."""

    @abstractmethod
    def total_loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """`loss` of a batch whose observations are normalised."""

    @abstractmethod
    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """Flattened chunks (B, chunk_dim) in [-1, 1] at normalised observations."""

    @abstractmethod
    def update_targets(self) -> None:
        """Target networks follow their networks one step; call before the optimiser's step."""

    @torch.no_grad()
    def fit_normalizer(self, observations: Tensor) -> None:
        """Take mean and deviation, by which observations are normalised, from data (N, obs).

        A component that does not vary keeps its own scale.
        """
        data = observations.to(torch.float64)
        deviation = data.std(0, correction=0)
        self.observation_mean.copy_(data.mean(0))
        self.observation_deviation.copy_(torch.where(deviation > 1e-6, deviation, 1.0))

    def normalize(self, observations: Tensor) -> Tensor:
        """Observations (B, observation_dim) as the networks see them."""
        scale = self.config.observation_scale
        if not scale:
            return observations
        return scale * (observations - self.observation_mean) / self.observation_deviation

    def loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """The scalar to minimise and detached scalar metrics, for a batch and its noise."""
        encoded = type(batch)(  # PyTorch 2.6 does not compile `_replace`
            self.normalize(batch.observations),
            batch.actions,
            batch.rewards,
            batch.masks,
            batch.valid,
            self.normalize(batch.next_observations),
        )
        return self.total_loss(encoded, noise)

    def draw_noise(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Every random number of one update, on the device of the agent and the generator."""
        return self._draw(self.noise_shapes(batch_size), generator)

    def act_noise(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Every random number of acting once at ``batch_size`` observations."""
        return self._draw(self.act_shapes(batch_size), generator)

    @torch.no_grad()
    def act(self, observations: Tensor, noise: Noise | torch.Generator) -> Tensor:
        """Chunks of actions (B, chunk_length, action_dim) in [-1, 1], a pure function of the noise.

        Arguments:
            observations: (B, observation_dim).
            noise: what `act_noise` gave for B, or the generator to draw it from.

        Raises:
            ValueError: observations of another shape, or noise that lacks a name or has another
                shape.
        """
        if observations.ndim != 2 or observations.shape[1] != self.observation_dim:
            raise ValueError(
                f"observations must have shape (B, {self.observation_dim}), "
                f"got {tuple(observations.shape)}"
            )
        batch_size = observations.shape[0]
        if isinstance(noise, torch.Generator):
            noise = self.act_noise(batch_size, noise)
        for name, shape in self.act_shapes(batch_size).items():
            if name not in noise or noise[name].shape != shape:
                got = tuple(noise[name].shape) if name in noise else sorted(noise)
                raise ValueError(f"noise must hold {name!r} of shape {shape}, got {got}")
        chunks = self.chunks(self.normalize(observations), noise)
        return chunks.reshape(batch_size, self.chunk_length, self.action_dim)

    def flow_actor(self) -> FlowActor:
        """A new flow over the agent's chunks."""
        config = self.config
        return FlowActor(
            self.observation_dim,
            self.chunk_dim,
            hidden=config.hidden,
            layer_norm=config.actor_layer_norm,
        )

    def one_step_actor(self) -> OneStepActor:
        """A new one-step policy over the agent's chunks."""
        config = self.config
        return OneStepActor(
            self.observation_dim,
            self.chunk_dim,
            hidden=config.hidden,
            layer_norm=config.actor_layer_norm,
        )

    def flatten(self, actions: Tensor) -> Tensor:
        """The chunk (B, chunk_dim), time-major, that the policy should emit, of (B, h, d_a)."""
        return actions[:, : self.chunk_length].flatten(1)

    def _draw(self, shapes: Shapes, generator: torch.Generator) -> dict[str, Tensor]:
        like = next(self.parameters())
        return {
            name: (torch.rand if name in UNIFORM else torch.randn)(
                shape, generator=generator, dtype=like.dtype, device=like.device
            )
            for name, shape in shapes.items()
        }
