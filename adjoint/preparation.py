"""Preparation of a tilt: check base, reward and conditions, and measure the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from adjoint.arguments import Arguments
from adjoint.chain.kernels import Kernel, find_scheme, make_kernel, measure_mmse
from adjoint.micro_batches import chunks, rows_of
from adjoint.rewards.reward import check_reward
from adjoint.trajectory_source import CondSampler
from flows import grid as grids
from flows.field import Cond, VelocityField, check_velocity
from flows.sampling import sample
from flows.training import distributed


@dataclass(frozen=True)
class Preparation:
    """Kernels of a tilt, and what was measured of the base to make them.

    Attributes:
        kernel: chain of the adjoint-matching updates.
        refine_kernel: chain that training ends with, and that is certified.
        cond: conditions of the base's samples; None for an unconditional flow.
        rewards: (N,) float64 rewards of ODE samples of the base, of all processes.
    """

    kernel: Kernel
    refine_kernel: Kernel
    cond: Cond | None
    rewards: Tensor


def draw_conditions(cond_sampler: CondSampler, n: int, generator: torch.Generator) -> Cond:
    """Conditions of ``n`` samples from a sampler.

    Raises:
        TypeError: the sampler returns no mapping of names to tensors.
        ValueError: a tensor without the leading size n.
    """
    cond = cond_sampler(n, generator)
    if not isinstance(cond, Mapping):
        raise TypeError(
            "cond_sampler(n, generator) must return a mapping of names to tensors of n conditions, "
            f"got {type(cond).__name__}"
        )
    for name, c in cond.items():
        if not isinstance(c, Tensor):
            raise TypeError(f"cond_sampler must return tensors, got {type(c).__name__} as {name!r}")
        if not c.ndim or len(c) != n:
            raise ValueError(
                f"cond_sampler must return {n} conditions {name!r}, got shape {tuple(c.shape)}"
            )
    return cond


@torch.no_grad()
def check_field(field: VelocityField, x: Tensor, cond: Cond | None, name: str) -> None:
    """Evaluate ``field`` at scalar times and at times (B,), and refuse wrong results.

    Raises:
        TypeError, ValueError: wrong type or shape, not finite, or the velocity of a state changes
            when its time is passed in a (B,) tensor instead of as a scalar.
    """
    early, late = torch.tensor(0.3).to(x), torch.tensor(0.7).to(x)
    mixed = torch.where(torch.arange(len(x), device=x.device) == 0, early, late)
    found: list[Tensor] = []
    for t in (early, late, mixed):
        try:
            v = field(x, t, cond)
        except (RuntimeError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{name} fails for x of shape {tuple(x.shape)} and {x.dtype} at a time of shape "
                f"{tuple(t.shape)}, called as {name}(x, t, cond) with times as scalars and as (B,) "
                f"and conditions {sorted(cond or {})}: {type(error).__name__}: {error}"
            ) from error
        if not bool(torch.isfinite(check_velocity(v, x, name)).all()):
            raise ValueError(f"{name} returned NaN or infinite velocities at t = 0.3 or 0.7")
        found.append(v.flatten(1).float())
    alone = torch.cat([found[0][:1], found[1][1:]])
    gap = float((found[2] - alone).norm(dim=1).amax() / alone.norm(dim=1).amax().clamp_min(1e-30))
    if gap > 0.1 and torch.equal(field(x, late, cond).flatten(1).float(), found[1]):  # not random
        raise ValueError(
            f"{name} must evaluate each state at its own time where times are of shape (B,): for "
            f"one state at t = 0.3 and {len(x) - 1} at 0.7 velocities are off by {gap:.0%} of what "
            "they are at a scalar time"
        )


def prepare_tilt(arguments: Arguments) -> Preparation:
    """Check base and reward on samples of the base, and make the kernels.

    Raises:
        TypeError, ValueError: base, reward or conditions have the wrong type or shape or are not
            finite, the reward is not differentiable, or the kernel does not serve the dimension.
    """
    config, shape, device = arguments.config, arguments.shape, arguments.device
    scheme = find_scheme(config.kernel)
    dim = torch.Size(shape).numel()
    if scheme.max_dim is not None and dim > scheme.max_dim:
        raise ValueError(
            f"kernel {scheme.name!r} serves up to {scheme.max_dim} dimensions, got shape {shape}; "
            "use 'moment_matched'"
        )
    n, size = distributed.share(config.base_samples), config.eval_batch_size
    generator = torch.Generator(device).manual_seed(distributed.seed_of(config.seed + 1))
    x0 = torch.randn((n, *shape), generator=generator, dtype=arguments.dtype, device=device)
    cond = None
    if arguments.cond_sampler is not None:
        cond = draw_conditions(arguments.cond_sampler, n, generator)
    few = slice(min(64, config.micro_batch or 64))
    check_field(arguments.base, x0[few], rows_of(cond, few), "base")
    base, reward = arguments.evaluator(arguments.base), arguments.reward_evaluator
    x1 = torch.cat(
        [
            sample(base.at, x0[i], grid=50, method="midpoint", cond=rows_of(cond, i))
            for i in tqdm(
                chunks(n, size), desc="preparation", disable=not arguments.progress, leave=False
            )
        ]
    )
    if not bool(torch.isfinite(x1).all()):
        raise ValueError("base does not lead to finite samples: its ODE from noise ends in NaN")
    for i in chunks(min(n, size), config.reward_batch):
        check_reward(arguments.reward, x1[i], rows_of(cond, i))
    with torch.no_grad():
        rewards = torch.cat([reward(x1[i], rows_of(cond, i)) for i in chunks(n, size)])
    covariance = None
    if "covariance" in scheme.needs:
        with torch.no_grad():  # about the mean, which at t = 0 is x + v, of each condition
            rest = x1 - (x0 + base.at(x0, torch.zeros(()).to(x0), cond))
            rest = distributed.gather(rest)
        covariance = torch.cov(rest.flatten(1).double().T.cpu()).reshape(dim, dim)

    def kernel_of(steps: int) -> Kernel:
        grid, mmse = grids.shifted(steps, config.shift), None
        if "mmse" in scheme.needs:
            mmse = measure_mmse(base, grid, x1, cond=cond, batch_size=size, generator=generator)
            distributed.average_([mmse])
        return make_kernel(scheme, grid, mmse=mmse, covariance=covariance).to(device)

    kernel = kernel_of(config.steps)
    refine_kernel = kernel if config.chain_steps == config.steps else kernel_of(config.chain_steps)
    return Preparation(kernel, refine_kernel, cond, distributed.gather(rewards.double()))
