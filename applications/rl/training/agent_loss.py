"""What a trainer minimises: an agent's loss on windows of the replay, and, online, the acting.

One update is one call.  With N offline updates, update i = 1, 2, ... belongs to

    i <= N:  the offline phase, step i;
    i > N:   the online phase, in which M - 1 + i - N environment steps have been taken before it,

where M is the online step from which there is one update per environment step.  ``Phases`` is
this correspondence.  The steps before M are taken in the first online update.  A step counts
offline updates and online environment steps together.

OnlineCollector.  The agent emits a chunk of actions that is executed whole; what is left of it is
dropped when the episode ends.  Each transition enters the replay with terminal = done and mask = 0
only if the state was terminated.

The target networks follow the weights of before the update, by ``before_update``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from applications.rl.agents.base import Agent, Noise
from applications.rl.data.replay import Batch, Replay
from applications.rl.environments.episodes import Episodes
from flows.training import SplitLoss


@dataclass(frozen=True)
class Phases:
    """Which updates are offline and which online, see the module docstring.

    Arguments:
        offline_steps: updates N on the data alone.
        online_steps: environment steps.
        start_training: the online step M of the first online update.

    Raises:
        ValueError: a number out of range.
    """

    offline_steps: int
    online_steps: int = 0
    start_training: int = 1

    def __post_init__(self) -> None:
        for name, least in (("offline_steps", 0), ("online_steps", 0), ("start_training", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if 0 < self.online_steps < self.start_training:
            raise ValueError(
                f"online_steps must be 0 or at least start_training={self.start_training}, at "
                f"which the updates begin, got {self.online_steps}"
            )

    @property
    def updates(self) -> int:
        """Updates in all."""
        return self.offline_steps + max(0, self.online_steps - self.start_training + 1)

    def online(self, update: int) -> int:
        """Environment steps taken by the end of ``update`` = 1, 2, ...; 0 offline."""
        after = update - self.offline_steps
        return self.start_training + after - 1 if after > 0 else 0

    def step(self, update: int) -> int:
        """Step of ``update``: offline updates and environment steps."""
        return min(update, self.offline_steps) + self.online(update)

    def phase(self, update: int) -> str:
        """``"offline"`` or ``"online"``."""
        return "online" if update > self.offline_steps else "offline"


class OnlineCollector:
    """An agent at work in one environment, whose transitions enter the replay.

    Arguments:
        episodes: where it acts.
        replay: with room for what comes.

    Attributes:
        steps: environment steps taken.
        last: return, length and success of the episode that ended last, empty before.
    """

    def __init__(self, episodes: Episodes, replay: Replay) -> None:
        self.episodes, self.replay = episodes, replay
        self.steps = 0
        self.ended = 0
        self.last: dict[str, float] = {}
        self._queue: list[np.ndarray] = []
        self._reward, self._length = 0.0, 0

    def step(self, agent: Agent, generator: torch.Generator) -> None:
        """One environment step; a new chunk is drawn where the last is used up."""
        if not self._queue:
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
                "online/success": float(taken.success),
            }
            self._reward, self._length = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as plain data; the replay has its own."""
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
        """Restore what ``state_dict`` gave; the running episode is played again up to there.

        Raises:
            ValueError: the environment does not repeat itself.
        """
        self.episodes.load_state_dict(state["episodes"])
        self.steps, self.ended, self.last = state["steps"], state["ended"], dict(state["last"])
        self._queue = [np.array(action, np.float32) for action in state["queue"]]
        self._reward, self._length = state["reward"], state["length"]


class AgentLoss(SplitLoss):
    """The loss of an agent as ``flows.training.trainer.Trainer`` calls it.

    Arguments:
        replay: on the device of the agent.
        schedule: phases.
        batch_size: windows in a batch.
        acting: what the online phase needs.
        before_sampling: called with the number of each update before its batch is drawn.
        compiled: compile ``evaluate``.

    Raises:
        ValueError: an online phase without acting, or no room for its transitions.
    """

    def __init__(
        self,
        replay: Replay,
        schedule: Phases,
        *,
        batch_size: int = 256,
        acting: OnlineCollector | None = None,
        before_sampling: Callable[[int], None] | None = None,
        compiled: bool = False,
    ) -> None:
        if schedule.online_steps and (acting is None or not replay.capacity):
            raise ValueError("online_steps needs acting and a replay of capacity above 0")
        self.replay, self.schedule, self.batch_size = replay, schedule, batch_size
        self.acting, self.before_sampling = acting, before_sampling
        self.compiled = compiled
        self.updates = 0

    def host_step(self, module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """Count an update, and take the environment steps and the shard due before it."""
        agent = cast(Agent, module)
        self.updates += 1
        due = self.schedule.online(self.updates)
        if due:
            assert self.acting is not None
            while self.acting.steps < due:
                self.acting.step(agent, generator)
        if self.before_sampling is not None:
            self.before_sampling(self.updates)
        numbers = {"step": float(self.schedule.step(self.updates))}
        if due and self.acting is not None:
            numbers |= {"online/episodes": float(self.acting.ended), **self.acting.last}
        return {name: torch.tensor(value) for name, value in numbers.items()}

    def sample(self, module: nn.Module, generator: torch.Generator) -> tuple[Batch, Noise]:
        """A batch and the noise of an update."""
        agent = cast(Agent, module)
        batch = self.replay.sample(
            self.batch_size,
            horizon=agent.config.horizon,
            discount=agent.config.discount,
            generator=generator,
        )
        return batch, agent.draw_noise(self.batch_size, generator)

    def evaluate(
        self, module: nn.Module, inputs: tuple[Batch, Noise]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the agent's loss on a batch and its noise, and metrics."""
        return cast(Agent, module).loss(*inputs)

    def updates_without_host(self) -> int:
        """Updates, from the next on, that need nothing of the host (`training.cuda_graphs`)."""
        if self.before_sampling is not None:
            return 0
        return max(0, self.schedule.offline_steps - self.updates)

    def before_update(self, module: nn.Module) -> None:
        """Move the target networks, by the weights of before the update."""
        cast(Agent, module).update_targets()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the data, as tensors and plain data."""
        return {
            "updates": self.updates,
            "offline_steps": self.schedule.offline_steps,
            "start_training": self.schedule.start_training,
            "replay": self.replay.state_dict(),
            "acting": None if self.acting is None else self.acting.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave.

        The numbers of steps may have grown meanwhile, but what is past cannot change.

        Raises:
            ValueError: phases that contradict what was done, or a state that does not fit.
        """
        done, schedule = state["updates"], self.schedule
        if self.acting is None and state["acting"] is not None and state["acting"]["steps"]:
            raise ValueError("the checkpoint is of the online phase, but online_steps is 0")
        past = {name: state[name] for name in ("offline_steps", "start_training")}
        was = Phases(past["offline_steps"], 2**62, past["start_training"])
        if was.step(done) != schedule.step(done) or was.online(done) != schedule.online(done):
            raise ValueError(
                f"after {done} updates, offline_steps and start_training can no longer change from "
                f"{past['offline_steps']} and {past['start_training']}, got "
                f"{schedule.offline_steps} and {schedule.start_training}"
            )
        if done > schedule.updates:
            raise ValueError(f"{done} updates are done already, expected {schedule.updates} in all")
        self.replay.load_state_dict(state["replay"])
        if self.acting is not None and state["acting"] is not None:
            self.acting.load_state_dict(state["acting"])
        self.updates = done
