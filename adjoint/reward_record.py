"""The rewards of some samples, by which a resumed tilt knows its reward again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flows.training import distributed


class RewardRecord:
    """Rewards of samples that are the same in every run of a tilt, kept in its checkpoint.

    Arguments:
        rewards: (n,) rewards of the samples.
        device_type: kind of device that drew the samples.
    """

    def __init__(self, rewards: Tensor, device_type: str) -> None:
        self.rewards, self.device_type = rewards.cpu(), device_type

    def state_dict(self) -> dict[str, Any]:
        """Return the rewards, and which processes and device drew their samples."""
        return {
            "rewards": self.rewards,
            "device": self.device_type,
            "processes": distributed.size(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Warn where a checkpoint was trained with another reward.

        A constant more, or a little noise, is no other reward.  Nothing is compared where another
        number of processes, or another kind of device, drew the samples.
        """
        was = state["rewards"]
        if state["processes"] != distributed.size() or state["device"] != self.device_type:
            return
        before, now = was - was.mean(), self.rewards - self.rewards.mean()
        if bool((now - before).norm() > 0.1 * before.norm() + 1e-3 * was.norm()):
            warnings.warn(
                "the reward is not the one that the checkpoint was trained with, or its conditions "
                f"are others: of the same samples of the base it was {was[:3].tolist()} and so "
                f"on, and is {self.rewards[:3].tolist()}; training goes on toward the latter",
                stacklevel=2,
            )
