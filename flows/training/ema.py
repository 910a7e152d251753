"""The running average of a module's weights, as a trainer keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flows.training import distributed
from flows.training.sharding import is_sharded, shards
from flows.weights import copy_sharing


class WeightAverage:
    """The running average of the trained weights of a module, kept in a copy of the module.

    A module sharded by ``fully_shard`` cannot be copied: its averages are kept shard by shard, and
    its ``module`` is the module itself, which `take` makes the average.

    Arguments:
        module: the module whose weights are averaged, from their present values.
        named: the parameters that are trained, with their names.

    Attributes:
        module: the average in evaluation mode, with buffers copied and frozen weights shared.
    """

    def __init__(self, module: nn.Module, named: Sequence[tuple[str, Tensor]]) -> None:
        self._weights = [p for _, p in named]
        self._buffers: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._sharded = is_sharded(module)
        if self._sharded:
            self.module = module
            self._averages = [p.detach().clone() for p in self._weights]
        else:
            held = [p for p in module.parameters() if not p.requires_grad]
            self.module = copy_sharing(module, held).eval().requires_grad_(False)
            averaged = dict(self.module.named_parameters())
            self._averages = [averaged[name] for name, _ in named]
            self._buffers = (list(self.module.buffers()), list(module.buffers()))

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move the average by (1 - decay) (weight - average), and copy the module's buffers."""
        averages, weights = shards(self._averages), shards(self._weights)
        torch._foreach_lerp_(averages, weights, 1 - decay)
        if self._buffers[0]:
            torch._foreach_copy_(*self._buffers)

    @torch.no_grad()
    def take(self) -> None:
        """Overwrite the weights with the averages."""
        averages, weights = shards(self._averages), shards(self._weights)
        torch._foreach_copy_(weights, averages)

    def state_dict(self) -> dict[str, Tensor]:
        """Return averages, buffers and shared weights under the names of the module."""
        return {**self.module.state_dict(), **self._shards()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the averages from the whole tensors of ``state``."""
        if not self._sharded:
            self.module.load_state_dict(state)
        for name, average in self._shards().items():
            average.copy_(distributed.sharded_like(state[name], average))

    def _shards(self) -> dict[str, Tensor]:
        """Return the averages of a sharded module by name, and nothing for other modules."""
        if not self._sharded:
            return {}
        of = {id(p): average for p, average in zip(self._weights, self._averages, strict=True)}
        named = self.module.named_parameters(remove_duplicate=False)
        return {name: of[id(p)] for name, p in named if id(p) in of}
