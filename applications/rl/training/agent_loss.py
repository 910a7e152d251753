"""The loss that a trainer minimises: an agent's loss on windows drawn from the replay.

One call of the loss is one update.  `applications.rl.training.phases` says which environment steps
come before it, and `applications.rl.training.online` takes them.  The target networks follow the
weights of before the update, in ``before_update``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from applications.rl.agents.base import Agent, Noise
from applications.rl.data.replay import Batch, Replay
from applications.rl.training.online import OnlineCollector
from applications.rl.training.phases import Phases
from flows.training import SplitLoss


class AgentLoss(SplitLoss):
    """The loss of an agent as ``flows.training.Trainer`` calls it.

    Arguments:
        replay: transitions to learn from, on the device of the agent.
        phases: the offline and the online phase.
        batch_size: number of windows in a batch.
        collector: takes the environment steps of the online phase.
        balanced: draw one half of each online batch from the data, the other from what came online.
        before_sampling: called with the number of each update before its batch is drawn.
        compiled: compile ``evaluate``.

    Attributes:
        updates: number of updates so far.

    Raises:
        ValueError: there is an online phase, but no collector or no room for its transitions.
    """

    def __init__(
        self,
        replay: Replay,
        phases: Phases,
        *,
        batch_size: int = 256,
        collector: OnlineCollector | None = None,
        balanced: bool = False,
        before_sampling: Callable[[int], None] | None = None,
        compiled: bool = False,
    ) -> None:
        if phases.online_steps and (collector is None or not replay.capacity):
            raise ValueError(
                f"collector and a replay of capacity above 0 must be given where online_steps is "
                f"{phases.online_steps}, got collector={collector!r} and capacity={replay.capacity}"
            )
        self.replay, self.phases, self.batch_size = replay, phases, batch_size
        self.collector, self.before_sampling = collector, before_sampling
        self.balanced, self.compiled = balanced, compiled
        self.updates = 0

    def host_step(self, module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """Count an update, take the environment steps and load the shard due before it.

        Returns:
            metrics of the progress: the step, and the latest online episode.
        """
        agent = cast(Agent, module)
        self.updates += 1
        due = self.phases.online(self.updates)
        if due:
            assert self.collector is not None
            while self.collector.steps < due:
                self.collector.step(agent, generator)
        if self.before_sampling is not None:
            self.before_sampling(self.updates)
        numbers = {"step": float(self.phases.step(self.updates))}
        if due and self.collector is not None:
            numbers |= {"online/episodes": float(self.collector.ended), **self.collector.last}
        return {name: torch.tensor(value) for name, value in numbers.items()}

    def sample(self, module: nn.Module, generator: torch.Generator) -> tuple[Batch, Noise]:
        """Draw the batch and the noise of an update."""
        agent = cast(Agent, module)
        batch = self.replay.sample(
            self.batch_size,
            horizon=agent.config.horizon,
            discount=agent.config.discount,
            generator=generator,
            balanced=self.balanced and self.phases.online(self.updates) > 0,
        )
        return batch, agent.draw_noise(self.batch_size, generator)

    def evaluate(
        self, module: nn.Module, inputs: tuple[Batch, Noise]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the agent's loss on a batch and its noise, and metrics."""
        return cast(Agent, module).loss(*inputs)

    def updates_without_host(self) -> int:
        """Count the updates to come that do not need the host (`flows.training.update_graph`)."""
        if self.before_sampling is not None:
            return 0
        return max(0, self.phases.offline_steps - self.updates)

    def follow(self, module: nn.Module, metrics: dict[str, Tensor]) -> None:
        """Let the running states of the agent, such as a multiplier, follow the metrics."""
        cast(Agent, module).follow(metrics)

    def before_update(self, module: nn.Module) -> None:
        """Move the target networks toward the weights of before the update."""
        cast(Agent, module).update_targets()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the loss as tensors and plain data, without the offline data."""
        return {
            "updates": self.updates,
            "offline_steps": self.phases.offline_steps,
            "start_training": self.phases.start_training,
            "replay": self.replay.state_dict(),
            "collector": None if self.collector is None else self.collector.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from ``state_dict``.

        The numbers of steps may have grown since, but the past of the run cannot change.

        Raises:
            ValueError: the phases contradict the updates done, or the state does not fit.
        """
        done, phases, collected = state["updates"], self.phases, state["collector"]
        if self.collector is None and collected is not None and collected["steps"]:
            raise ValueError("the checkpoint is of the online phase, but online_steps is 0")
        past = {name: state[name] for name in ("offline_steps", "start_training")}
        was = Phases(past["offline_steps"], 2**62, past["start_training"])
        if was.step(done) != phases.step(done) or was.online(done) != phases.online(done):
            raise ValueError(
                f"after {done} updates, offline_steps and start_training can no longer change from "
                f"{past['offline_steps']} and {past['start_training']}, got "
                f"{phases.offline_steps} and {phases.start_training}"
            )
        if done > phases.updates:
            raise ValueError(f"{done} updates are done already, expected {phases.updates} in all")
        self.replay.load_state_dict(state["replay"])
        if self.collector is not None and collected is not None:
            self.collector.load_state_dict(collected)
        self.updates = done
