"""Evaluation of an agent: its success rate over episodes played in several environments at once.

Protocol.  A chunk of actions is executed whole, without looking at observations in between, and is
cut only by the end of the episode.  An episode is a success if ``info["success"]`` holds at its
last step.

Reproducibility.  The seed of episode i and the generator of its policy noise are functions of
(seed, i) alone.  A free environment takes the next episode, and it does not matter which
environment plays it.  The number of environments does not matter either: a matrix product may round
a row differently in a batch of another size, and one bit grows to another trajectory, so
observations always go through the policy in batches of ``BLOCK`` rows, with episode i in row i mod
BLOCK.  Environments in worker processes give the same numbers as environments in this process.  For
the same reason, and because several threads would only wait for each other on so few rows, one
thread computes the policy.
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
from applications.rl.environments.wrappers import Standard
from applications.rl.evaluation.statistics import wilson_interval

BLOCK = 16
"""Rows in a batch of observations; a constant of the results, see the module docstring."""

Factory = Callable[[], gymnasium.Env]


@dataclass(frozen=True)
class Evaluation:
    """Results of N episodes, in the order of their numbers.

    Attributes:
        successes: whether each episode succeeded at its last step.
        returns: undiscounted sum of the rewards of each episode.
        lengths: number of environment steps of each episode.
        told: whether the environment told success in any episode.
    """

    successes: tuple[bool, ...]
    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    told: bool = True

    @property
    def episodes(self) -> int:
        """Number N of episodes."""
        return len(self.successes)

    @property
    def success(self) -> float:
        """Fraction of successes; NaN where the environment tells none."""
        if not self.told:
            return math.nan
        return sum(self.successes) / self.episodes

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the probability of success; NaN where it is not told."""
        if not self.told:
            return math.nan, math.nan
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
        rate = f"success {self.success:.1%} [{low:.1%}, {high:.1%}] of"
        if not self.told:
            rate = "success not told by the environment,"
        return (
            f"{rate} {self.episodes} episodes, "
            f"return {self.mean_return:.1f}, length {self.mean_length:.0f}"
        )


class EpisodeEvaluator:
    """Evaluates agents in environments that stay open; close it, or use it in ``with``.

    Arguments:
        factory: function that makes an environment; it must be picklable if there are workers.
        environments: number of environments in this process that play at once.
        workers: number of worker processes with one environment each that play in their place,
            if above 0.
        watch: called with the environment after each reset and each step (in this process only).

    Raises:
        ValueError: a number is out of range, or ``watch`` is given with workers.
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
        self._environments: list[LocalEnvironment | RemoteEnvironment] = []
        try:
            for _ in range(workers or environments):
                self._environments.append(
                    RemoteEnvironment(factory) if workers else LocalEnvironment(factory, watch)
                )
        except BaseException:
            self.close()
            raise

    @property
    def spaces(self) -> Spaces:
        """Sizes of the environments' observations and actions."""
        return self._environments[0].spaces

    @property
    def environment(self) -> Standard | None:
        """One of the environments, None where all are in worker processes."""
        first = self._environments[0]
        return first.environment if isinstance(first, LocalEnvironment) else None

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
            agent: the agent; it is in evaluation mode meanwhile.
            episodes: number of episodes.
            seed: seed of the starts and the policy noise; another seed gives independent episodes.
            first: number of the first episode.
            progress: called with the number of an episode and its success as each one ends.

        Raises:
            ValueError: ``episodes`` is below 1, or the environment has other sizes than the agent.
            RunError: an environment failed in a worker process.
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
        played = [results[index] for index in sorted(results)]
        return Evaluation(
            tuple(result.success for result in played),
            tuple(result.reward for result in played),
            tuple(result.steps for result in played),
            any(result.told for result in played),
        )

    def _play(
        self,
        agent: Agent,
        episodes: range,
        seed: int,
        progress: Callable[[int, bool], None] | None,
    ) -> dict[int, ChunkResult]:
        """Play the episodes; return the result of each whole episode by its number."""
        device = next(agent.parameters()).device
        results: dict[int, ChunkResult] = {}
        waiting = iter(episodes)
        playing: dict[int, _Episode] = {}  # by index of the environment
        while len(results) < len(episodes):
            free = (place for place in range(len(self._environments)) if place not in playing)
            begun = dict(zip(free, waiting))  # noqa: B905  (without a place no episode is taken)
            for place, index in begun.items():
                self._environments[place].send_begin(episode_seed(seed, index, 0))
            for place, index in begun.items():
                generator = torch.Generator(device).manual_seed(episode_seed(seed, index, 1))
                playing[place] = _Episode(index, generator, self._environments[place].receive())
            chunks = _act(agent, playing, device)
            for place, chunk in chunks.items():
                self._environments[place].send_chunk(chunk)
            for place in chunks:
                episode = playing[place]
                episode.result = episode.result.then(self._environments[place].receive())
                if episode.result.done:
                    results[episode.index] = playing.pop(place).result
                    if progress is not None:
                        progress(episode.index, episode.result.success)
        return results

    def close(self) -> None:
        """Close the environments and end the workers."""
        for environment in self._environments:
            environment.close()
        self._environments = []

    def __enter__(self) -> EpisodeEvaluator:
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
    """Evaluate an agent in environments made for this call; see `EpisodeEvaluator`."""
    environments = min(environments, max(1, episodes))
    workers = min(workers, episodes)
    with EpisodeEvaluator(factory, environments=environments, workers=workers) as evaluator:
        return evaluator(agent, episodes=episodes, seed=seed)


@dataclass
class _Episode:
    """An episode being played: its number, the generator of its noise, its result so far."""

    index: int
    generator: torch.Generator
    result: ChunkResult


def _act(
    agent: Agent, playing: Mapping[int, _Episode], device: torch.device
) -> dict[int, np.ndarray]:
    """Choose a chunk (h, d_a) for every environment; episode i is in row i mod BLOCK of a batch."""
    blocks: list[dict[int, int]] = []
    for place, episode in playing.items():
        row = episode.index % BLOCK
        block = next((block for block in blocks if row not in block), None)
        if block is None:
            block = {}
            blocks.append(block)
        block[row] = place
    chunks: dict[int, np.ndarray] = {}
    for block in blocks:
        observations = np.zeros((BLOCK, agent.observation_dim), dtype=np.float32)
        noise: dict[str, Tensor] = {}
        for row, place in block.items():
            observations[row] = playing[place].result.observation
            for name, value in agent.act_noise(1, playing[place].generator).items():
                if name not in noise:
                    noise[name] = value.new_zeros(BLOCK, *value.shape[1:])
                noise[name][row] = value[0]
        actions = agent.act(torch.from_numpy(observations).to(device), noise).cpu().numpy()
        chunks |= {place: actions[row] for row, place in block.items()}
    return chunks
