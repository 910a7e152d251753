"""Preparation of a tilt: check base, reward and conditions, and measure the base."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from adjoint.arguments import Arguments
from adjoint.chain.kernels import Kernel, Scheme, find_scheme, make_kernel, measure_mmse
from adjoint.checks import draw_conditions
from adjoint.cost import Cost, measure_cost
from adjoint.micro_batches import chunks, rows_of
from adjoint.rewards.check import check_reward
from flows import grid as grids
from flows.field import Cond
from flows.sampling import sample
from flows.training import distributed


@dataclass(frozen=True)
class Preparation:
    """The kernels of a tilt, with the measurements of the base that they are made from.

    Attributes:
        kernel: chain of the adjoint-matching updates.
        refine_kernel: chain that training ends with, and that is certified.
        cond: conditions of the base's samples; None for an unconditional flow.
        rewards: (N,) float64 rewards of ODE samples of the base, of all processes.
        cost: what the tilt costs; ``cost.config`` are its options with the sizes chosen.
    """

    kernel: Kernel
    refine_kernel: Kernel
    cond: Cond | None
    rewards: Tensor
    cost: Cost


def prepare_tilt(arguments: Arguments) -> Preparation:
    """Check base and reward on samples of the base, and make the kernels.

    Raises:
        TypeError, ValueError: base, reward or conditions have the wrong type or shape or are not
            finite, the reward is not differentiable, or the kernel does not serve the dimension.
    """
    shape, device = arguments.shape, arguments.device
    dim = torch.Size(shape).numel()
    cost = measure_cost(arguments)
    config = cost.config
    if arguments.progress:
        tqdm.write(str(cost), file=sys.stderr)
    assert config.base_samples is not None
    assert config.eval_batch_size is not None
    n, size = distributed.share(config.base_samples), config.eval_batch_size
    generator = torch.Generator(device).manual_seed(distributed.seed_of(config.seed + 1))
    x0 = torch.randn((n, *shape), generator=generator, dtype=arguments.dtype, device=device)
    cond = None
    if arguments.cond_sampler is not None:
        cond = draw_conditions(arguments.cond_sampler, n, generator)
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
    schemes = {find_scheme(config.kernel), find_scheme(config.chain_kernel)}
    if any("covariance" in scheme.needs for scheme in schemes):
        with torch.no_grad():  # about the mean, which at t = 0 is x + v, of each condition
            rest = x1 - (x0 + base.at(x0, torch.zeros(()).to(x0), cond))
            rest = distributed.gather(rest)
        covariance = torch.cov(rest.flatten(1).double().T.cpu()).reshape(dim, dim)

    def kernel_of(chosen: str | Scheme, steps: int) -> Kernel:
        scheme = find_scheme(chosen)
        grid, mmse = grids.shifted(steps, config.shift), None
        if "mmse" in scheme.needs:
            mmse = measure_mmse(base, grid, x1, cond=cond, batch_size=size, generator=generator)
            distributed.average_([mmse])
        needed = covariance if "covariance" in scheme.needs else None
        return make_kernel(scheme, grid, mmse=mmse, covariance=needed).to(device)

    kernel = refine_kernel = kernel_of(config.kernel, config.steps)
    if (config.chain_kernel, config.chain_steps) != (config.kernel, config.steps):
        refine_kernel = kernel_of(config.chain_kernel, config.chain_steps)
    return Preparation(kernel, refine_kernel, cond, distributed.gather(rewards.double()), cost)
