"""Makes the certificates of a tilt, before and after training, and their judgement."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from adjoint.arguments import Arguments
from adjoint.certificate import PER_CONDITION, Certificate, certify, log_mean_exp
from adjoint.checks import draw_conditions
from adjoint.cost import COMPARED_SHARE, COMPARED_STEPS
from adjoint.judgement import GOOD, BaseSamples, Judgement, judgement_of
from adjoint.micro_batches import chunks, rows_of
from adjoint.preparation import Preparation
from adjoint.tilted import Tilted
from flows.field import Cond, VelocityField
from flows.sampling import sample
from flows.training import distributed


def certify_tilt(
    arguments: Arguments,
    preparation: Preparation,
    field: nn.Module,
    *,
    stopped: str | None = None,
) -> Tilted:
    """Return the tilted flow ``field`` with its certificates before and after training.

    Arguments:
        arguments, preparation: of the tilt.
        field: tilted velocity field.
        stopped: where and why a callback stopped the training.

    Warns:
        UserWarning: the judgement of the tilt is not good; one warning with all findings.
    """
    before, after = (_certificate(arguments, preparation, v) for v in (arguments.base, field))
    log_z, error, _ = log_mean_exp(preparation.rewards)
    judgement = None
    if after is not None:
        judgement = _judgement(arguments, preparation, field, after)
        if judgement.level != GOOD and distributed.rank() == 0:
            warnings.warn(str(judgement), stacklevel=3)  # the caller of `tilt`
    return Tilted(
        field=field,
        base=arguments.base,
        reward=arguments.reward,
        kernel=preparation.refine_kernel,
        certificate=after,
        certificate_base=before,
        shape=arguments.shape,
        config=preparation.cost.config,
        log_z_ode=log_z,
        log_z_ode_stderr=error,
        dtype=arguments.dtype,
        judgement=judgement,
        stopped=stopped,
    )


def _certificate(
    arguments: Arguments, preparation: Preparation, field: VelocityField
) -> Certificate | None:
    """Return a certificate with noise that depends only on the seed; None if it has no samples."""
    config = preparation.cost.config
    assert config.eval_batch_size is not None
    if not config.certificate_samples:
        return None
    x0, cond, groups, generator = _starts(arguments, preparation)
    return certify(
        arguments.evaluator(field),
        arguments.evaluator(arguments.base),
        arguments.reward_evaluator,
        preparation.refine_kernel,
        x0,
        cond=cond,
        groups=groups,
        batch_size=config.eval_batch_size,
        generator=generator,
        progress=arguments.progress,
    )


def _starts(
    arguments: Arguments, preparation: Preparation
) -> tuple[Tensor, Cond | None, int, torch.Generator]:
    """Return starts, conditions and groups of a certificate, and the generator of its noise.

    With conditions it has groups of `PER_CONDITION` trajectories under one condition.
    """
    config, device = preparation.cost.config, arguments.device
    assert config.certificate_samples is not None
    n = distributed.share(config.certificate_samples)
    generator = torch.Generator(device).manual_seed(distributed.seed_of(config.seed + 2))
    groups = 1
    if arguments.cond_sampler is not None:  # two at least, of two at least
        groups = max(1, min(n // 2, max(2, n // PER_CONDITION)))
    n = groups * (n // groups)
    x0 = torch.randn(
        (n, *arguments.shape), generator=generator, dtype=arguments.dtype, device=device
    )
    cond = None
    if arguments.cond_sampler is not None:
        few = draw_conditions(arguments.cond_sampler, groups, generator)
        cond = {name: c.repeat_interleave(n // groups, 0) for name, c in few.items()}
    return x0, cond, groups, generator


def _judgement(
    arguments: Arguments, preparation: Preparation, field: VelocityField, certificate: Certificate
) -> Judgement:
    """Return the judgement by a few ODE samples of the tilted flow, and of the base.

    Those of the tilted flow begin at a part of the certificate's starts, under its conditions.
    Without conditions the base is sampled once more, from wider noise; see `wide_noise`.
    """
    x0, cond, groups, _ = _starts(arguments, preparation)
    each = len(x0) // groups
    some = torch.arange(len(x0), device=x0.device).reshape(groups, each)
    some = some[:, : max(1, each // COMPARED_SHARE)].flatten()
    x0, cond = x0[some], rows_of(cond, some)
    base = [BaseSamples(preparation.rewards, preparation.rewards)]
    if cond is None:
        wide, log_ratio = wide_noise(x0)
        rewards = _ode_rewards(arguments, preparation, arguments.base, wide)
        base.append(BaseSamples(rewards, rewards.double() + distributed.gather(log_ratio)))
    return judgement_of(
        certificate,
        base,
        rewards_ode=_ode_rewards(arguments, preparation, field, x0, cond),
        temperature=arguments.config.temperature,
    )


def wide_noise(x0: Tensor) -> tuple[Tensor, Tensor]:
    """Return noise of N(0, s² I) from noise x0 (N, *) of N(0, I), and log N(0, I) / N(0, s² I).

    With s² = 1 + √(2/d) the variance of the logarithm is one or more, however many the dimensions:
    as much wider as the weights allow, so that rare modes, in the tails of the noise, are seen.
    """
    d = x0[0].numel()
    scale = math.sqrt(1 + math.sqrt(2 / d))
    squares = x0.double().square().flatten(1).sum(1)
    return scale * x0, d * math.log(scale) + 0.5 * (1 - scale**2) * squares


@torch.no_grad()
def _ode_rewards(
    arguments: Arguments,
    preparation: Preparation,
    field: VelocityField,
    x0: Tensor,
    cond: Cond | None = None,
) -> Tensor:
    """Return rewards (N,) at the ends of the ODE from the starts x0 (N, *), of all processes."""
    size = preparation.cost.config.eval_batch_size
    assert size is not None
    evaluator, reward = arguments.evaluator(field), arguments.reward_evaluator
    parts = []
    for i in chunks(len(x0), size):
        x = sample(evaluator.at, x0[i], grid=COMPARED_STEPS, method="ab2", cond=rows_of(cond, i))
        parts.append(reward(x, rows_of(cond, i)))
    return distributed.gather(torch.cat(parts))
