"""A ring buffer of trajectories with their adjoints, so that one rollout serves several updates.

Without importance weights a stale trajectory carries the adjoints of an earlier model, a small
bias that vanishes as training converges.  With importance weights its log-weight, computed when it
was collected, corrects for that, up to the weights' self-normalisation and cap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from adjoint.trajectory_batch import TrajectoryBatch


class TrajectoryBuffer:
    """A ring buffer that keeps the newest trajectories.

    Arguments:
        capacity: number of trajectories kept.
        device: device to which a restored state is moved.

    Attributes:
        store: the trajectories kept; None before the first are added.
        size: number of trajectories in ``store`` so far.
        position: where the next trajectory is written.
    """

    def __init__(self, capacity: int, *, device: torch.device | str = "cpu") -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self.device = device
        self.store: TrajectoryBatch | None = None
        self.size = 0
        self.position = 0

    def add(self, batch: TrajectoryBatch) -> None:
        """Append a batch, overwriting the oldest trajectories.

        Raises:
            ValueError: the batch exceeds the capacity.
        """
        count = len(batch)
        if count > self.capacity:
            raise ValueError(
                f"a batch of {count} trajectories does not fit a replay buffer of {self.capacity}"
            )
        if self.store is None:
            self.store = batch.map(self._empty)
        index = (self.position + torch.arange(count)) % self.capacity
        for (kept, dim), (new, _) in zip(self.store.tensors(), batch.tensors(), strict=True):
            kept.index_copy_(dim, index.to(new.device), new)
        self.position = (self.position + count) % self.capacity
        self.size = min(self.size + count, self.capacity)

    def draw(self, count: int, *, generator: torch.Generator | None = None) -> TrajectoryBatch:
        """Return ``count`` trajectories drawn uniformly with replacement.

        Raises:
            ValueError: the buffer is empty.
        """
        if self.store is None:
            raise ValueError("the replay buffer is empty: add trajectories before drawing them")
        device = "cpu" if generator is None else generator.device
        return self.store.rows(
            torch.randint(self.size, (count,), generator=generator, device=device)
        )

    def _empty(self, tensor: Tensor, dim: int) -> Tensor:
        """Return zeros like ``tensor`` with room for all trajectories."""
        shape = list(tensor.shape)
        shape[dim] = self.capacity
        return tensor.new_zeros(shape)

    def state_dict(self) -> dict[str, Any]:
        """Return the contents and position, for a checkpoint."""
        store = None
        if self.store is not None:
            store = {f.name: getattr(self.store, f.name) for f in fields(self.store)}
        return {"store": store, "size": self.size, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the contents that `state_dict` returned, as a copy.

        Raises:
            ValueError: the state is of a buffer of another capacity.
        """
        store = state["store"] and TrajectoryBatch(**state["store"])
        if store is not None and len(store) != self.capacity:
            raise ValueError(
                f"replay buffer of {len(store)} trajectories in the state, expected {self.capacity}"
            )
        self.store = store and store.map(lambda tensor, _: tensor.to(self.device, copy=True))
        self.size, self.position = int(state["size"]), int(state["position"])
