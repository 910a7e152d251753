"""Checks of a reward at a few samples, before a training relies on it."""

from __future__ import annotations

import torch
from torch import Tensor

from adjoint.rewards.reward import AbstractReward
from flows.field import Cond

ROUNDING = 0.02
"""Difference of two evaluations of a reward, relative to its values, that is taken for rounding."""
MIN_LEVELS = 3
"""Different values at a few samples from which a reward is taken to vary everywhere."""


def check_reward(
    reward: AbstractReward, x: Tensor, cond: Cond | None = None, *, finite: bool = True
) -> tuple[Tensor, Tensor]:
    """Return value and gradient on ``x``, and refuse values that a training does not survive.

    Arguments:
        reward: the reward.
        x: samples (B, *).
        cond: conditions with leading size B.
        finite: refuse numbers that are not finite too.  False where ``x`` are no samples of the
            base.

    Raises:
        TypeError, ValueError: wrong shape, dtype or device, a condition that is missing, not
            differentiable, or not finite on ``x``.
    """
    try:
        value, gradient, _ = reward.value_and_gradient(x, cond)
    except RuntimeError as error:
        raise ValueError(
            f"reward fails for x of shape {tuple(x.shape)} and {x.dtype} on {x.device}; its "
            f"weights must have that dtype and device, or cast: {error}"
        ) from error
    for name, tensor in (("reward", value), ("the reward's gradient", gradient)):
        bad = int((~torch.isfinite(tensor)).flatten(1 if tensor.ndim > 1 else 0).sum())
        if bad and finite:
            raise ValueError(
                f"{name} is not finite on samples of the base: {bad} of {tensor.numel()} entries "
                "are NaN or infinite; expected finite numbers wherever the base has mass"
            )
    return value, gradient


def check_dependence(
    reward: AbstractReward, x: Tensor, cond: Cond | None, value: Tensor, gradient: Tensor
) -> None:
    """Refuse a reward that is no function of each sample alone, or whose gradient is 0.

    Its values must come again in a call with half of the samples.

    Arguments:
        reward: the reward.
        x: samples, (B, *); of a single one nothing is checked.
        cond: conditions with leading size B.
        value, gradient: of the reward at ``x``, (B,) and (B, *).

    Raises:
        ValueError: values change from call to call or with the other samples, or the gradient is 0
            at all samples while the values differ.
    """
    if len(x) < 2:
        return
    half = slice((len(x) + 1) // 2)
    some = None if cond is None else {name: c[half] for name, c in cond.items()}
    with torch.no_grad():
        alone = reward(x[half], some)
        alike = _agree(alone, value[half])
        again = value if alike else reward(x, cond)
    if not _agree(again, value):
        raise ValueError(
            f"reward {reward.name!r} must be a function of the sample, got other values at the "
            f"same samples in a second call ({_few(value)}, then {_few(again)}): dropout or a "
            "random augmentation; call eval() on its networks, or draw its random numbers once"
        )
    if not alike:
        raise ValueError(
            f"reward {reward.name!r} of a sample must not depend on the other samples, got "
            f"{_few(value[half])} among {len(x)} samples and {_few(alone)} among {len(alone)}: a "
            "batch norm in training mode, or a mean or rank over the batch (a tilt needs no "
            "advantages)"
        )
    if not bool(gradient.any()) and len(value.unique()) >= MIN_LEVELS:
        raise ValueError(
            f"reward {reward.name!r} must have a gradient where its value varies, got values from "
            f"{value.min():.3g} to {value.max():.3g} at {len(x)} samples and a gradient of 0 at "
            "all of them: rounding, a threshold or a cast lies between; pass gradient= to Reward, "
            "or a smooth surrogate"
        )


def _agree(a: Tensor, b: Tensor) -> bool:
    """Tell whether values agree up to the rounding of half precision; NaN agrees with NaN."""
    scale = max(1.0, float(b.detach().nan_to_num(0.0, 0.0, 0.0).abs().max()))
    return torch.allclose(a.detach(), b.detach(), rtol=0, atol=ROUNDING * scale, equal_nan=True)


def _few(values: Tensor) -> str:
    return ", ".join(f"{v:.4g}" for v in values.detach().flatten()[:3].tolist())
