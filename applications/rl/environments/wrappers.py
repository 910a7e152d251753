"""A wrapper that gives every environment the conventions that agents rely on.

Observations are float32 vectors and actions are vectors in [−1, 1]^d.  An action outside is clipped
(an environment would accept it silently), and an affine map takes [−1, 1]^d to the range of the
environment.  Each step's ``info`` has ``success`` as a bool, and ``success_told``: whether the
environment told it under one of the names `SUCCESS`.  The reward may be made sparse,
r ← −1[r ≠ 0].  Episodes are reproducible, see `applications.rl.environments.reproducible`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from applications.common.errors import RunError
from applications.rl.environments.reproducible import Reproducible
from applications.rl.environments.spaces import bounded_vector_space, vector_space

Observation = NDArray[np.float32]

SUCCESS = ("success", "is_success", "task_success", "goal_achieved")
"""Keys of ``info`` under which environments tell success; the first that is there counts."""
MAX_STEPS = 4000
"""Number of steps after which an episode is cut where the environment sets no time limit."""


class Standard(gymnasium.Wrapper):
    """Wraps an environment so that it follows the conventions of the module docstring.

    Arguments:
        env: an environment whose spaces are boxes of one dimension; actions must be bounded.
        sparse: whether the reward becomes −1[r ≠ 0].

    Attributes:
        observation_dim, action_dim: sizes of an observation and an action.
        max_steps: number of steps after which an episode is cut; infinite if ``env`` has a limit.
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
        self._type = actions.dtype
        limit = getattr(env.spec, "max_episode_steps", None)
        self.max_steps: float = MAX_STEPS if limit is None else np.inf
        self._episode, self._steps = -1, 0
        self._rescales = bool((actions.low != -1.0).any() or (actions.high != 1.0).any())

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode; ``seed`` in [0, 2³²) decides all of its randomness.

        Raises:
            RunError: the environment failed, or its observation is not one of its space.
        """
        self._episode, self._steps = self._episode + 1, 0
        with self._failure_explained():
            observation, info = self.env.reset(seed=seed, options=options)
        return self._state(observation), info

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take one step by an action of shape (d,).

        Raises:
            ValueError: the action has another shape or contains NaN.
            RunError: the environment failed, or gave an observation or a reward of another kind
                than Gymnasium asks for; the message names environment, episode and step.
        """
        inner = self._inner(action)
        self._steps += 1
        with self._failure_explained():
            found = self.env.step(inner)
        if not isinstance(found, tuple) or len(found) != 5:
            got = f"{len(found)} values" if isinstance(found, tuple) else f"{found!r}"
            raise self._wrong(
                "step() must return observation, reward, terminated, truncated and info, got " + got
            )
        observation, reward, terminated, truncated, info = found
        numbers = np.asarray(reward)
        if numbers.size != 1 or numbers.dtype.kind not in "fiub":
            raise self._wrong(f"the reward must be a number, got {reward!r}")
        reward = float(numbers.item())
        if not np.isfinite(reward):
            raise self._wrong(f"the reward must be finite, got {reward}")
        if self.sparse:
            reward = -float(reward != 0.0)
        info = {} if info is None else info
        known = [name for name in SUCCESS if name in info]
        info["success_told"] = bool(known)
        info["success"] = bool(known) and bool(np.all(info[known[0]]))
        terminated, truncated = bool(np.all(terminated)), bool(np.all(truncated))
        if self._steps >= self.max_steps and not terminated:
            if not truncated:
                warnings.warn(
                    f"{self._name}: an episode was cut after {self.max_steps} steps, since the "
                    "environment sets no time limit; gymnasium.wrappers.TimeLimit sets one",
                    stacklevel=2,
                )
            truncated = True
        return self._state(observation), reward, terminated, truncated, info

    @property
    def _name(self) -> str:
        return getattr(self.spec, "id", None) or type(self.unwrapped).__name__

    def _wrong(self, reason: str) -> RunError:
        return RunError(
            f"environment {self._name}, episode {self._episode} of this process, step "
            f"{self._steps}: {reason}"
        )

    @contextmanager
    def _failure_explained(self) -> Iterator[None]:
        """Name environment, episode and step where the environment raises an error of its own."""
        try:
            yield
        except (RunError, ValueError, ImportError, OSError):
            raise
        except Exception as error:
            said = f"it failed with {type(error).__name__}: {error}"
            raise self._wrong(f"{said}; --resume continues a run from its checkpoint") from error

    def _state(self, observation: Any) -> Observation:
        state = np.array(observation, np.float32)
        if state.shape != (self.observation_dim,) and state.size == self.observation_dim:
            state = state.reshape(self.observation_dim)
        if state.shape != (self.observation_dim,):
            raise self._wrong(
                f"the observation has the shape {state.shape}, expected that of "
                f"observation_space, ({self.observation_dim},)"
            )
        if not np.isfinite(state).all():
            raise self._wrong(
                f"the observation must be finite, got {state}; an environment that gets there can "
                "end the episode the step before, by truncated=True"
            )
        return state

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
        if np.issubdtype(self._type, np.integer):
            action = np.rint(action).astype(self._type)
        return action


def standardise(env: gymnasium.Env) -> Standard:
    """Return ``env`` if it is a `Standard` environment, and a `Standard` wrapper of it otherwise.

    Raises:
        ValueError: its spaces are not boxes of one dimension.
    """
    return env if isinstance(env, Standard) else Standard(env)
