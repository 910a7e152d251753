"""Trajectories of the memoryless chain.

x_0 ~ N(0, I) and the step noises are passed in, so that a trajectory is a plain function of them.
No gradient is recorded: adjoint matching never differentiates through the sampler.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adjoint.chain.conditional_covariance import scaled_noise
from adjoint.chain.kernels import Kernel
from adjoint.evaluator import Evaluator
from flows.field import Cond, VelocityField


@dataclass(frozen=True)
class Trajectory:
    """States of a chain and the noise that made them.

    Attributes:
        xs: (K+1, B, *) states at the times of the grid.
        noise: (K, B, *) standard normal noise of each step.
        v: (K, B, *) velocities that moved the states (the base's on a noiseless last step).
        roots: (K, B, d, d) Cholesky factors of the noise covariances, for a chain with a
            state-dependent noise; None for a scalar noise.
    """

    xs: Tensor
    noise: Tensor
    v: Tensor
    roots: Tensor | None = None


def draw_noise(kernel: Kernel, x0: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Return standard normal step noises (K, B, *) for a start x0 of shape (B, *)."""
    shape = (kernel.steps, *x0.shape)
    return torch.randn(shape, generator=generator, dtype=x0.dtype, device=x0.device)


@torch.no_grad()
def rollout(
    field: VelocityField | Evaluator,
    base: VelocityField | Evaluator,
    kernel: Kernel,
    x0: Tensor,
    noise: Tensor,
    cond: Cond | None = None,
) -> Trajectory:
    """Return the trajectory of the chain ``kernel`` with velocity ``field`` from x0 (B, *).

    States have the dtype and device of x0, also where the field computes in another dtype or, as an
    `Evaluator`, on another device.

    Arguments:
        field: velocity field that moves the states.
        base: velocity field that moves the last step where it is noiseless, and that a
            state-dependent noise is made of.
        noise: (K, B, *) standard normal noise.
        cond: conditions with leading size B.
    """
    field, base = Evaluator.of(field), Evaluator.of(base)
    x, xs, vs, roots = x0, [x0], [], []
    t, mean_x, mean_v, std = (
        column.to(x0.device, x0.dtype).unbind()
        for column in (kernel.t, kernel.mean_x, kernel.mean_v, kernel.std)
    )
    for k in range(kernel.steps):
        follows_base = kernel.noiseless_last and k == kernel.steps - 1
        v = (base if follows_base else field).at(x, t[k], cond).to(x0.dtype)
        mean = torch.addcmul(mean_x[k] * x, mean_v[k], v)
        if kernel.state_noise is not None:
            root = _noise_root(kernel, base, k, x, cond)
            x = mean + scaled_noise(root, noise[k])
            roots.append(root)
        else:
            x = mean if follows_base else torch.addcmul(mean, std[k], noise[k])
        xs.append(x)
        vs.append(v)
    return Trajectory(
        torch.stack(xs), noise, torch.stack(vs), torch.stack(roots) if roots else None
    )


def _noise_root(kernel: Kernel, base: Evaluator, k: int, x: Tensor, cond: Cond | None) -> Tensor:
    """Return factors (B, d, d) of the state-dependent noise of step k, detached."""
    noise = kernel.state_noise
    assert noise is not None
    return base.map(lambda x, cond: (noise.root(base.field, k, x, cond),), x, cond=cond)[0].detach()
