"""A batch of trajectories with everything that the adjoint-matching loss asks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

BATCH_DIM = {"xs": 1, "adjoint": 1, "v_base": 1, "control_variate": 1}
"""Dimension of the batch in each tensor where it is not the first one."""


@dataclass(frozen=True)
class TrajectoryBatch:
    """Trajectories of the chain with adjoints and log-weights; nothing in it has a gradient.

    Attributes:
        xs: (K, B, *) states at the start of each step.
        adjoint: (K+1, B, *) lean adjoints λ_k.
        v_base: (K, B, *) base velocities at the states.
        log_w: (B,) log-weights.
        reward: (B,) rewards at the ends.
        kl: (B,) path KL, Σ‖d_k‖²/(2 std_k²).
        terms: (B,) values of the terms of the reward by name; empty for a single reward.
        cond: conditions (B, ...) by name; None for an unconditional flow.
        control_variate: (K+1, B, *) part of the adjoints with mean zero at each state; None where
            control variates are off.
    """

    xs: Tensor
    adjoint: Tensor
    v_base: Tensor
    log_w: Tensor
    reward: Tensor
    kl: Tensor
    terms: dict[str, Tensor]
    cond: dict[str, Tensor] | None = None
    control_variate: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of trajectories B."""
        return len(self.reward)

    def tensors(self) -> Iterator[tuple[Tensor, int]]:
        """Yield every tensor of the batch, with the dimension that counts the trajectories."""
        for name in (f.name for f in fields(self)):
            value, dim = getattr(self, name), BATCH_DIM.get(name, 0)
            for tensor in value.values() if isinstance(value, dict) else (value,):
                if tensor is not None:
                    yield tensor, dim

    def map(self, function: Callable[[Tensor, int], Tensor]) -> TrajectoryBatch:
        """Return the batch of the results of ``function(tensor, dim)`` for every tensor."""
        new: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            value, dim = getattr(self, name), BATCH_DIM.get(name, 0)
            if isinstance(value, dict):
                new[name] = {key: function(tensor, dim) for key, tensor in value.items()}
            else:
                new[name] = None if value is None else function(value, dim)
        return TrajectoryBatch(**new)

    def rows(self, index: Tensor) -> TrajectoryBatch:
        """Return the batch of the trajectories with these indices (n,)."""
        return self.map(lambda tensor, dim: tensor.index_select(dim, index.to(tensor.device)))
