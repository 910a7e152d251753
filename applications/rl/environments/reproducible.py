"""Reproducible episodes: all randomness of an environment follows from one seed.

OGBench (1.2) does not make an episode reproducible by ``reset(seed=...)`` alone, for two reasons:

* mazes draw start, goal and teleport noise from numpy's *global* generator, not from the seed;
* manipulation environments make a new ``action_space`` at every access, so that seeding it does
  nothing, and take two random actions at every reset, from which the goal's observation and the
  warm start of the physics solver follow.

`Reproducible` removes both.  An episode is then a function of its seed and its actions alone:
bitwise the same in every process, whatever was played before.
"""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import Any

import gymnasium
import numpy as np


class NumpyStream:
    """A random stream of its own for code that draws from numpy's global generator.

    Inside ``with`` the global generator continues this stream; at the end its outer state is
    restored.  Draws inside advance only the stream, draws outside only the outer state.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed(seed)

    def seed(self, seed: int | None) -> None:
        """Restart the stream from ``seed`` in [0, 2³²), or from the system's entropy if None."""
        self._inside = np.random.RandomState(seed).get_state()

    def __enter__(self) -> None:
        self._outside = np.random.get_state()
        np.random.set_state(self._inside)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._inside = np.random.get_state()
        np.random.set_state(self._outside)


class Reproducible(gymnasium.Wrapper):
    """Wraps an environment so that its episodes depend on ``reset(seed=...)`` and actions alone.

    Without a seed, the randomness of an episode continues that of the previous one, as usual.

    Arguments:
        env: any environment.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        _fix_action_space(env.unwrapped)
        self.stream = NumpyStream()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; ``seed`` in [0, 2³²) decides all of its randomness."""
        if seed is not None:
            self.stream.seed(seed)
            self.env.unwrapped.action_space.seed(seed)
        with self.stream:
            return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take one step."""
        with self.stream:
            return self.env.step(action)


def episode_seed(seed: int, *path: int) -> int:
    """Derive the seed of an episode, in [0, 2³²), from the seed of a run and a path of numbers.

    Seeds of different paths, of any lengths, are independent: numpy's ``SeedSequence`` hashes them.
    """
    return int(np.random.SeedSequence(seed, spawn_key=path).generate_state(1)[0])


def _fix_action_space(env: gymnasium.Env) -> None:
    """Keep one action space for ``env`` if its class makes a new one at every access."""
    with warnings.catch_warnings():  # of a precision lowered in making it
        warnings.simplefilter("ignore")
        space, again = env.action_space, env.action_space
    if space is again:
        return
    base = type(env)
    fixed = property(lambda self: space)
    env.__class__ = type(base.__name__, (base,), {"action_space": fixed, "__doc__": base.__doc__})
