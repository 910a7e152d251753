r"""The base class of the agents: seeded noise, a sum of losses, and actions as a pure function.

A chunk is h actions flattened time-major, A (B, chunk_dim); s is the first observation of the
window, w = valid[h-1].  An update minimises one sum of losses (`applications.rl.agents.losses`) by
one optimiser.  In each term the networks it does not train are held constant: targets, rollouts and
the actions to imitate are made without gradient, and a critic that is to be maximised is called
with ``stop_weight_gradient=True``.

No random number is drawn here but by `Agent.draw_noise` and `Agent.act_noise`: `Agent.loss` and
`Agent.act` are functions of the weights, their inputs and a dictionary of noise.  Nothing waits for
the device.

An agent of one's own is a subclass of `Agent` with a configuration of its own, in any file;
`applications.rl.agents.testing.check_agent` tests it.

Source: Li and Levine, "Q-learning with adjoint matching" (arXiv 2601.14234) and its released code;
chunks after Li et al., "Reinforcement learning with action chunking" (arXiv 2507.07969).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor, nn

from applications.rl.agents.losses import Metrics, Term
from applications.rl.agents.networks import Critics, FlowActor, OneStepActor
from applications.rl.agents.options import AgentConfig, require
from applications.rl.agents.rollouts import Noise
from applications.rl.agents.running_state import RunningState

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch

Shapes = dict[str, tuple[int, ...]]
Options = Mapping[str, Mapping[str, Any]]
"""Values of options by domain, such as ``{"scene": {"inverse_temperature": 1.0}}``."""


class Uniform(tuple[int, ...]):
    """A shape of noise that is uniform on [0, 1); noise of a plain shape is standard normal."""


class Agent(nn.Module, ABC):
    """A policy over chunks of actions and the losses that train it.

    A subclass says which noises it needs, what its losses are, and how it acts; nothing else is
    overridden.  A module assigned to an attribute ``target_NAME`` is the target network of the
    module ``NAME``: it follows it at the rate ``target_NAME_rate`` of the options if there is one,
    else at ``target_rate``, in every update or, if there is an option ``target_every``, in one of
    so many.

    An agent is in training mode (`Module.train`) while it is trained and explores, and in
    evaluation mode (`Module.eval`) when it is evaluated, loaded or exported.

    Arguments:
        config: options.
        observation_dim: size of an observation.
        action_dim: size d_a of one action.

    Attributes:
        config_class: the class of its options; each agent has one of its own.
        published, small: values of its options by domain that the presets of these names take
            (`applications.rl.agents.presets`).
        color: colour of its curve in pictures, such as "#ffb14e"; one is chosen if empty.
        page: its page of documentation, a path or an address.
        chunk_length: actions the policy emits at once.
        chunk_dim: size of a flattened chunk.
        observation_mean, observation_deviation: (observation_dim,), see `fit_normalizer`.
        target_every: updates from one step of the target networks to the next.
        updates: number of updates so far, a scalar on the device; only where ``target_every`` is
            above 1.

    Raises:
        ValueError: a size is not positive.
    """

    config_class: ClassVar[type[AgentConfig]]
    published: ClassVar[Options] = {}
    small: ClassVar[Options] = {}
    color: ClassVar[str] = ""
    page: ClassVar[str] = ""

    observation_mean: Tensor
    observation_deviation: Tensor
    updates: Tensor

    def __init_subclass__(cls) -> None:
        """Tell the configuration which agent it belongs to.

        Raises:
            TypeError: ``config_class`` is missing, or is that of another agent.
        """
        super().__init_subclass__()
        config_class = cls.__dict__.get("config_class")
        if not (isinstance(config_class, type) and issubclass(config_class, AgentConfig)):
            raise TypeError(f"{cls.__name__}.config_class must be a subclass of AgentConfig")
        other = config_class.__dict__.get("agent_class")
        if config_class is AgentConfig or (other and other.__qualname__ != cls.__qualname__):
            raise TypeError(
                f"{cls.__name__}.config_class must be a class of its own, "
                f"got {config_class.__name__}{f' of {other.__name__}' if other else ''}"
            )
        config_class.agent_class = cls

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
        self.target_every: int = getattr(config, "target_every", 1)
        if self.target_every > 1:
            self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    # ----- methods that every agent defines --------------------------------------------------

    @abstractmethod
    def noise_shapes(self, batch_size: int) -> Shapes:
        """Declare name and shape of every random number of one update, in the order of drawing."""

    @abstractmethod
    def act_shapes(self, batch_size: int) -> Shapes:
        """Declare name and shape (B, ...) of the normal random numbers of acting."""

    @abstractmethod
    def losses(self, batch: Batch, noise: Noise) -> dict[str, Term]:
        """Compute the losses by name, each with its metrics, at normalised observations.

        Their sum is minimised.
        """

    @abstractmethod
    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """Compute flattened chunks (B, chunk_dim) in [-1, 1] at normalised observations."""

    # ----- methods that all agents have in common --------------------------------------------

    @final
    def loss(self, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """Return the scalar to minimise and detached scalar metrics, for a batch and its noise."""
        normalised = type(batch)(  # PyTorch 2.6 does not compile `_replace`
            self.normalize(batch.observations),
            batch.actions,
            batch.rewards,
            batch.masks,
            batch.valid,
            self.normalize(batch.next_observations),
        )
        terms = self.losses(normalised, noise)
        metrics = {name: value for _, own in terms.values() for name, value in own.items()}
        return reduce(add, [loss for loss, _ in terms.values()]), metrics

    @final
    @torch.no_grad()
    def act(self, observations: Tensor, noise: Noise | torch.Generator) -> Tensor:
        """Choose chunks of actions (B, chunk_length, action_dim) in [-1, 1] by the noise alone.

        Arguments:
            observations: (B, observation_dim).
            noise: the noise that `act_noise` drew for B, or the generator to draw it from.

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
        shapes = self.act_shapes(batch_size)
        for name, shape in shapes.items():
            if name not in noise or noise[name].shape != shape:
                got = tuple(noise[name].shape) if name in noise else sorted(noise)
                raise ValueError(f"noise must hold {name!r} of shape {shape}, got {got}")
        own = {name: noise[name] for name in shapes}
        chunks = self.chunks(self.normalize(observations), own)
        return chunks.reshape(batch_size, self.chunk_length, self.action_dim)

    @final
    def draw_noise(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw every random number of one update, on the device of the agent and the generator."""
        return self._draw(self.noise_shapes(batch_size), generator)

    @final
    def act_noise(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw every random number of acting once at ``batch_size`` observations."""
        return self._draw(self.act_shapes(batch_size), generator)

    @final
    @torch.no_grad()
    def fit_normalizer(self, observations: Tensor) -> None:
        """Set mean and deviation, by which observations are normalised, from data (N, obs).

        A component that does not vary keeps its own scale.
        """
        data = observations.to(torch.float64)
        deviation = data.std(0, correction=0)
        self.observation_mean.copy_(data.mean(0))
        self.observation_deviation.copy_(torch.where(deviation > 1e-6, deviation, 1.0))

    @final
    def normalize(self, observations: Tensor) -> Tensor:
        """Scale observations (B, observation_dim) for the networks."""
        scale = self.config.observation_scale
        if not scale:
            return observations
        return scale * (observations - self.observation_mean) / self.observation_deviation

    @final
    def flatten(self, actions: Tensor) -> Tensor:
        """Flatten (B, h, d_a) to the chunk (B, chunk_dim), time-major, that the policy emits."""
        return actions[:, : self.chunk_length].flatten(1)

    @final
    @torch.no_grad()
    def update_targets(self) -> None:
        """Move the target networks a step, θ̄ <- rate θ + (1 - rate) θ̄, before the optimiser's step.

        Where ``target_every`` is above 1 they stay where they are in the other updates.  Which
        update it is is counted on the device, so that a CUDA graph can repeat this method.

        Raises:
            TypeError: there is a target network for which the options have no rate.
        """
        moved: dict[float, list[Tensor]] = {}
        followed: dict[float, list[Tensor]] = {}
        for name, target in self.named_children():
            if name.startswith("target_"):
                rate = self._rate(name)
                network = self.get_submodule(name.removeprefix("target_"))
                moved.setdefault(rate, []).extend(target.parameters())
                followed.setdefault(rate, []).extend(network.parameters())
        if self.target_every == 1:
            for rate, parameters in moved.items():
                torch._foreach_lerp_(parameters, followed[rate], rate)
            return
        self.updates.add_(1)
        due = self.updates % self.target_every == 0
        for rate, parameters in moved.items():
            weight = rate * due.to(parameters[0].dtype)
            torch._foreach_lerp_(parameters, followed[rate], [weight] * len(parameters))

    @final
    @torch.no_grad()
    def follow(self, metrics: Metrics) -> None:
        """Let the agent's running states (`RunningState`) follow the metrics of an update.

        Training calls it once an update, before `update_targets`.
        """
        for module in self.children():
            if isinstance(module, RunningState):
                module.follow(metrics)

    @final
    def critics(self, members: int) -> Critics:
        """Make a new ensemble of critics of the agent's chunks."""
        return Critics(
            self.observation_dim, self.chunk_dim, hidden=self.config.hidden, members=members
        )

    @final
    def flow_actor(self) -> FlowActor:
        """Make a new flow over the agent's chunks."""
        return FlowActor(
            self.observation_dim,
            self.chunk_dim,
            hidden=self.config.hidden,
            layer_norm=self.config.actor_layer_norm,
        )

    @final
    def one_step_actor(self) -> OneStepActor:
        """Make a new one-step policy over the agent's chunks."""
        return OneStepActor(
            self.observation_dim,
            self.chunk_dim,
            hidden=self.config.hidden,
            layer_norm=self.config.actor_layer_norm,
        )

    def _rate(self, target: str) -> float:
        """Return the rate at which the target network of this name follows its network."""
        own = getattr(self.config, f"{target}_rate", None)
        rate: float | None = getattr(self.config, "target_rate", None) if own is None else own
        if rate is None:
            raise TypeError(
                f"{type(self.config).__name__} must have an option target_rate, as CriticOptions "
                f"has it, or {target}_rate, for the target network {target}"
            )
        return rate

    def _draw(self, shapes: Shapes, generator: torch.Generator) -> dict[str, Tensor]:
        like = next(self.parameters())
        return {
            name: (torch.rand if isinstance(shape, Uniform) else torch.randn)(
                tuple(shape), generator=generator, dtype=like.dtype, device=like.device
            )
            for name, shape in shapes.items()
        }
