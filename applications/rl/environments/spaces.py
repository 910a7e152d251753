"""Spaces of observations and actions: which are supported, and sizes that all sides must share."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import gymnasium
import numpy as np
from gymnasium.spaces import Box

OTHER_SPACES = {
    "Dict": "flatten them by gymnasium.wrappers.FlattenObservation in an environment of your own, "
    "and the data likewise",
    "Discrete": "an environment of your own can take one number per choice and play the largest",
    "Box": "flatten them by gymnasium.wrappers.FlattenObservation in an environment of your own, "
    "and the data likewise; images need an encoder to vectors there",
}
"""The way round for spaces that are not supported, by the name of their class."""
OTHER_SPACES |= {"Tuple": OTHER_SPACES["Dict"], "MultiDiscrete": OTHER_SPACES["Discrete"]}


def vector_space(space: gymnasium.Space, name: str) -> Box:
    """Return ``space`` if it is a box of vectors.

    Arguments:
        space: space of observations or actions.
        name: its name, for the message.

    Raises:
        ValueError: it is of another kind; the message says the way round.
    """
    images = space.dtype == np.uint8
    if isinstance(space, Box) and len(space.shape) == 1 and not images:
        return space
    kind = type(space).__name__
    what = "images are not supported" if images else f"{kind} is not supported"
    if isinstance(space, Box) and not images:
        what = f"arrays of {len(space.shape)} dimensions are not supported"
    advice = OTHER_SPACES.get(kind, "convert them to vectors in an environment of your own")
    raise ValueError(
        f"{name} must be a box of one dimension of floating point, got {space}: {what}; {advice}"
    )


def bounded_vector_space(space: gymnasium.Space, name: str) -> Box:
    """Return ``space`` if it is a bounded box of vectors.

    Raises:
        ValueError: it is of another kind, or without bounds; the message says the way round.
    """
    box = vector_space(space, name)
    if not box.is_bounded():
        raise ValueError(
            f"{name} must be bounded, got {box}: actions are learned in [-1, 1]; wrap the "
            "environment by gymnasium.wrappers.RescaleAction or a class with bounds of its own"
        )
    return box


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
