"""A wrapper that gives every environment the conventions that agents rely on.

Observations are float32 vectors and actions are vectors in [−1, 1]^d.  An action outside is clipped
(an environment would accept it silently), and an affine map takes [−1, 1]^d to the range of the
environment.  Each step's ``info`` has ``success`` as a bool.  The reward may be made sparse,
r ← −1[r ≠ 0].  Episodes are reproducible, see `applications.rl.environments.reproducible`.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from applications.rl.environments.reproducible import Reproducible
from applications.rl.environments.spaces import bounded_vector_space, vector_space

Observation = NDArray[np.float32]


class Standard(gymnasium.Wrapper):
    """Wraps an environment so that it follows the conventions of the module docstring.

    Arguments:
        env: an environment whose spaces are boxes of one dimension; actions must be bounded.
        sparse: whether the reward becomes −1[r ≠ 0].

    Attributes:
        observation_dim, action_dim: sizes of an observation and an action.
        action_low, action_high: (action_dim,), bounds of the actions in the units of ``env``, to
            which −1 and 1 are mapped.

    Raises:
        ValueError: the spaces are of another kind.
    """

    def __init__(self, env: gymnasium.Env, *, sparse: bool = False) -> None:
        super().__init__(Reproducible(env))
        self.sparse = sparse
        outer = vector_space(env.observation_space, "observation_space")
        self.observation_space = Box(-np.inf, np.inf, outer.shape, np.float32)
        actions = bounded_vector_space(env.action_space, "action_space")
        self.action_space = Box(-1.0, 1.0, actions.shape, np.float32)
        self.observation_dim, self.action_dim = outer.shape[0], actions.shape[0]
        self.action_low, self.action_high = actions.low, actions.high
        self._rescales = bool((actions.low != -1.0).any() or (actions.high != 1.0).any())

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode; ``seed`` in [0, 2³²) decides all of its randomness."""
        observation, info = self.env.reset(seed=seed, options=options)
        return np.array(observation, np.float32), info

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take one step by an action of shape (d,).

        Raises:
            ValueError: the action has another shape or contains NaN.
        """
        observation, reward, terminated, truncated, info = self.env.step(self._inner(action))
        reward = float(reward)
        if self.sparse:
            reward = -float(reward != 0.0)
        info["success"] = bool(info.get("success", False))
        state = np.array(observation, np.float32)
        return state, reward, bool(terminated), bool(truncated), info

    def _inner(self, action: Any) -> NDArray[Any]:
        action = np.asarray(action, np.float32)
        if action.shape != (self.action_dim,):
            raise ValueError(f"action has the shape {action.shape}, expected ({self.action_dim},)")
        if np.isnan(action).any():
            raise ValueError(f"action must not contain NaN, got {action}")
        action = np.clip(action, -1.0, 1.0)
        if self._rescales:
            low, high = self.action_low, self.action_high
            action = low + 0.5 * (action + 1.0) * (high - low)
        return action


def standardise(env: gymnasium.Env) -> Standard:
    """Return ``env`` if it is a `Standard` environment, and a `Standard` wrapper of it otherwise.

    Raises:
        ValueError: its spaces are not boxes of one dimension.
    """
    return env if isinstance(env, Standard) else Standard(env)
