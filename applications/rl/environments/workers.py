"""Environments that play one chunk of actions at a time, in this process or in a worker process.

`LocalEnvironment` and `RemoteEnvironment` have the same methods.  The caller first calls all
``send_...`` methods and then all ``receive`` methods, so that worker processes run at the same
time.  Workers are spawned, not forked: an environment, a GPU or a thread pool of this process would
not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import util
from multiprocessing.connection import Connection
from typing import Any

import gymnasium
import numpy as np

from applications.common.errors import RunError
from applications.rl.environments.spaces import Spaces, spaces_of
from applications.rl.environments.wrappers import standardise

Watch = Callable[[gymnasium.Env], None]


@dataclass(frozen=True)
class ChunkResult:
    """The outcome of some consecutive steps of an episode.

    Attributes:
        observation: observation after the steps (obs,), float32.
        reward: undiscounted sum of their rewards.
        steps: number of steps.
        success: ``info["success"]`` of the last step.
        done: whether the last step ended the episode.
        told: whether the environment told success in any of the steps.
    """

    observation: np.ndarray
    reward: float
    steps: int
    success: bool
    done: bool
    told: bool = False

    @classmethod
    def empty(cls, observation: np.ndarray | None = None) -> ChunkResult:
        """Return the result of no steps, as after a reset."""
        return cls(
            np.zeros(0, np.float32) if observation is None else observation, 0.0, 0, False, False
        )

    def then(self, other: ChunkResult) -> ChunkResult:
        """Join this result with the result of the steps that follow."""
        reward, steps = self.reward + other.reward, self.steps + other.steps
        told = self.told or other.told
        return ChunkResult(other.observation, reward, steps, other.success, other.done, told)


class LocalEnvironment:
    """Plays episodes in an environment of this process.

    Arguments:
        factory: function that makes the environment.
        watch: called with the environment after each reset and each step.
    """

    def __init__(self, factory: Callable[[], gymnasium.Env], watch: Watch | None = None) -> None:
        self.environment = standardise(factory())
        self.watch = watch
        self._reply = ChunkResult.empty()

    @property
    def spaces(self) -> Spaces:
        """Sizes of the environment's observations and actions."""
        return spaces_of(self.environment)

    def send_begin(self, seed: int) -> None:
        """Begin the episode of ``seed``; `receive` then returns a result of no steps."""
        observation, _ = self.environment.reset(seed=seed)
        self._look()
        self._reply = ChunkResult.empty(observation)

    def send_chunk(self, chunk: np.ndarray) -> None:
        """Execute the actions (h, d_a) until the episode ends."""
        result = ChunkResult.empty()
        for action in chunk:
            observation, reward, terminated, truncated, info = self.environment.step(action)
            self._look()
            done = terminated or truncated
            step = ChunkResult(observation, reward, 1, info["success"], done, info["success_told"])
            result = result.then(step)
            if done:
                break
        self._reply = result

    def receive(self) -> ChunkResult:
        """Return the result of the last ``send_begin`` or ``send_chunk``."""
        return self._reply

    def close(self) -> None:
        """Close the environment."""
        self.environment.close()

    def _look(self) -> None:
        if self.watch is not None:
            self.watch(self.environment)


class WorkerProcess:
    """A process that answers messages in order; its first message is the spaces it plays in.

    Arguments:
        serve: function that the process runs, with ``arguments`` and its end of the connection; it
            sends pairs (traceback or None, value).
        arguments: picklable arguments; a function must be at the top level of a module.

    Attributes:
        option: name of the option that asks for the process, for error messages.
        daemon: whether the process ends with this one; a daemon can start no processes itself.

    Raises:
        ValueError: the arguments cannot be pickled.
        RunError: (by any method) the process failed, with its traceback, or died.
    """

    option: str
    daemon = True

    def __init__(self, serve: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(*arguments, other), daemon=self.daemon)
        try:
            self._process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            self._connection.close()
            raise ValueError(
                f"{self.option}: what makes the environment cannot be sent to a worker process "
                f"({error}); a function at the top level of a module can"
            ) from error
        finally:
            other.close()
        # Python's exit waits for processes that are no daemons, so an open one is ended before.
        util.Finalize(self, self._connection.close, exitpriority=0)
        self._spaces: Spaces | None = None

    @property
    def spaces(self) -> Spaces:
        """Sizes of observations and actions; the first access waits for the process."""
        if self._spaces is None:
            self._spaces = self.receive()
        return self._spaces

    def send(self, message: Any) -> None:
        """Send a message to the process."""
        _ = self.spaces  # its first message
        try:
            self._connection.send(message)
        except OSError:
            raise self._died() from None

    def ready(self) -> bool:
        """Say whether `receive` would return at once."""
        return self._connection.poll()

    def receive(self) -> Any:
        """Return the answer to the oldest message without one; waits for it."""
        try:
            error, value = self._connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if error is not None:
            raise RunError(f"{self.option}: an evaluation failed in a worker process:\n{error}")
        return value

    def close(self) -> None:
        """End the process."""
        self._connection.close()  # the process ends when its connection closes
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _died(self) -> RunError:
        self._process.join(timeout=5)
        code = self._process.exitcode
        advice = (
            "was memory short? it holds environments of its own"
            if code == -9
            else "it may have said why; a script that starts processes needs "
            "if __name__ == '__main__'"
        )
        return RunError(f"{self.option}: a worker process ended with exit code {code}; {advice}")


class RemoteEnvironment(WorkerProcess):
    """Plays episodes in an environment of a worker process; has `LocalEnvironment`'s methods.

    Arguments:
        factory: function that makes the environment.

    Raises:
        ValueError, RunError: see `WorkerProcess`.
    """

    option = "workers"

    def __init__(self, factory: Callable[[], gymnasium.Env]) -> None:
        super().__init__(_serve, factory)

    def send_begin(self, seed: int) -> None:
        """Begin the episode of ``seed``."""
        self.send(("send_begin", seed))

    def send_chunk(self, chunk: np.ndarray) -> None:
        """Execute the actions (h, d_a) until the episode ends."""
        self.send(("send_chunk", chunk))


def _serve(factory: Callable[[], gymnasium.Env], connection: Connection) -> None:
    """Run a worker process until the connection closes."""
    try:
        environment = LocalEnvironment(factory)
        connection.send((None, environment.spaces))
        while True:
            method, argument = connection.recv()
            getattr(environment, method)(argument)
            connection.send((None, environment.receive()))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except Exception:
        connection.send((traceback.format_exc(), None))
