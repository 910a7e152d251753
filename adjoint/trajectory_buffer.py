"""A ring buffer of trajectories with their adjoints, so that one rollout serves several updates.

Without importance weights a stale trajectory carries the adjoints of an earlier model, a small
bias that vanishes as training converges.  With importance weights its log-weight, computed when it
was collected, corrects for that, up to the weights' self-normalisation and cap.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class TrajectoryBuffer:
    """Named tensors stored along their batch dimension.

    Arguments:
        capacity: number of trajectories kept.
        dims: name → which dimension is the batch; the first for names not in it.
    """

    def __init__(
        self, capacity: int, dims: Mapping[str, int], *, device: torch.device | str = "cpu"
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self.dims = dict(dims)
        self.device = device
        self.store: dict[str, Tensor] = {}
        self.size = 0
        self.position = 0

    def add(self, items: Mapping[str, Tensor]) -> None:
        """Append a batch, overwriting the oldest entries.

        Raises:
            ValueError: the batch exceeds the capacity.
        """
        first, value = next(iter(items.items()))
        count = value.shape[self._dim(first)]
        if count > self.capacity:
            raise ValueError(
                f"a batch of {count} trajectories does not fit a replay buffer of {self.capacity}"
            )
        for name, value in items.items():
            dim = self._dim(name)
            if name not in self.store:
                shape = list(value.shape)
                shape[dim] = self.capacity
                self.store[name] = value.new_zeros(shape)
            index = (self.position + torch.arange(count)) % self.capacity
            self.store[name].index_copy_(dim, index.to(value.device), value)
        self.position = (self.position + count) % self.capacity
        self.size = min(self.size + count, self.capacity)

    def draw(self, count: int, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """``count`` trajectories drawn uniformly with replacement."""
        device = "cpu" if generator is None else generator.device
        index = torch.randint(self.size, (count,), generator=generator, device=device)
        return {
            name: value.index_select(self._dim(name), index.to(value.device))
            for name, value in self.store.items()
        }

    def state_dict(self) -> dict[str, object]:
        """Contents and position, for a checkpoint."""
        return {"store": dict(self.store), "size": self.size, "position": self.position}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: the stored tensors have another capacity.
        """
        store = state["store"]
        assert isinstance(store, dict)
        for name, value in store.items():
            capacity = value.shape[self._dim(name)]
            if capacity != self.capacity:
                raise ValueError(
                    f"replay buffer of {capacity} trajectories in the state, "
                    f"expected {self.capacity}"
                )
        self.store = {name: value.to(self.device, copy=True) for name, value in store.items()}
        self.size = int(state["size"])  # type: ignore[call-overload]
        self.position = int(state["position"])  # type: ignore[call-overload]

    def _dim(self, name: str) -> int:
        return self.dims.get(name, 0)
