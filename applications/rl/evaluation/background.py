"""Background evaluation: an `EpisodeEvaluator` in a worker process, while training goes on.

A request holds a copy of an agent's weights.  The worker makes an agent of them on the CPU,
evaluates it, and answers the requests in order.  Seeds of the episodes, rows of the batches and the
single thread are as in `applications.rl.evaluation.evaluator`, so on a CPU the numbers are the same
bit by bit.

The worker ends when its connection closes, even within an episode, so a training that is killed
leaves no process behind.
"""

from __future__ import annotations

import io
import os
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import gymnasium
import torch

from applications.common.errors import RunError
from applications.rl.agents.base import Agent
from applications.rl.agents.pretrained import PretrainedActor, put_in_place
from applications.rl.environments.workers import WorkerProcess
from applications.rl.evaluation.evaluator import EpisodeEvaluator, Evaluation
from flows.training import prepare_process


class PendingEvaluation:
    """An evaluation that a worker process has been asked for.

    Arguments:
        collect: function ``collect(wait) -> bool`` that reads the worker's next result, hands it to
            the oldest pending evaluation, and says whether there was one.

    Attributes:
        outcome: the evaluation or the error, None while it is pending.
    """

    def __init__(self, collect: Callable[[bool], bool]) -> None:
        self._collect = collect
        self.outcome: Evaluation | RunError | None = None

    def arrived(self) -> bool:
        """Say whether `result` would return at once."""
        while self.outcome is None and self._collect(False):
            pass
        return self.outcome is not None

    def result(self) -> Evaluation:
        """Wait for the evaluation and return it.

        Raises:
            RunError: an environment failed, or the worker process died.
        """
        while self.outcome is None:
            self._collect(True)
        if isinstance(self.outcome, RunError):
            raise self.outcome
        return self.outcome


class BackgroundEvaluator(WorkerProcess):
    """Evaluates agents in a worker process, without waiting for the results; close it after use.

    Arguments:
        factory, environments, workers: as for `EpisodeEvaluator`; the factory must be picklable.

    Raises:
        ValueError: the factory cannot be pickled.
    """

    option = "background_eval"
    daemon = False  # the process may start workers itself

    def __init__(
        self,
        factory: Callable[[], gymnasium.Env],
        *,
        environments: int = 4,
        workers: int = 0,
    ) -> None:
        self._pending: deque[PendingEvaluation] = deque()
        super().__init__(_serve, factory, environments, workers)

    def __call__(self, agent: Agent, *, episodes: int, seed: int) -> PendingEvaluation:
        """Ask for an evaluation of ``agent`` with its present weights; see `EpisodeEvaluator`.

        Raises:
            RunError: the worker process could not start, or died.
        """
        made_of = (type(agent), agent.config, agent.observation_dim, agent.action_dim)
        behaviour = getattr(agent, "behaviour", None)
        source = behaviour.source if isinstance(behaviour, PretrainedActor) else None
        # `cpu` alone would leave a view of the storage that stacked seeds share.
        state = {name: value.cpu().clone() for name, value in agent.state_dict().items()}
        weights = io.BytesIO()
        torch.save(state, weights)
        self.send((made_of, source, weights.getvalue(), episodes, seed))
        self._pending.append(PendingEvaluation(self._collect))
        return self._pending[-1]

    def _collect(self, wait: bool) -> bool:
        if not wait and not self.ready():
            return False
        pending = self._pending.popleft()
        try:
            pending.outcome = self.receive()
        except RunError as error:
            pending.outcome = error
        return True


def _serve(
    factory: Callable[[], gymnasium.Env], environments: int, workers: int, connection: Connection
) -> None:
    """Run the worker process until the connection closes."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the training too, whose end closes this
    prepare_process()
    torch.set_num_threads(1)
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    answer: tuple[str | None, Evaluation | None]
    try:
        with EpisodeEvaluator(factory, environments=environments, workers=workers) as evaluator:
            connection.send((None, evaluator.spaces))
            threading.Thread(target=_read, args=(connection, requests), daemon=True).start()
            while True:
                (kind, *arguments), source, weights, episodes, seed = requests.get()
                try:
                    agent = kind(*arguments)
                    if source is not None:
                        put_in_place(agent, PretrainedActor(source))
                    agent.load_state_dict(torch.load(io.BytesIO(weights), weights_only=True))
                    answer = (None, evaluator(agent, episodes=episodes, seed=seed))
                except Exception:  # in this evaluation; the next one may succeed
                    answer = (traceback.format_exc(), None)
                connection.send(answer)
    except BrokenPipeError:
        return
    except Exception:  # in making the environments
        connection.send((traceback.format_exc(), None))


def _read(connection: Connection, requests: queue.SimpleQueue[Any]) -> None:
    """Accept requests at once, so that sending never waits; end the process when they end."""
    while True:
        try:
            requests.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)  # the running episode may last, and nobody waits for it
