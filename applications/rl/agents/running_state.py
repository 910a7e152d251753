"""State of an agent that follows from the metrics of its updates, such as a dual variable."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn


class RunningState(nn.Module, ABC):
    """A part of an agent whose buffers follow from the metrics of each update.

    The losses read the buffers and report, as a metric, what they are to become.  After the loss,
    `applications.rl.agents.base.Agent.follow` hands the metrics back: so the loss itself is a pure
    function, and the state is saved, resumed and stacked over seeds as all buffers are.
    """

    @abstractmethod
    def follow(self, metrics: Mapping[str, Tensor]) -> None:
        """Copy the new state from the metrics of an update, in place and on the device."""
