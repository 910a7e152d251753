"""Collecting transitions online: the agent acts in its environment and the replay grows.

The agent emits a chunk of actions that is executed whole; the rest of a chunk is dropped when the
episode ends.  Each transition enters the replay with terminal = done, and with mask = 0 only if the
state was terminated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from applications.rl.agents.base import Agent
from applications.rl.data.replay import Replay
from applications.rl.environments.episodes import Episodes


class OnlineCollector:
    """Lets an agent act in one environment and adds its transitions to a replay.

    Arguments:
        episodes: the episodes in which the agent acts.
        replay: a replay with room for the transitions to come.
        random_steps: number of first steps in which actions are random, uniform in [-1, 1].

    Attributes:
        steps: number of environment steps taken.
        ended: number of episodes that have ended.
        last: return, length and success of the latest episode that ended, empty before.
    """

    def __init__(self, episodes: Episodes, replay: Replay, *, random_steps: int = 0) -> None:
        self.episodes, self.replay, self.random_steps = episodes, replay, random_steps
        self.steps = 0
        self.ended = 0
        self.last: dict[str, float] = {}
        self._queue: list[np.ndarray] = []
        self._reward, self._length = 0.0, 0

    def step(self, agent: Agent, generator: torch.Generator) -> None:
        """Take one environment step; a new chunk is drawn where the last one is used up."""
        if self.steps < self.random_steps:
            uniform = torch.rand(agent.action_dim, generator=generator, device=generator.device)
            self._queue = [(2 * uniform - 1).cpu().numpy()]
        elif not self._queue:
            observation = torch.from_numpy(self.episodes.observation)[None]
            chunk = agent.act(observation.to(generator.device), generator)[0]
            self._queue = list(chunk.cpu().numpy())
        taken = self.episodes.step(self._queue.pop(0))
        self.replay.add(
            taken.observation,
            taken.action,
            taken.reward,
            taken.mask,
            taken.terminal,
            taken.next_observation,
        )
        self.steps += 1
        self._reward += taken.reward
        self._length += 1
        if taken.done:
            self._queue.clear()
            self.ended += 1
            self.last = {
                "online/return": self._reward,
                "online/length": float(self._length),
            }
            if taken.told:
                self.last["online/success"] = float(taken.success)
            self._reward, self._length = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the collection as plain data; the replay has a state of its own."""
        return {
            "episodes": self.episodes.state_dict(),
            "steps": self.steps,
            "ended": self.ended,
            "last": dict(self.last),
            "queue": [[float(a) for a in action] for action in self._queue],
            "reward": self._reward,
            "length": self._length,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from ``state_dict``; the running episode is played again up to there.

        Where the environment cannot repeat it, a new episode has begun, and the interrupted one
        ends in the replay, which must have been restored before.

        Raises:
            CheckpointError: the environment does not repeat the stored episode.
        """
        self.episodes.load_state_dict(state["episodes"])
        self.steps, self.ended, self.last = state["steps"], state["ended"], dict(state["last"])
        self._queue = [np.array(action, np.float32) for action in state["queue"]]
        self._reward, self._length = state["reward"], state["length"]
        if self.episodes.episode != state["episodes"]["episode"]:
            self.replay.end_episode()
            self._queue.clear()
            self._reward, self._length = 0.0, 0
