"""Places where episodes are played: an environment in this process, or one in a process of its own.

Both take a chunk of actions at a time and are used alike, first all ``send``, then all ``receive``,
so that worker processes run side by side.  Workers are spawned, not forked: an environment, a GPU
or a thread pool of this process would not survive a fork.
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

from applications.rl.environments.spaces import Spaces, spaces_of
from applications.rl.environments.wrappers import standardise
from applications.rl.errors import RunError

Watch = Callable[[gymnasium.Env], None]


@dataclass(frozen=True)
class ChunkResult:
    """Some steps of an episode.

    Attributes:
        observation: after them (obs,), float32.
        reward: their undiscounted sum.
        steps: their number.
        success: ``info["success"]`` of the last one.
        done: whether it ended the episode.
    """

    observation: np.ndarray
    reward: float
    steps: int
    success: bool
    done: bool

    @classmethod
    def nothing(cls, observation: np.ndarray | None = None) -> ChunkResult:
        """No steps, as after a reset."""
        return cls(
            np.zeros(0, np.float32) if observation is None else observation, 0.0, 0, False, False
        )

    def then(self, other: ChunkResult) -> ChunkResult:
        """This leg and the one after it as one."""
        reward, steps = self.reward + other.reward, self.steps + other.steps
        return ChunkResult(other.observation, reward, steps, other.success, other.done)


class LocalEnvironment:
    """An environment in this process.

    Arguments:
        factory: makes it.
        watch: called with it after each reset and each step.
    """

    def __init__(self, factory: Callable[[], gymnasium.Env], watch: Watch | None = None) -> None:
        self.environment = standardise(factory())
        self.watch = watch
        self._reply = ChunkResult.nothing()

    @property
    def spaces(self) -> Spaces:
        """Those of the environment."""
        return spaces_of(self.environment)

    def send_begin(self, seed: int) -> None:
        """Begin the episode of that seed; `receive` then gives a leg of no steps."""
        observation, _ = self.environment.reset(seed=seed)
        self._look()
        self._reply = ChunkResult.nothing(observation)

    def send_chunk(self, chunk: np.ndarray) -> None:
        """Execute the actions (h, d_a) until the episode ends."""
        leg = ChunkResult.nothing()
        for action in chunk:
            observation, reward, terminated, truncated, info = self.environment.step(action)
            self._look()
            done = terminated or truncated
            leg = leg.then(ChunkResult(observation, reward, 1, info["success"], done))
            if done:
                break
        self._reply = leg

    def receive(self) -> ChunkResult:
        """What came of what was sent last."""
        return self._reply

    def close(self) -> None:
        """Close the environment."""
        self.environment.close()

    def _look(self) -> None:
        if self.watch is not None:
            self.watch(self.environment)


class WorkerProcess:
    """A process that answers messages in order, after it has told the spaces of its environments.

    Arguments:
        serve: what it does, with ``arguments`` and its end of the connection; it sends pairs
            (traceback or None, value).
        arguments: picklable, so of the functions only those at the top level of a module.

    Attributes:
        option: what asks for it, as errors name it.
        daemon: whether it ends with this process; if so, it has no processes of its own.

    Raises:
        ValueError: the arguments cannot be pickled.
        RunError: (by any method) it failed, with its own traceback, or died.
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
        # Python's exit waits for processes that are no daemons: one that nobody closed ends first.
        util.Finalize(self, self._connection.close, exitpriority=0)
        self._spaces: Spaces | None = None

    @property
    def spaces(self) -> Spaces:
        """Those of the environments; the first time waits for the process."""
        if self._spaces is None:
            self._spaces = self.receive()
        return self._spaces

    def send(self, message: Any) -> None:
        """Send a message."""
        _ = self.spaces  # its first message
        try:
            self._connection.send(message)
        except OSError:
            raise self._died() from None

    def ready(self) -> bool:
        """Whether `receive` need not wait."""
        return self._connection.poll()

    def receive(self) -> Any:
        """The answer to the first message that has none yet."""
        try:
            error, value = self._connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if error is not None:
            raise RunError(f"{self.option}: an evaluation failed in a worker process:\n{error}")
        return value

    def close(self) -> None:
        """End the process."""
        self._connection.close()  # which it takes for the end
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
    """A lane in a process of its own; methods as those of `LocalEnvironment`.

    Arguments:
        factory: makes the environment.

    Raises:
        ValueError, RunError: see `WorkerProcess`.
    """

    option = "workers"

    def __init__(self, factory: Callable[[], gymnasium.Env]) -> None:
        super().__init__(_serve, factory)

    def send_begin(self, seed: int) -> None:
        """Begin the episode of that seed."""
        self.send(("send_begin", seed))

    def send_chunk(self, chunk: np.ndarray) -> None:
        """Execute the actions (h, d_a) until the episode ends."""
        self.send(("send_chunk", chunk))


def _serve(factory: Callable[[], gymnasium.Env], connection: Connection) -> None:
    """Be the process of a worker until the connection closes."""
    try:
        lane = LocalEnvironment(factory)
        connection.send((None, lane.spaces))
        while True:
            method, argument = connection.recv()
            getattr(lane, method)(argument)
            connection.send((None, lane.receive()))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except Exception:
        connection.send((traceback.format_exc(), None))
