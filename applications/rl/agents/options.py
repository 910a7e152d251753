"""Options of the agents: values with a range, and groups of options that several agents share.

The configuration of an agent is one frozen dataclass.  It derives from `AgentConfig` and, beside
it, from the groups it needs:

    @dataclass(frozen=True)
    class QAMConfig(MatchingOptions, BestOfOptions, CriticOptions, AgentConfig): ...

An option written as ``checked_option(default, range)`` is checked when a configuration is made; an
option with a plain default is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, final

from adjoint import KERNELS
from applications.common.objects import is_reference
from applications.rl.agents.rollouts import Solver

Adjoint = Literal["lean", "scalar"]
AGENT_KERNELS = tuple(name for name in KERNELS if name != "covariance_matched")
"""Schemes of an agent's chain: ``covariance_matched`` costs a product per dimension and step."""


@dataclass(frozen=True)
class Range:
    """A set of values that an option may have.

    Attributes:
        expected: the set in words, for the error message.
        holds: says whether a value is in it.
    """

    expected: str
    holds: Callable[[Any], bool]


def at_least(low: float) -> Range:
    """Make the range of finite numbers from ``low`` on."""
    words = f"at least {low}" if isinstance(low, int) else f"finite, at least {low:g}"
    return Range(words, lambda value: low <= value < math.inf)


def above(low: float) -> Range:
    """Make the range of finite numbers greater than ``low``."""
    words = "positive and finite" if low == 0 else f"finite, above {low:g}"
    return Range(words, lambda value: low < value < math.inf)


def one_of(*names: str) -> Range:
    """Make the range of the given words."""
    return Range(f"one of {', '.join(names)}", lambda value: value in names)


FINITE = Range("finite", math.isfinite)
ONLY_EULER = Range("euler, for a diffusion has no ODE", lambda value: value == "euler")
BUDGET = Range("None, or positive and finite", lambda nats: nats is None or 0 < nats < math.inf)


def checked_option(default: Any, allowed: Range) -> Any:
    """Declare an option of a configuration with its default and the range it is checked against."""
    return field(default=default, metadata={"range": allowed})


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Raise a ValueError that names an option, its value and what was expected, unless it holds."""
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


@dataclass(frozen=True)
class AgentConfig:
    """Options that every agent has.

    Attributes:
        agent_class: the agent that these are options of, set by its ``config_class``.
    """

    agent_class: ClassVar[Any]  # type[Agent], which the command line could not resolve here

    hidden: tuple[int, ...] = checked_option(
        (512, 512, 512, 512),
        Range("one or more positive widths", lambda sizes: bool(sizes) and min(sizes) >= 1),
    )
    """Widths of the hidden layers of every network."""
    actor_layer_norm: bool = False
    """Use layer norm in the flow, one-step and deterministic actors."""
    horizon: int = checked_option(5, at_least(1))
    """Steps h of a window: the length of a chunk of actions and of the n-step return."""
    observation_scale: float = checked_option(0.0, at_least(0.0))
    """Standardise observations by the data's mean and deviation, then multiply by this; 0 leaves
    them as they are, as published.  Small networks resolve a maze only if it is several wide.
    Without data, so for learning online alone, mean 0 and deviation 1 are taken: it then multiplies
    the observations as they come."""
    action_chunking: bool = True
    """Act in chunks of h actions; otherwise in single actions, with returns over h steps."""
    discount: float = checked_option(0.99, Range("in (0, 1]", lambda value: 0 < value <= 1))
    """Discount γ per environment step."""
    flow_steps: int = checked_option(10, at_least(1))
    """Steps K of the flow, when acting and in the training chain."""
    solver: Solver = checked_option("euler", one_of("euler", "ab2"))  # noqa: RUF009 — a field, as above
    """Solver of the flow's ODE: "euler" as published, or "ab2", of second order, as cheap."""
    lr: float = checked_option(3e-4, above(0))
    """Learning rate of Adam."""
    grad_clip: float = checked_option(0.0, at_least(0.0))
    """Largest norm of the gradient over all networks; 0 turns clipping off."""

    @final
    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            ValueError: naming the option, its value and what was expected.
        """
        for one in fields(self):
            allowed = one.metadata.get("range")
            if allowed is not None:
                value = getattr(self, one.name)
                require(allowed.holds(value), one.name, value, allowed.expected)

    @property
    def chunk_length(self) -> int:
        """Return the number of actions that the policy emits at once."""
        return self.horizon if self.action_chunking else 1

    @property
    def window_discount(self) -> float:
        """Return the discount γ^h of a whole window."""
        return self.discount**self.horizon


@dataclass(frozen=True)
class CriticOptions:
    """Options of the agents that have critics."""

    critics: int = checked_option(10, at_least(1))
    """Members of the ensemble of critics."""
    rho: float = checked_option(0.5, at_least(0.0))
    """Pessimism ρ of the target: mean - ρ sd over the target critics."""
    target_rate: float = checked_option(0.005, Range("in (0, 1]", lambda value: 0 < value <= 1))
    """Polyak rate at which target networks follow their networks."""


@dataclass(frozen=True)
class BestOfOptions:
    """Options of the agents that choose among candidates."""

    best_of_n: int = checked_option(1, at_least(1))
    """Candidates of which the critics choose an action, when acting and in targets."""


@dataclass(frozen=True)
class EntropyOptions:
    """Options of the agents that have a tanh-Gaussian actor, whose temperature is learned."""

    target_entropy: float = checked_option(-0.5, FINITE)
    """Entropy that the temperature of the actor aims at, in nats per dimension."""


@dataclass(frozen=True)
class DiffusionOptions:
    """Options of the agents whose policy is a diffusion."""

    flow_steps: int = checked_option(10, Range("at least 2 for a diffusion", lambda n: n >= 2))
    """Steps T of the diffusion."""
    solver: Solver = checked_option("euler", ONLY_EULER)  # noqa: RUF009 — a field, as above
    """Solver of a flow's ODE; a diffusion has none."""
    time_features: int = checked_option(
        64, Range("even and positive", lambda n: n > 0 and n % 2 == 0)
    )
    """Fourier features of the time, half of them cosines and half sines."""
    grad_clip: float = checked_option(1.0, at_least(0.0))
    """Largest norm of the gradient over all networks; 0 turns clipping off."""


@dataclass(frozen=True)
class TiltOptions:
    """Options of the agents whose policy flow is the tilt of a behaviour flow."""

    inverse_temperature: float = checked_option(1.0, above(0))
    """Inverse temperature τ: the policy is the behaviour tilted by exp(τ Q)."""
    residual: bool = False
    """Learn a correction of the behaviour's velocity rather than a velocity of its own."""
    target_behaviour: bool = True
    """Compare the policy with the target network of the behaviour rather than with itself."""
    flow_steps: int = checked_option(10, Range("at least 2 for a chain", lambda steps: steps >= 2))
    """Steps K of the flow, when acting and in the training chain."""
    grad_clip: float = checked_option(1.0, at_least(0.0))
    """Largest norm of the gradient over all networks; 0 turns clipping off."""


@dataclass(frozen=True)
class MatchingOptions(TiltOptions):
    """Options of the agents that tilt by adjoint matching."""

    kernel: str = checked_option(
        "euler_published",
        Range(
            f"one of {', '.join(AGENT_KERNELS)}, or module:Name",
            lambda name: name in AGENT_KERNELS or is_reference(name),
        ),
    )
    """Memoryless scheme, one of adjoint.KERNELS but ``covariance_matched``, or an `adjoint.Scheme`
    of your own, which measures nothing, as module:Name; ``moment_matched`` is the most exact at few
    steps."""
    clip_terminal: bool = True
    """Take the critics' gradient at the action clipped to [-1, 1]."""
    target_gradient: bool = True
    """Take the gradient of the target critics rather than of the critics."""
    kl_budget: float | None = checked_option(None, BUDGET)
    """Trust region: path KL in nats per action at which a multiplier holds the policy, which is
    then the tilt by exp(τ Q/Λ) with Λ adapted; None turns it off."""
    value_penalty: float = checked_option(0.0, at_least(0.0))
    """Weight of the critics' penalty: their mean at the policy's actions minus that at the data."""
    adjoint: Adjoint = checked_option("lean", one_of("lean", "scalar"))  # noqa: RUF009 — a field
    """Adjoint: "lean", exact, along the chain, or "scalar", cheaper and not exact, at states on
    straight lines to the ends of the policy's ODE; that has weights of its own, and takes no other
    kernel than the default."""
