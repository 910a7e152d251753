"""Modules and tensors sharded by ``fully_shard`` (FSDP2): what one process can do without others.

`flows.training.distributed` joins shards to whole tensors, and distributes whole tensors again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def is_sharded(what: Any) -> bool:
    """Tell whether a tensor is a DTensor, or a module has been sharded by ``fully_shard``."""
    if isinstance(what, nn.Module):
        return any(hasattr(part, "unshard") for part in what.modules())
    return hasattr(what, "full_tensor")


def reshard(module: nn.Module) -> None:
    """Shard the parameters again, which an evaluation without gradient leaves whole."""
    for part in module.modules():
        if hasattr(part, "unshard"):
            part.reshard()  # type: ignore[operator]


def local(tensor: Any) -> Tensor:
    """Return the shard of a DTensor that this process holds, or a plain tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the local shards of tensors that are all sharded, or the plain tensors."""
    if tensors and is_sharded(tensors[0]):
        return [local(t.detach()) for t in tensors]
    return list(tensors)
