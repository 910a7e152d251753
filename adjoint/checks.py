"""Checks of fields, reward and conditions, at a few states, before they are relied on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adjoint.arguments import Arguments
from adjoint.micro_batches import rows_of
from adjoint.models.trainable import check_base_is_apart, trainable
from adjoint.rewards.check import check_dependence, check_reward
from adjoint.trajectory_source import CondSampler
from flows.field import Cond, VelocityField, check_velocity
from flows.sampling import sample
from flows.training import distributed

SLOPE_GAP = 0.5
"""Difference from the slopes -1 and +1 beyond which a base is warned of."""

FEW = 64
"""States at which a base is checked."""

FEWER = 4
"""States at which reward and model are checked."""


def draw_states(arguments: Arguments) -> tuple[Tensor, Cond | None]:
    """Draw a few states (B, *) of pure noise, with conditions where the flow has them.

    Raises:
        TypeError, ValueError: the sampler returns no conditions; see `draw_conditions`.
    """
    generator = torch.Generator(arguments.device).manual_seed(0)
    few = min(FEW, arguments.config.micro_batch or FEW)
    x = torch.randn(
        (few, *arguments.shape),
        generator=generator,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    if arguments.cond_sampler is None:
        return x, None
    return x, draw_conditions(arguments.cond_sampler, few, generator)


def checked_model(
    arguments: Arguments, base: VelocityField, model: nn.Module | None, x: Tensor, cond: Cond | None
) -> nn.Module:
    """Check base, reward and model at a few states, before the work that takes time.

    The reward is evaluated at the ends of a coarse ODE of the base, where its shape and dtype are
    those on samples, but its values need not be.

    Arguments:
        arguments: checked arguments of the tilt.
        base: the base as the caller gave it.
        model: the module to train; None for the one of `trainable`.
        x: states (B, *) of pure noise.
        cond: their conditions.

    Returns:
        The module to train, on the device of the tilt.

    Raises:
        TypeError, ValueError: base, reward or model return the wrong type or shape, or a field is
            not finite; the reward is not differentiable, or not a function of each sample alone;
            the base changes with the weights of the
            model; no weight is trained; or a base without parameters needs a model.
    """
    check_field(arguments.base, x, cond, "base")
    x, cond = x[:FEWER], rows_of(cond, slice(FEWER))
    ends = sample(arguments.base, x, grid=10, method="euler", cond=cond)
    check_direction(arguments.base, x, ends, cond)
    if bool(torch.isfinite(ends).all()):
        some = slice(arguments.config.reward_batch or FEWER)
        few, given = ends[some], rows_of(cond, some)
        found = check_reward(arguments.reward, few, given, finite=False)
        check_dependence(arguments.reward, few, given, *found)
    if model is None:
        model = trainable(
            base, arguments.shape, arguments.config.seed, cond=cond, dtype=arguments.dtype
        )
        return distributed.unwrapped(model).to(arguments.device)
    model = distributed.unwrapped(model).to(arguments.device)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model must have a parameter that requires a gradient, got none")
    check_field(model.eval(), x, cond, "model")
    if not isinstance(arguments.base, nn.Module):  # modules are copies by now
        check_base_is_apart(arguments.base, model, x, cond)
    return model


@torch.no_grad()
def check_direction(base: VelocityField, noise: Tensor, data: Tensor, cond: Cond | None) -> None:
    """Warn of a base whose velocity has not the slopes of a flow from noise to data.

    For independent noise, v(x, 0 | c) = E[X_1 | c] - x and v(x, 1 | c) = x.  So the slope of v in x
    is -1 at pure noise and +1 at data, whatever the data are.  At noise it is the regression of
    v(x) - v(-x) on 2 x, in which the mean of each condition cancels; at data it is that of v on x
    with the mean over the samples taken out, and is not checked where they do not differ.

    Arguments:
        base: velocity field.
        noise, data: states (B, *) at t = 0 and t = 1.
        cond: their conditions.

    Warns:
        UserWarning: sign, direction or scale of the slopes are others.
    """
    if not bool(torch.isfinite(data).all()):
        return

    def velocity(x: Tensor, time: float) -> Tensor:
        return base(x, torch.tensor(time).to(x), cond).float()

    odd = 0.5 * (velocity(noise, 0.0) - velocity(-noise, 0.0))
    found = [float((odd * noise).sum() / noise.float().square().sum())]
    v, x = velocity(data, 1.0), data.float() - data.float().mean(0)
    spread = x.square().sum()
    apart = bool(spread > 1e-12)
    found.append(float(((v - v.mean(0)) * x).sum() / spread) if apart else 1.0)
    if abs(found[0] + 1) > SLOPE_GAP or abs(found[1] - 1) > SLOPE_GAP:
        warnings.warn(
            f"base: its velocity changes with x by {found[0]:+.2f} at t = 0 and {found[1]:+.2f} at "
            "t = 1, where a flow from independent noise at t = 0 to data at t = 1 has -1 and +1 "
            "whatever its data: the sign, the direction of time or a scale is wrong, the network "
            "is not trained, or its noise is not independent of its data",
            stacklevel=3,
        )


def draw_conditions(cond_sampler: CondSampler, n: int, generator: torch.Generator) -> Cond:
    """Return the conditions of ``n`` samples from a sampler.

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
