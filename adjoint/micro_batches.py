"""Parts of a batch: slices of its rows, and the conditions that belong to them."""

from __future__ import annotations

import torch
from torch import Tensor

from flows.field import Cond


def chunks(n: int, size: int) -> list[slice]:
    """Return consecutive slices of ``n`` rows of at most ``size`` each; one if ``size`` is 0."""
    return [slice(i, i + (size or n)) for i in range(0, n, size or n)]


def rows_of(
    cond: Cond | None, rows: slice | Tensor, device: torch.device | str | None = None
) -> Cond | None:
    """Return the conditions of some samples, moved to ``device`` if one is named."""
    if cond is None:
        return None
    return {name: c[rows].to(device or c.device) for name, c in cond.items()}
