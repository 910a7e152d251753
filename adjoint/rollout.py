"""Trajectories of the memoryless chain, and velocities along them.

x_0 ~ N(0, I) and the step noises are passed in, so that a trajectory is a plain function of them.
No gradient is recorded: adjoint matching never differentiates through the sampler.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor

from adjoint.covariance import noise_root
from adjoint.kernel import Kernel
from flows.field import Cond, VelocityField


@dataclass(frozen=True)
class Trajectory:
    """States and the noise that made them.

    Attributes:
        xs: (K+1, B, *) states at the times of the grid.
        noise: (K, B, *) standard normal noise of each step.
        v: (K, B, *) velocities that moved the states (the base's on a noiseless last step).
        roots: (K, B, d, d) Cholesky factors of the noise covariances, for a chain with full
            covariance; None for a scalar noise.
    """

    xs: Tensor
    noise: Tensor
    v: Tensor
    roots: Tensor | None = None


def draw_noise(kernel: Kernel, x0: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal step noises (K, B, *) for a start x0 of shape (B, *)."""
    shape = (kernel.steps, *x0.shape)
    return torch.randn(shape, generator=generator, dtype=x0.dtype, device=x0.device)


@torch.no_grad()
def rollout(
    field: VelocityField,
    base: VelocityField,
    kernel: Kernel,
    x0: Tensor,
    noise: Tensor,
    cond: Cond | None = None,
) -> Trajectory:
    """Run the chain of ``kernel`` with velocity ``field`` from x0 (B, *) with noise (K, B, *).

    ``base`` moves the last step where that step is noiseless.  States keep the dtype of x0, also
    where the field computes in another one.
    """
    xs, vs, roots = [x0], [], []
    t, mean_x, mean_v, std = (
        column.to(x0.dtype).unbind()
        for column in (kernel.t, kernel.mean_x, kernel.mean_v, kernel.std)
    )
    for k in range(kernel.steps):
        follows_base = kernel.noiseless_last and k == kernel.steps - 1
        v = (base if follows_base else field)(xs[-1], t[k], cond).to(x0.dtype)
        x = mean_x[k] * xs[-1] + mean_v[k] * v
        if kernel.start_covariance is not None:
            root = noise_root(base, kernel, k, xs[-1], cond).detach()
            x = x + (root @ noise[k].flatten(1).unsqueeze(2)).reshape(x.shape)
            roots.append(root)
        elif not follows_base:
            x = x + std[k] * noise[k]
        xs.append(x)
        vs.append(v)
    return Trajectory(
        torch.stack(xs), noise, torch.stack(vs), torch.stack(roots) if roots else None
    )


def velocity_along(field: VelocityField, xs: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
    """Velocities (S, B, *) at states xs (S, B, *) and times t (S,), in one batch of S·B."""
    steps, batch = xs.shape[:2]
    times = t.to(xs.dtype).repeat_interleave(batch)
    repeated = None
    if cond is not None:
        repeated = {name: repeat(c, "b ... -> (s b) ...", s=steps) for name, c in cond.items()}
    return field(xs.flatten(0, 1), times, repeated).reshape(xs.shape)
