"""The convention of diffusers' diffusion networks, whose scheduler has ``alphas_cumprod``.

``network(z, k)`` at step k = 0 (clean) .. 999 (noise) of a variance-preserving table
α = √ᾱ_k, σ = √(1 - ᾱ_k) predicts, by ``scheduler.config.prediction_type``, the noise ("epsilon"),
the data ("sample") or αX0 - σX1 ("v_prediction").  Where it predicts twice the channels of z, the
second half is a variance and left out.

The network does not say which of these it predicts.  The scheduler it was trained with says it, and
so does any scheduler of diffusers with equal betas and prediction type.  Between two steps k is
interpolated in log-SNR and handed over as a fraction, in the state's dtype; sinusoidal embeddings
take it, networks with a learned embedding of whole steps (``time_embedding_type="learned"``) do
not.  Tables do not reach pure noise: ``t_min`` is α/(α + σ) of the last step, 0.064 for Stable
Diffusion.  Tables of zero terminal SNR end at ᾱ = 2⁻²⁴ or less instead of 0.

Networks of other packages with the same call, ADM's ``unet(x, timesteps, y)`` for one, are taken
with a scheduler of diffusers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flows import grid as grids
from flows.pretrained.convention import (
    Convention,
    Extras,
    is_class,
    leading,
    parameters,
    unwrapped,
)
from flows.pretrained.diffusers_flow import first_half
from flows.schedule import Table

PREDICTIONS = {"epsilon": "noise", "sample": "clean", "v_prediction": "v_prediction"}
ADDED = ("text_embeds", "time_ids")
"""Arguments that Stable Diffusion XL takes inside ``added_cond_kwargs``; here plain conditions."""
TERMINAL = 2.0**-24
ROUNDING = 2e-3
"""Distance from a whole step below which a fraction is taken for rounding in single precision."""
ZERO_SNR = 1e-6
"""Largest ᾱ at which a schedule is taken for one that ends at pure noise."""


def recognises(network: nn.Module, scheduler: object) -> bool:
    """Tell whether scheduler or network is a diffusion model of diffusers."""
    if scheduler is None:
        return is_class(network, ("ModelMixin",), "diffusers")
    return is_class(scheduler, ("SchedulerMixin",), "diffusers")


def convention(network: nn.Module, scheduler: object = None) -> Convention:
    """Return the convention of a network trained with a table of betas.

    Arguments:
        network: takes the state first and the step as ``timestep``, or second.
        scheduler: its scheduler, for ``alphas_cumprod`` and ``config.prediction_type``.

    Raises:
        ValueError: the scheduler is missing, has no table, or predicts something else.
    """
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    config: Any = getattr(scheduler, "config", None)
    kind = getattr(config, "prediction_type", None)
    if alphas_cumprod is None or kind not in PREDICTIONS:
        raise ValueError(
            "scheduler must have alphas_cumprod and a config.prediction_type of "
            f"{', '.join(PREDICTIONS)}: {type(unwrapped(network)).__name__} itself does not say "
            f"what it predicts; got {type(scheduler).__name__} with prediction_type {kind!r}"
        )
    if kind == "epsilon" and float(torch.as_tensor(alphas_cumprod).min()) <= ZERO_SNR:
        raise ValueError(
            "scheduler must not end at pure noise (zero terminal SNR) where prediction_type is "
            "'epsilon': the noise does not determine the data there; give the scheduler that the "
            "network was trained with, of prediction_type 'v_prediction', say, or without "
            "rescale_betas_zero_snr"
        )
    x_name, second = leading(network, 2, "state and timestep")
    known = parameters(network)
    t_name = "timestep" if "timestep" in known else second
    own: tuple[str, ...] = (x_name, t_name)
    if "return_dict" in known:
        own = (*own, "return_dict")
    added = getattr(getattr(unwrapped(network), "config", None), "addition_embed_type", None)
    extra = ADDED if added == "text_time" else ()
    classes = getattr(getattr(unwrapped(network), "config", None), "class_embed_type", None)
    if extra:
        own = (*own, "added_cond_kwargs")
    return Convention(
        f"diffusers diffusion, {kind}",
        partial(_call, x_name=x_name, t_name=t_name, options=own[2:3] == ("return_dict",)),
        table(alphas_cumprod),
        PREDICTIONS[kind],
        own=own,
        extra=extra,
        needs=(*extra, *(("class_labels",) if classes is not None else ())),
    )


def table(alphas_cumprod: Tensor) -> Table:
    """Return the schedule α = √ᾱ, σ = √(1 - ᾱ) of a table ᾱ (K,)."""
    share = torch.as_tensor(alphas_cumprod, dtype=torch.float64).cpu()
    least = min(TERMINAL, float(share[share > 0].min()) / 4)  # below its neighbour
    share = torch.where(share == 0, least, share)
    return Table(share.sqrt(), (1 - share).sqrt())


def grid(scheduler: object) -> Tensor:
    """Return the canonical times α/(α + σ) of a DDIM-like scheduler, shape (K + 1,), float64.

    Its Euler steps from ``prior_scale(grid[0])`` times its noise are DDIM's (η = 0) without
    clipping: x̂1 and x̂0 are kept, α and σ exchanged.  So for ``timestep_spacing="leading"``, or a
    number of steps that divides that of the table; otherwise DDIM's own steps are not those of its
    ``timesteps``.  Where the last ᾱ is not 1 (``set_alpha_to_one=False``), the end is to be divided
    by ``prior_scale(grid[-1])``.

    Raises:
        ValueError: the times are no grid.
    """
    known: Any = scheduler
    steps = torch.as_tensor(known.timesteps).long().cpu()
    last = torch.as_tensor(getattr(known, "final_alpha_cumprod", 1.0)).reshape(1)
    share = torch.cat([torch.as_tensor(known.alphas_cumprod).cpu()[steps], last.cpu()]).double()
    alpha, sigma = share.sqrt(), (1 - share).sqrt()
    return grids.from_times(alpha / (alpha + sigma))


def whole_steps(k: Tensor) -> Tensor:
    """Return steps with those that are whole but for rounding made whole.

    A network that looks its step up by ``k.long()`` would otherwise take 979 for 979.9999.
    """
    whole = k.round()
    return torch.where((k - whole).abs() < ROUNDING, whole, k)


def _call(
    network: nn.Module,
    x: Tensor,
    t: Tensor,
    extras: Extras,
    *,
    x_name: str,
    t_name: str,
    options: bool,
) -> Tensor:
    rest = dict(extras)
    added = {name: rest.pop(name) for name in ADDED if name in rest}
    if added:
        rest["added_cond_kwargs"] = added
    if options:
        rest["return_dict"] = False
    out = network(**{x_name: x, t_name: whole_steps(t)}, **rest)
    return first_half(out if isinstance(out, Tensor) else out[0], x)
