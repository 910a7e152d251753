"""Sizes of observations and actions, which environment, data and agent must share."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import gymnasium


class Spaces(NamedTuple):
    """The sizes of an observation vector and an action vector."""

    observation_dim: int
    action_dim: int


class HasSpaces(Protocol):
    """An object with sizes of observations and actions: a dataset, an agent, or `Spaces`."""

    @property
    def observation_dim(self) -> int:
        """Size of an observation."""

    @property
    def action_dim(self) -> int:
        """Size of an action."""


def spaces_of(environment: gymnasium.Env) -> Spaces:
    """Return the sizes of an environment whose spaces are boxes of one dimension."""
    observation, action = environment.observation_space.shape, environment.action_space.shape
    assert observation is not None
    assert action is not None
    return Spaces(observation[0], action[0])


def check_spaces(environment: HasSpaces, other: HasSpaces, whose: str) -> None:
    """Refuse an environment whose sizes differ from those of data or an agent.

    Arguments:
        environment: the sizes of the environment.
        other: the sizes to compare them with.
        whose: what ``other`` is, for the message.

    Raises:
        ValueError: the sizes differ.
    """
    for name in ("observation", "action"):
        a, b = (getattr(spaces, f"{name}_dim") for spaces in (environment, other))
        if a != b:
            raise ValueError(
                f"the environment's {name}s have {a} numbers and those of {whose} have {b}: "
                "they do not belong together"
            )
