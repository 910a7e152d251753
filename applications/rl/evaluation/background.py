"""Evaluation beside training: an `Evaluator` in a process of its own.

It is asked with a copy of an agent's weights, makes an agent of them on the CPU, and answers in the
order of the questions, while who asked goes on.  Seeds of the episodes, rows of the batches and the
one thread are those of `applications.rl.evaluation.evaluator`, so on a CPU the numbers are the same
bit by bit.

The process ends when its connection closes, be it in the midst of an episode: a training that is
killed leaves none behind.
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

from applications.rl.agents.base import Agent
from applications.rl.environments.workers import WorkerProcess
from applications.rl.errors import RunError
from applications.rl.evaluation.evaluator import Evaluation, Evaluator
from flows.training import prepare_process


class PendingEvaluation:
    """An evaluation that was asked for.

    Arguments:
        collect: has the process's next answer given to who asked first; its argument says whether
            to wait for one, its result whether there was one.
    """

    def __init__(self, collect: Callable[[bool], bool]) -> None:
        self._collect = collect
        self.outcome: Evaluation | RunError | None = None

    def arrived(self) -> bool:
        """Whether `result` need not wait."""
        while self.outcome is None and self._collect(False):
            pass
        return self.outcome is not None

    def result(self) -> Evaluation:
        """The evaluation; waits for it.

        Raises:
            RunError: an environment failed, or the process died.
        """
        while self.outcome is None:
            self._collect(True)
        if isinstance(self.outcome, RunError):
            raise self.outcome
        return self.outcome


class BackgroundEvaluator(WorkerProcess):
    """An `Evaluator` that answers later; close it.

    Arguments:
        factory, environments, workers: as for `Evaluator`; the factory must be picklable.

    Raises:
        ValueError: the factory cannot be pickled.
    """

    option = "background_eval"
    daemon = False  # there may be workers

    def __init__(
        self,
        factory: Callable[[], gymnasium.Env],
        *,
        environments: int = 4,
        workers: int = 0,
    ) -> None:
        self._asked: deque[PendingEvaluation] = deque()
        super().__init__(_serve, factory, environments, workers)

    def __call__(self, agent: Agent, *, episodes: int, seed: int) -> PendingEvaluation:
        """Ask for what an `Evaluator` would return or raise, of the weights that ``agent`` has now.

        Raises:
            RunError: the process could not begin, or died.
        """
        made_of = (type(agent), agent.config, agent.observation_dim, agent.action_dim)
        # `cpu` alone would leave a view of what seeds that are trained together share.
        state = {name: value.cpu().clone() for name, value in agent.state_dict().items()}
        weights = io.BytesIO()
        torch.save(state, weights)
        self.send((made_of, weights.getvalue(), episodes, seed))
        self._asked.append(PendingEvaluation(self._collect))
        return self._asked[-1]

    def _collect(self, wait: bool) -> bool:
        if not wait and not self.ready():
            return False
        answer = self._asked.popleft()
        try:
            answer.outcome = self.receive()
        except RunError as error:
            answer.outcome = error
        return True


def _serve(
    factory: Callable[[], gymnasium.Env], environments: int, workers: int, connection: Connection
) -> None:
    """Be the process until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when the training that got it too does
    prepare_process()
    torch.set_num_threads(1)
    questions: queue.SimpleQueue[Any] = queue.SimpleQueue()
    answer: tuple[str | None, Evaluation | None]
    try:
        with Evaluator(factory, environments=environments, workers=workers) as evaluator:
            connection.send((None, evaluator.spaces))
            threading.Thread(target=_read, args=(connection, questions), daemon=True).start()
            while True:
                (kind, *arguments), weights, episodes, seed = questions.get()
                try:
                    agent = kind(*arguments)
                    agent.load_state_dict(torch.load(io.BytesIO(weights), weights_only=True))
                    answer = (None, evaluator(agent, episodes=episodes, seed=seed))
                except Exception:  # of this agent; the next one may do better
                    answer = (traceback.format_exc(), None)
                connection.send(answer)
    except BrokenPipeError:
        return
    except Exception:  # of the environments, which are made here
        connection.send((traceback.format_exc(), None))


def _read(connection: Connection, questions: queue.SimpleQueue[Any]) -> None:
    """Take questions as they come, so that nobody waits to ask; end the process with them."""
    while True:
        try:
            questions.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)  # an episode may last, and nobody waits for it
