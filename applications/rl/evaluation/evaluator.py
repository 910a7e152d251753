"""How often a policy succeeds: episodes played in several environments at once.

Protocol.  A chunk of actions is executed whole, without a look at what happens meanwhile, and cut
only by the end of the episode; an episode is a success if ``info["success"]`` holds at its last
step.

Reproducibility.  Episode i is begun from a seed and played with noise from a generator that are
functions of (seed, i) alone, and free environments take the next episode, so which environment
plays it does not matter.  Neither does how many there are: a matrix product may round a row
differently in a batch of another size, and one bit grows to another trajectory, so observations
always go through the policy in batches of ``BLOCK`` rows, that of episode i in row i mod BLOCK.
Environments in worker processes give the same numbers as those in this one.  For the same reason,
and because more would only wait for each other on so few rows, one thread computes the policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

import gymnasium
import numpy as np
import torch
from torch import Tensor

from applications.rl.agents.base import Agent
from applications.rl.environments.reproducible import episode_seed
from applications.rl.environments.spaces import Spaces, check_spaces
from applications.rl.environments.workers import (
    ChunkResult,
    LocalEnvironment,
    RemoteEnvironment,
    Watch,
)
from applications.rl.evaluation.statistics import wilson_interval

BLOCK = 16
"""Rows in a batch of observations; a constant of the results, see the module docstring."""

Factory = Callable[[], gymnasium.Env]


@dataclass(frozen=True)
class Evaluation:
    """What N episodes came to, in the order of their numbers.

    Attributes:
        successes: whether each succeeded at its last step.
        returns: undiscounted sums of rewards.
        lengths: environment steps.
    """

    successes: tuple[bool, ...]
    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def episodes(self) -> int:
        """N."""
        return len(self.successes)

    @property
    def success(self) -> float:
        """Fraction of successes."""
        return sum(self.successes) / self.episodes

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the probability of success."""
        return wilson_interval(sum(self.successes), self.episodes)

    @property
    def mean_return(self) -> float:
        """Mean undiscounted return."""
        return math.fsum(self.returns) / self.episodes

    @property
    def mean_length(self) -> float:
        """Mean number of environment steps."""
        return sum(self.lengths) / self.episodes

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"success {self.success:.1%} [{low:.1%}, {high:.1%}] of {self.episodes} episodes, "
            f"return {self.mean_return:.1f}, length {self.mean_length:.0f}"
        )


class Evaluator:
    """Environments that stay open for one evaluation after another; close it, or use ``with``.

    Arguments:
        factory: makes an environment; picklable if there are workers.
        environments: how many play at once in this process.
        workers: if above 0, play in that many processes instead, one environment each.
        watch: called with the environment after each reset and each step (in this process only).

    Raises:
        ValueError: numbers out of range, or a watch over workers.
    """

    def __init__(
        self,
        factory: Factory,
        *,
        environments: int = 4,
        workers: int = 0,
        watch: Watch | None = None,
    ) -> None:
        if environments < 1:
            raise ValueError(f"environments must be at least 1, got {environments}")
        if workers < 0 or (workers and watch is not None):
            raise ValueError(f"workers must be at least 0, and 0 with a watch, got {workers}")
        self.lanes: list[LocalEnvironment | RemoteEnvironment] = []
        try:
            for _ in range(workers or environments):
                self.lanes.append(
                    RemoteEnvironment(factory) if workers else LocalEnvironment(factory, watch)
                )
        except BaseException:
            self.close()
            raise

    @property
    def spaces(self) -> Spaces:
        """Those of the environments."""
        return self.lanes[0].spaces

    def __call__(
        self,
        agent: Agent,
        *,
        episodes: int,
        seed: int,
        first: int = 0,
        progress: Callable[[int, bool], None] | None = None,
    ) -> Evaluation:
        """Play ``episodes`` episodes with ``agent``.

        Arguments:
            seed: of the starts and of the policy's noise; other seeds give independent episodes.
            first: number of the first episode.
            progress: called with the number of an episode and its success as each one ends.

        Raises:
            ValueError: no episodes, or an environment whose spaces are not the agent's.
            RunError: an environment failed in a worker.
        """
        if episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {episodes}")
        check_spaces(self.spaces, agent, "the agent")
        training, threads = agent.training, torch.get_num_threads()
        agent.eval()
        torch.set_num_threads(1)
        try:
            results = self._play(agent, range(first, first + episodes), seed, progress)
        finally:
            agent.train(training)
            torch.set_num_threads(threads)
        legs = [results[index] for index in sorted(results)]
        return Evaluation(
            tuple(leg.success for leg in legs),
            tuple(leg.reward for leg in legs),
            tuple(leg.steps for leg in legs),
        )

    def _play(
        self,
        agent: Agent,
        episodes: range,
        seed: int,
        progress: Callable[[int, bool], None] | None,
    ) -> dict[int, ChunkResult]:
        """The episodes by number, each as one leg."""
        device = next(agent.parameters()).device
        results: dict[int, ChunkResult] = {}
        waiting = iter(episodes)
        playing: dict[int, _Episode] = {}  # by number of the lane
        while len(results) < len(episodes):
            free = (number for number in range(len(self.lanes)) if number not in playing)
            begun = dict(zip(free, waiting))  # noqa: B905  (no lane, no episode taken)
            for number, index in begun.items():
                self.lanes[number].send_begin(episode_seed(seed, index, 0))
            for number, index in begun.items():
                generator = torch.Generator(device).manual_seed(episode_seed(seed, index, 1))
                playing[number] = _Episode(index, generator, self.lanes[number].receive())
            chunks = _act(agent, playing, device)
            for number, chunk in chunks.items():
                self.lanes[number].send_chunk(chunk)
            for number in chunks:
                episode = playing[number]
                episode.leg = episode.leg.then(self.lanes[number].receive())
                if episode.leg.done:
                    results[episode.index] = playing.pop(number).leg
                    if progress is not None:
                        progress(episode.index, episode.leg.success)
        return results

    def close(self) -> None:
        """Close the environments and end the workers."""
        for lane in self.lanes:
            lane.close()
        self.lanes = []

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def evaluate(
    agent: Agent,
    factory: Factory,
    *,
    episodes: int = 50,
    seed: int = 0,
    environments: int = 4,
    workers: int = 0,
) -> Evaluation:
    """One evaluation in environments of its own; see `Evaluator`."""
    environments = min(environments, max(1, episodes))
    workers = min(workers, episodes)
    with Evaluator(factory, environments=environments, workers=workers) as evaluator:
        return evaluator(agent, episodes=episodes, seed=seed)


@dataclass
class _Episode:
    index: int
    generator: torch.Generator
    leg: ChunkResult


def _act(
    agent: Agent, playing: Mapping[int, _Episode], device: torch.device
) -> dict[int, np.ndarray]:
    """A chunk (h, d_a) for every lane, episode i in row i mod BLOCK of some batch."""
    blocks: list[dict[int, int]] = []
    for number, episode in playing.items():
        row = episode.index % BLOCK
        block = next((block for block in blocks if row not in block), None)
        if block is None:
            block = {}
            blocks.append(block)
        block[row] = number
    chunks: dict[int, np.ndarray] = {}
    for block in blocks:
        observations = np.zeros((BLOCK, agent.observation_dim), dtype=np.float32)
        noise: dict[str, Tensor] = {}
        for row, number in block.items():
            observations[row] = playing[number].leg.observation
            for name, value in agent.act_noise(1, playing[number].generator).items():
                if name not in noise:
                    noise[name] = value.new_zeros(BLOCK, *value.shape[1:])
                noise[name][row] = value[0]
        actions = agent.act(torch.from_numpy(observations).to(device), noise).cpu().numpy()
        chunks |= {number: actions[row] for row, number in block.items()}
    return chunks
