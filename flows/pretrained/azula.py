"""The convention of azula's denoisers: ``denoiser(x_t, t).mean`` is E[X1 | x_t], data at t = 0.

Any schedule of azula, which is a function t -> (α, σ) of falling signal-to-noise, is inverted by
search, so that one of your own works too.  No schedule of the package reaches pure noise or data.

Denoisers cast states for their backbone themselves.  Their ``**kwargs`` go to the backbone: name
those it understands with ``conditions=``.  Guidance of azula has weight w - 1 for our w.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flows.pretrained.convention import Convention, Extras, is_class, refuse_scheduler, unwrapped
from flows.schedule import Coefficients, Schedule

SECTIONS, ROUNDS = 64, 9
"""Each round of the search divides the bracket of the time by 64: by 2⁵⁴ in all."""


class Inverted(Schedule):
    """A schedule made of a function t -> (α, σ), with data at 0 and noise at 1, inverted by search.

    It has no derivatives (they are NaN), which a prediction of the data does not need.

    Raises:
        ValueError: α/σ does not fall from 0 to 1.
    """

    time_range = (1.0, 0.0)

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.function = function
        times = torch.linspace(1, 0, SECTIONS + 1, dtype=torch.float64)
        rises = self.snr(times).diff() > 0
        if not bool(rises.all()):
            at = times[int(rises.int().argmin())].item()
            raise ValueError(
                "schedule must have alpha / sigma falling from t = 0 to 1, but it does not fall "
                f"towards t = {at:.6g}"
            )

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return α and σ, and NaN for their derivatives."""
        alpha, sigma = self.function(t)
        unknown = torch.full_like(alpha, math.nan)
        return Coefficients(alpha, sigma, unknown, unknown)

    def _time_at(self, rho: Tensor) -> Tensor:
        noisy, clean = torch.ones_like(rho), torch.zeros_like(rho)
        shares = torch.linspace(0, 1, SECTIONS + 1, dtype=rho.dtype, device=rho.device)
        for _ in range(ROUNDS):
            times = noisy[..., None] + (clean - noisy)[..., None] * shares
            below = (self.snr(times) <= rho[..., None]).sum(-1, keepdim=True)
            k = (below - 1).clamp(0, SECTIONS - 1)
            noisy, clean = times.gather(-1, k)[..., 0], times.gather(-1, k + 1)[..., 0]
        return (noisy + clean) / 2


def recognises(network: nn.Module, scheduler: object) -> bool:
    """Tell whether the network is a denoiser of azula."""
    return is_class(network, ("Denoiser",), "azula")


def convention(network: nn.Module, scheduler: object = None) -> Convention:
    """Return the convention of a denoiser, which has its ``schedule`` itself.

    Raises:
        ValueError: a scheduler, or a schedule that is not monotone.
    """
    refuse_scheduler(scheduler, "azula")
    inner: Any = unwrapped(network)
    name = f"azula, {type(inner.schedule).__name__}"
    schedule = Inverted(inner.schedule)
    return Convention(name, _mean, schedule, "clean", own=("x_t", "t"), cast=False)


def _mean(network: nn.Module, x: Tensor, t: Tensor, extras: Extras) -> Tensor:
    return network(x, t, **extras).mean
