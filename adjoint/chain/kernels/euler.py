r"""Euler-Maruyama chains of the memoryless SDE.

With h = s - t, both have the coefficients of the published Q-learning code (Li and Levine,
2601.14234), taken at t + h:

    σ² = 2(1-t+h)/(t+h),     mean (1 - h/s) x + 2h v,     std √h σ,

and end with the noiseless Euler step x + h v_β of the base's ODE.

``euler_published`` has the adjoint and the residual of that code: λ = a with the Jacobian of
v_β(·, t+h) taken at x_k, and the residual (2/σ)(v_θ - v_β) + σ a_k.

``euler_consistent`` has the exact adjoint of its own mean and the residual of the discrete control
problem (`Kernel.consistent`): exact relative to the discretised base chain for linear rewards on
Gaussian bases at any K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adjoint.chain.kernels.kernel import Kernel
from adjoint.chain.kernels.scheme import Moments, Scheme


def euler_moments(grid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return columns mean_x, mean_v and std of the chain, and σ, each (K,), for a grid (K+1,)."""
    t, s = grid[:-1], grid[1:]
    h = s - t
    sigma = (2 * (1 - t + h) / s).sqrt()
    std = h.sqrt() * sigma
    mean_x, mean_v = 1 - h / s, 2 * h
    std[-1], mean_x[-1], mean_v[-1] = 0.0, 1.0, h[-1]  # the last step follows the base's ODE
    return mean_x, mean_v, std, sigma


class EulerPublished(Scheme):
    """Euler-Maruyama chain with the adjoint and the residual of the published Q-learning code."""

    name = "euler_published"
    summary = "the Euler-Maruyama pair of the published Q-learning code"

    def __call__(self, grid: Tensor, moments: Moments) -> Kernel:
        """Return the table of the chain on ``grid`` (K+1,)."""
        t, s = grid[:-1], grid[1:]
        h = s - t
        mean_x, mean_v, std, sigma = euler_moments(grid)
        return Kernel(
            name=self.name,
            t=grid,
            mean_x=mean_x,
            mean_v=mean_v,
            std=std,
            adjoint_t=s,
            adjoint_x=1 - h / s,
            adjoint_v=2 * h,
            residual_v=2 / sigma,
            residual_a=sigma,
            adjoint_scale=torch.ones_like(grid),
            residual_at_next=False,
            noiseless_last=True,
            own_time=tuple([False] * len(t)),
        )


class EulerConsistent(Scheme):
    """Euler-Maruyama chain with the exact adjoint of its own mean."""

    name = "euler_consistent"
    summary = "the published Euler-Maruyama chain with the adjoint of its own mean"

    def __call__(self, grid: Tensor, moments: Moments) -> Kernel:
        """Return the table of the chain on ``grid`` (K+1,)."""
        mean_x, mean_v, std, _ = euler_moments(grid)
        return Kernel.consistent(self.name, grid, mean_x=mean_x, mean_v=mean_v, std=std)
