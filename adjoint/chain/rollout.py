"""Trajectories of the memoryless chain, and velocities along them.

x_0 ~ N(0, I) and the step noises are passed in, so that a trajectory is a plain function of them.
No gradient is recorded: adjoint matching never differentiates through the sampler.

Two options of these functions and of `adjoint.chain.adjoints.lean_adjoint` serve large models, and
neither changes a number beyond rounding.  ``micro_batch`` is how many states a field is given at a
time. ``device`` is where the fields are, if the states are kept elsewhere (on the CPU): what is
needed is moved there piece by piece, and results are returned where the states are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from adjoint.chain.conditional_covariance import noise_root
from adjoint.chain.kernels import Kernel
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


def chunks(n: int, size: int) -> list[slice]:
    """Consecutive rows of ``n``, at most ``size`` at a time; all at once where ``size`` is 0."""
    return [slice(i, i + (size or n)) for i in range(0, n, size or n)]


def rows_of(
    cond: Cond | None, rows: slice | Tensor, device: torch.device | str | None = None
) -> Cond | None:
    """The conditions of some samples, moved to ``device`` if one is named."""
    if cond is None:
        return None
    return {name: c[rows].to(device or c.device) for name, c in cond.items()}


def by_micro_batches(
    run: Callable[[slice], tuple[Tensor, ...]], batch: int, micro_batch: int
) -> list[Tensor]:
    """Results (K, n, *) of ``run`` for n samples at a time, joined to (K, B, *), held only once."""
    whole: list[Tensor] = []
    for i in chunks(batch, micro_batch):
        parts = run(i)
        whole = whole or [p.new_empty(p.shape[0], batch, *p.shape[2:]) for p in parts]
        for joined, part in zip(whole, parts, strict=True):
            joined[:, i] = part
    return whole


@torch.no_grad()
def rollout(
    field: VelocityField,
    base: VelocityField,
    kernel: Kernel,
    x0: Tensor,
    noise: Tensor,
    cond: Cond | None = None,
    *,
    micro_batch: int = 0,
    device: torch.device | str | None = None,
) -> Trajectory:
    """Run the chain of ``kernel`` with velocity ``field`` from x0 (B, *) with noise (K, B, *).

    ``base`` moves the last step where that step is noiseless.  States keep the dtype of x0, also
    where the field computes in another one.

    Arguments:
        micro_batch, device: see the module docstring; by default all B, and where x0 is.
    """
    if 0 < micro_batch < len(x0):

        def run(i: slice) -> tuple[Tensor, ...]:
            part = rollout(field, base, kernel, x0[i], noise[:, i], rows_of(cond, i), device=device)
            return (part.xs, part.v) if part.roots is None else (part.xs, part.v, part.roots)

        states, velocities, *rest = by_micro_batches(run, len(x0), micro_batch)
        return Trajectory(states, noise, velocities, rest[0] if rest else None)
    home, device = x0.device, torch.device(device or x0.device)
    cond = rows_of(cond, slice(None), device)
    x, xs, vs, roots = x0.to(device), [x0], [], []
    t, mean_x, mean_v, std = (
        column.to(x0.dtype).unbind()
        for column in (kernel.t, kernel.mean_x, kernel.mean_v, kernel.std)
    )
    for k in range(kernel.steps):
        follows_base = kernel.noiseless_last and k == kernel.steps - 1
        v = (base if follows_base else field)(x, t[k], cond).to(x0.dtype)
        mean = torch.addcmul(mean_x[k] * x, mean_v[k], v)
        if kernel.start_covariance is not None:
            root = noise_root(base, kernel, k, x, cond).detach()
            with torch.autocast(device.type, enabled=False):  # it would round the product
                kick = root @ noise[k].to(device).flatten(1).unsqueeze(2)
            x = mean + kick.reshape(x.shape)
            roots.append(root.to(home))
        elif not follows_base:
            x = torch.addcmul(mean, std[k], noise[k].to(device))
        else:
            x = mean
        xs.append(x.to(home))
        vs.append(v.to(home))
    return Trajectory(
        torch.stack(xs), noise, torch.stack(vs), torch.stack(roots) if roots else None
    )


def velocity_along(
    field: VelocityField,
    xs: Tensor,
    t: Tensor,
    cond: Cond | None = None,
    *,
    micro_batch: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Velocities (S, B, *) at states xs (S, B, *) and times t (S,), in one batch of S·B.

    A field that ``broadcasts`` (`flows.field`) gets states and times as they are, and so computes
    what depends on the time alone S times; any other gets a time for each of the S·B states.

    Arguments:
        micro_batch: states at a time.  Where a gradient is recorded, each micro-batch is evaluated
            again in the backward pass, which so holds the activations of one at a time.
        device: see the module docstring.
    """
    steps, batch = xs.shape[:2]
    states, device = xs.flatten(0, 1), torch.device(device or xs.device)
    times = t.to(xs.dtype)
    if not 0 < micro_batch < len(states):
        moved = rows_of(cond, slice(None), device)
        if getattr(field, "broadcasts", False):
            return field(xs.to(device), times[:, None], moved).to(xs.device)
        repeated = None
        if moved is not None:
            repeated = {n: repeat(c, "b ... -> (s b) ...", s=steps) for n, c in moved.items()}
        v = field(states.to(device), times.repeat_interleave(batch), repeated)
        return v.to(xs.device).reshape(xs.shape)

    def rows(i: slice) -> Tensor:
        return torch.arange(i.start, min(i.stop, len(states)))

    def evaluate(some_times: Tensor, i: slice) -> Tensor:
        some = rows_of(cond, rows(i) % batch, device)
        return field(states[i].to(device), some_times, some).to(xs.device)

    # Of its arguments `checkpoint` keeps the tensors, and takes from them whose random state and
    # autocast to restore: the times, which are small and on the device, serve for both.
    parts = [
        checkpoint(evaluate, times[rows(i) // batch].to(device), i, use_reentrant=False)
        for i in chunks(len(states), micro_batch)
    ]
    return torch.cat(parts).reshape(xs.shape)
