r"""The error of a flow policy's denoiser along its path, measured while it learns.

The chain ``moment_matched`` (`adjoint.chain.kernels`) needs, at each time of its grid,

    mmse(t) = E‖A - x̂_1‖² / d = (1 - t)² E‖v(x_t, t | s) - (A - x_0)‖² / d

of its base.  Here the base changes with every update, so the table is an exponential average over
the batches of data it is fitted to.  Row i of a batch is spent on time i mod K: one forward pass
of the batch's size per update, whatever K.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flows import Cond, VelocityField, interpolate

RATE = 0.01
"""Weight of the newest batch in the average."""

FLOOR = 1e-6
"""Smallest mmse handed out: the noise of a step must not vanish."""


class BaseError(nn.Module):
    """Running mmse(t_k) of a base at the K first times of a grid.

    Arguments:
        grid: (K+1,) float64 times.

    The state is two buffers, so it is part of a checkpoint and moves with the module.
    """

    times: Tensor
    total: Tensor
    weight: Tensor

    def __init__(self, grid: Tensor) -> None:
        super().__init__()
        self.register_buffer("times", grid[:-1].double().clone(), persistent=False)
        self.register_buffer("total", torch.zeros_like(self.times))
        self.register_buffer("weight", torch.zeros_like(self.times))

    @torch.no_grad()
    def update(
        self, field: VelocityField, x0: Tensor, x1: Tensor, valid: Tensor, cond: Cond
    ) -> None:
        """Take in noise x0 and data x1 (B, d), weights ``valid`` (B,) and conditions (B, ...).

        A batch smaller than K is used more than once.  Times at which every weight is 0 keep their
        average.
        """
        steps, batch = len(self.times), len(x1)
        repeats = -(-steps // batch)  # rows needed so that every time has one
        if repeats > 1:
            x0, x1 = x0.repeat(repeats, 1), x1.repeat(repeats, 1)
            valid = valid.repeat(repeats)
            cond = {name: c.repeat(repeats, *[1] * (c.ndim - 1)) for name, c in cond.items()}
        rows = torch.arange(len(x1), device=x1.device) % steps
        t = self.times[rows].to(x1.dtype)
        errors = (field(interpolate(x0, x1, t), t, cond) - (x1 - x0)).square().mean(1)
        weight = valid.to(self.total)
        total = torch.zeros_like(self.total).index_add_(0, rows, weight * errors.to(weight))
        count = torch.zeros_like(self.total).index_add_(0, rows, weight)
        rate = RATE * (count > 0).to(count)
        mean = total / torch.where(count > 0, count, 1.0)
        self.total.copy_(self.total.lerp(mean, rate))  # `lerp_` is slow where seeds are stacked
        self.weight.copy_(self.weight.lerp(torch.ones_like(count), rate))

    def mean(self) -> Tensor:
        """Average of the velocity's squared error per dimension at each time (K,); 1 if unseen."""
        return torch.where(self.weight > 0, self.total / self.weight, 1.0)

    def mmse(self) -> Tensor:
        """mmse (K,) float64, positive."""
        return ((1 - self.times) ** 2 * self.mean()).clamp_min(FLOOR)
