"""A convolutional velocity field and a reward, whose activations and time benchmarks measure."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flows import Cond


class ConvField(nn.Module):
    """A residual convolutional velocity field on (B, 1, 16, 16).

    Arguments:
        width: number of channels.
        checkpointed: recompute each block in the backward pass.
    """

    def __init__(self, width: int, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.first = nn.Conv2d(2, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
            )
            for _ in range(4)
        )
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the velocity, of the shape of ``x``."""
        h = self.first(torch.cat([x, t.to(x).reshape(-1, 1, 1, 1).expand_as(x)], 1))
        for block in self.blocks:
            h = h + (checkpoint(block, h, use_reentrant=False) if self.checkpointed else block(h))
        return self.last(h)


def square(x: Tensor, cond: Cond | None) -> Tensor:
    """Return the reward -‖x‖²/2 of each sample, (B,)."""
    return -0.5 * x.flatten(1).square().sum(1)
