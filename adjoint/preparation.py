"""What a tilt asks of base, reward and conditions before it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from adjoint.chain.conditional_covariance import MAX_DIM
from adjoint.chain.kernels import MATCHED, Kernel, make_kernel, measure_mmse
from adjoint.chain.rollout import chunks, rows_of
from adjoint.config import TiltConfig
from adjoint.evaluator import field_in_parts, reward_in_parts
from adjoint.rewards.reward import Reward, check_reward
from adjoint.tilt_loss import CondSampler
from flows import grid as grids
from flows.field import Cond, VelocityField, check_velocity
from flows.sampling import sample
from flows.training import distributed


def draw_conditions(cond_sampler: CondSampler, n: int, generator: torch.Generator) -> Cond:
    """The conditions of ``n`` samples that a sampler gives.

    Raises:
        TypeError: it is no mapping of names to tensors.
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
    """Evaluate ``field`` at scalar times and at times (B,).

    Raises:
        TypeError, ValueError: wrong type or shape, not finite, or another velocity at one of B
            times than at that time alone.
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


def probe(
    base: VelocityField,
    reward: Reward,
    shape: tuple[int, ...],
    config: TiltConfig,
    cond_sampler: CondSampler | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    progress: bool,
) -> tuple[Kernel, Kernel, Cond | None, Tensor]:
    """Check base and reward, and measure what the kernels need.

    Returns:
        The kernel of the regression, that of the chain that training ends with, conditions, and
        rewards of ODE samples of the base.

    Raises:
        TypeError, ValueError: as `tilt`.
    """
    n, size = distributed.share(config.base_samples), config.eval_batch_size
    if config.kernel == "covariance_matched" and math.prod(shape) > MAX_DIM:
        raise ValueError(
            f"kernel 'covariance_matched' serves up to {MAX_DIM} dimensions, got shape {shape}; "
            "use 'moment_matched'"
        )
    generator = torch.Generator(device).manual_seed(distributed.seed_of(config.seed + 1))
    x0 = torch.randn((n, *shape), generator=generator, dtype=dtype, device=device)
    cond = None if cond_sampler is None else draw_conditions(cond_sampler, n, generator)
    few = slice(min(64, config.micro_batch or 64))
    check_field(base, x0[few], rows_of(cond, few), "base")
    v_base = field_in_parts(base, config.micro_batch)
    parts = [
        sample(v_base, x0[i], grid=50, method="midpoint", cond=rows_of(cond, i))
        for i in tqdm(chunks(n, size), desc="probe", disable=not progress, leave=False)
    ]
    x1 = torch.cat(parts)
    if not bool(torch.isfinite(x1).all()):
        raise ValueError("base does not lead to finite samples: its ODE from noise ends in NaN")
    for i in chunks(min(n, size), config.reward_batch):
        check_reward(reward, x1[i], rows_of(cond, i))
    value = reward_in_parts(reward, config.reward_batch)
    with torch.no_grad():
        values = torch.cat([value(x1[i], rows_of(cond, i)) for i in chunks(n, size)])
    covariance = None
    if config.kernel == "covariance_matched":
        with torch.no_grad():  # about the mean, which at t = 0 is x + v, of each condition
            rest = x1 - (x0 + v_base(x0, torch.zeros(()).to(x0), cond))
            rest = distributed.gather(rest)
        covariance = torch.cov(rest.flatten(1).double().T.cpu()).reshape(2 * [x1[0].numel()])

    def on(steps: int) -> Kernel:
        grid, mmse = grids.shifted(steps, config.shift), None
        if config.kernel in MATCHED:
            mmse = measure_mmse(v_base, grid, x1, cond=cond, batch_size=size, generator=generator)
            distributed.average_([mmse])
        return make_kernel(config.kernel, grid, mmse=mmse, covariance=covariance).to(device)

    kernel = on(config.steps)
    refine_kernel = kernel if config.chain_steps == config.steps else on(config.chain_steps)
    return kernel, refine_kernel, cond, distributed.gather(values.double())
