"""Sizes of observations and actions, by which environments, data and agents belong together."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import gymnasium


class Spaces(NamedTuple):
    """How many numbers an observation and an action have."""

    observation_dim: int
    action_dim: int


class HasSpaces(Protocol):
    """A data set, an agent, or ``Spaces`` themselves."""

    @property
    def observation_dim(self) -> int:
        """Numbers in an observation."""

    @property
    def action_dim(self) -> int:
        """Numbers in an action."""


def spaces_of(environment: gymnasium.Env) -> Spaces:
    """Those of an environment whose spaces are boxes of one dimension."""
    observation, action = environment.observation_space.shape, environment.action_space.shape
    assert observation is not None
    assert action is not None
    return Spaces(observation[0], action[0])


def check_spaces(environment: HasSpaces, other: HasSpaces, whose: str) -> None:
    """Refuse an environment whose spaces are not those of ``whose``, the ``other``.

    Raises:
        ValueError: they differ.
    """
    for name in ("observation", "action"):
        a, b = (getattr(spaces, f"{name}_dim") for spaces in (environment, other))
        if a != b:
            raise ValueError(
                f"the environment's {name}s have {a} numbers and those of {whose} have {b}: "
                "they do not belong together"
            )
