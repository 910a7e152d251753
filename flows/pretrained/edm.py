"""The convention of EDM's and k-diffusion's denoisers D(x, σ) = E[X1 | X1 + σX0 = x].

The preconditioned classes are meant, not their bare inner networks; their time is the noise level.
Levels run from ``sigma_max`` down to ``sigma_min``: those of EDM's sampler, 80 and 0.002, narrowed
to what the network states.  EDM's preconditioning works in float32 whatever it is given;
``iDDPMPrecond`` and the discrete denoisers of k-diffusion with ``quantize=True`` round σ to their
table.

A grid of noise levels σ_i is the canonical grid 1 / (1 + σ_i).  EDM starts from noise of standard
deviation σ_max, on the canonical path σ_max / (1 + σ_max), which is 1 - ``t_min``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from flows.pretrained.convention import (
    Convention,
    is_class,
    keyword_call,
    leading,
    refuse_scheduler,
    unwrapped,
)
from flows.schedule import VE

EDM = ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond", "Precond")
K_DIFFUSION = ("Denoiser", "DiscreteSchedule", "VDenoiser")


def recognises(network: nn.Module, scheduler: object) -> bool:
    """Tell whether the network is a preconditioned denoiser.

    EDM's classes are known by name: their modules have names of their own once unpickled.
    """
    return is_class(network, EDM) or is_class(network, K_DIFFUSION, "k_diffusion")


def convention(
    network: nn.Module,
    scheduler: object = None,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Convention:
    """Return the convention of a denoiser D(x, σ).

    Arguments:
        network: takes state and noise level first, in this order.
        sigma_min, sigma_max: the least and greatest level; by default as above.

    Raises:
        ValueError: a scheduler, or levels that are no range.
    """
    refuse_scheduler(scheduler, "EDM and k-diffusion")
    inner: Any = unwrapped(network)
    if sigma_min is None:
        sigma_min = max(VE.sigma_min, float(getattr(inner, "sigma_min", 0.0)))
    if sigma_max is None:
        sigma_max = min(VE.sigma_max, float(getattr(inner, "sigma_max", VE.sigma_max)))
    x_name, t_name = leading(network, 2, "state and noise level")
    return Convention(
        f"denoiser D(x, σ), {sigma_min:g} <= σ <= {sigma_max:g}",
        partial(keyword_call, x_name=x_name, t_name=t_name),
        VE(sigma_min, sigma_max),
        "clean",
        own=(x_name, t_name),
        cast=False,
    )
