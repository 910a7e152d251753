"""The sequence of a task's episodes, which a killed run resumes exactly.

The randomness of episode i is a function of (seed, i); see
`applications.rl.environments.reproducible`.  So no snapshot of a simulator is needed, which most
cannot give: the state of a run within an episode is its seed, the number of the episode and the
actions played so far, and on loading the actions are played again.  The resulting observation must
equal the stored one bit for bit, which reveals another physics engine.  Where the environment has
randomness of its own, so that not even two plays now are equal, a new episode begins instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from applications.rl.environments.reproducible import episode_seed
from applications.rl.environments.tasks import Task, make_environment
from applications.rl.environments.wrappers import Observation, standardise
from flows.training import CheckpointError

MORE_PLAYS = 4
"""Plays of an episode that must equal the first one if the environment repeats itself."""


class Transition(NamedTuple):
    """One step of an episode, as it enters a replay.

    Attributes:
        observation, next_observation: observations before and after the step, (d,) float32; at the
            end of an episode the next observation is the last one of that episode.
        action: (d_a,) float32, clipped to [−1, 1], as the environment received it.
        reward: reward r of the step.
        mask: 0 if the episode truly ended, so that nothing is bootstrapped; 1 at a time limit.
        terminal: 1 if the episode ended, for whatever reason.
        success: whether the environment reports success in this step.
        done: ``terminal`` as a bool.
        told: whether the environment told success.
    """

    observation: Observation
    action: NDArray[np.float32]
    reward: float
    mask: float
    terminal: float
    next_observation: Observation
    success: bool
    done: bool
    told: bool = True


class Episodes:
    """Plays the episodes of a task one after the other; a new one begins when one has ended.

    Arguments:
        task: a task, or a function that makes an environment with box spaces of one dimension.
        seed: seed that determines, with the number of an episode, all randomness of the episode.

    Attributes:
        env: the environment, wrapped as `Standard`.
        episode: number of the running episode, from 0.
        observation: current observation, (d,) float32.
    """

    def __init__(self, task: Task | Callable[[], gymnasium.Env], seed: int) -> None:
        self.env = make_environment(task) if isinstance(task, Task) else standardise(task())
        self.seed = seed
        self.observation: Observation
        self._actions: list[NDArray[np.float32]]
        self._begin(0)

    @property
    def steps(self) -> int:
        """Number of actions played in the running episode."""
        return len(self._actions)

    def step(self, action: ArrayLike) -> Transition:
        """Play ``action`` of shape (d_a,); it is clipped to [−1, 1].

        Raises:
            ValueError: the action has another shape or contains NaN.
        """
        before = self.observation
        played = np.clip(np.array(action, np.float32), -1.0, 1.0)
        after, reward, terminated, truncated, info = self.env.step(played)
        done = terminated or truncated
        self._actions.append(played)
        self.observation = after
        if done:
            self._begin(self.episode + 1)
        return Transition(
            observation=before,
            action=played,
            reward=reward,
            mask=1.0 - terminated,
            terminal=float(done),
            next_observation=after,
            success=info["success"],
            done=done,
            told=info["success_told"],
        )

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint: seed, episode, its actions (T, d_a), observation."""
        actions = np.array(self._actions, np.float32).reshape(-1, self.env.action_dim)
        return {
            "seed": self.seed,
            "episode": self.episode,
            "actions": torch.from_numpy(actions),
            "observation": torch.from_numpy(self.observation.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume the episode in ``state`` by playing its actions again.

        An environment that does not even repeat itself now begins the next episode, with a warning:
        no episode of it can be resumed.

        Raises:
            CheckpointError: the actions do not lead to the stored observation, because the
                environment or the version of its physics engine is another one.
        """
        actions, episode = state["actions"].numpy(), state["episode"]
        if actions.shape[1] != self.env.action_dim:
            raise CheckpointError(
                f"the stored episode has actions of {actions.shape[1]} components, but the "
                f"environment takes {self.env.action_dim}"
            )
        self.seed = state["seed"]
        seen = self._play(episode, actions)
        reason = self._differs(state, len(seen) - 1)
        if not reason:
            return
        if all(_equal(seen, self._play(episode, actions)) for _ in range(MORE_PLAYS)):
            raise CheckpointError(reason)
        warnings.warn(
            f"episode {episode} cannot be resumed, and a new one begins: the environment draws "
            "randomness that reset(seed=...) does not decide, so that two plays of equal actions "
            "differ; the resumed run is not the one that would have been without interruption",
            stacklevel=2,
        )
        self._begin(episode + 1)

    def _play(self, episode: int, actions: NDArray[np.float32]) -> list[Observation]:
        """Play an episode from its beginning, at most to its end; return the observations."""
        self._begin(episode)
        seen = [self.observation]
        for action in actions:
            taken = self.step(action)
            seen.append(taken.next_observation)
            if taken.done:
                break
        return seen

    def _differs(self, state: dict[str, Any], played: int) -> str:
        """Say how the episode just played differs from the one in ``state``; '' if it does not."""
        episode, count = state["episode"], len(state["actions"])
        expected = state["observation"].numpy()
        if self.episode != episode:
            return (
                f"episode {episode} ended after {played} of its {count} stored actions: the "
                "environment is not the one of the checkpoint"
            )
        if np.array_equal(self.observation, expected):
            return ""
        apart = (
            f"the largest difference is {np.abs(self.observation - expected).max():.3g}"
            if expected.shape == self.observation.shape
            else f"shapes are {self.observation.shape} and {expected.shape}"
        )
        return (
            f"playing the {count} stored actions of episode {episode} again "
            f"leads to another observation than the stored one ({apart}): the environment or "
            "the version of its physics engine differs from the checkpoint's, or it draws "
            "randomness that reset(seed=...) does not decide"
        )

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def _begin(self, episode: int) -> None:
        self.episode = episode
        self._actions = []
        self.observation = reset_seeded(self.env, episode_seed(self.seed, episode))


def _equal(left: Sequence[Observation], right: Sequence[Observation]) -> bool:
    return len(left) == len(right) and all(map(np.array_equal, left, right))


def reset_seeded(env: gymnasium.Env, seed: int) -> Observation:
    """Begin an episode of a `Standard` environment that depends on ``seed`` in [0, 2³²) alone.

    Returns:
        the first observation, (d,) float32.
    """
    return env.reset(seed=seed)[0]
