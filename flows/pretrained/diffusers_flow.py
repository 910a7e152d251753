"""The convention of diffusers' flow transformers, most of which predict noise - data.

Their schedulers hold noise levels σ = 1 - t, and their pipelines step x += (σ' - σ) out.  So

    reversed (SD3, FLUX, QwenImage, Sana)   v = -out(x, scale · (1 - t)),
    forward (Lumina2, Z-Image)              v = out(x, t),  the pipeline changes the sign.

The scale of the time is 1000 for SD3, 1000 times its configured ``timestep_scale`` for Sana, and 1
for the others.  A scheduler's shift changes the grid only, see `grid`.  States are what the
pipeline calls latents: packed tokens (B, N, C) for FLUX and QwenImage, (B, C, H, W) for the others.
Times stay in the state's dtype: bfloat16 cannot tell 999 from 1000.

Distilled guidance ("guidance" of FLUX) is an argument of the network, ``expanded={"guidance":
torch.tensor([3.5])}``, and not classifier-free guidance.  Position ids and shapes are constants.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flows import grid as grids
from flows.pretrained.convention import Convention, Extras, is_class, leading, unwrapped

REVERSED = {
    "SD3Transformer2DModel": 1000.0,
    "FluxTransformer2DModel": 1.0,
    "QwenImageTransformer2DModel": 1.0,
    "SanaTransformer2DModel": 1000.0,
}
"""Classes whose time is ``scale · (1 - t)``, and that scale."""
FORWARD = ("Lumina2Transformer2DModel",)
LISTS = ("ZImageTransformer2DModel",)
OWN = ("hidden_states", "timestep", "return_dict")


def recognises(network: nn.Module, scheduler: object) -> bool:
    """Tell whether network or scheduler is a flow transformer of diffusers."""
    known = (*REVERSED, *FORWARD, *LISTS)
    return is_class(network, known, "diffusers") or _of_a_flow(scheduler)


def convention(network: nn.Module, scheduler: object = None) -> Convention:
    """Return the convention of a flow transformer; the scheduler changes nothing.

    Raises:
        ValueError: a class that is not known, whose direction of time cannot be told; or a
            scheduler that is none of a flow, as of a network distilled to another path.
    """
    if scheduler is not None and not _of_a_flow(scheduler):
        raise ValueError(
            f"scheduler must be one of a flow (FlowMatch..., or of prediction_type "
            f"'flow_prediction') for a {type(unwrapped(network)).__name__}, "
            f"got {type(scheduler).__name__}"
        )
    for name, scale in REVERSED.items():
        if is_class(network, (name,)):
            config = getattr(unwrapped(network), "config", None)
            return reversed_flow(network, scale * getattr(config, "timestep_scale", 1.0))
    if is_class(network, FORWARD):
        return forward_flow(network)
    if is_class(network, LISTS):
        own = ("x", "t", "return_dict")
        return Convention("diffusers flow, forward time, lists of samples", _lists, own=own)
    raise ValueError(
        f"network must be one of {', '.join((*REVERSED, *FORWARD, *LISTS))}, whose direction of "
        f"time is known, got {type(unwrapped(network)).__name__}; look at its pipeline and give "
        "convention=reversed_flow(network, scale) or forward_flow(network) of "
        "flows.pretrained.diffusers_flow"
    )


def reversed_flow(network: nn.Module, scale: float = 1000.0) -> Convention:
    """Return the convention v = -network(x, timestep = ``scale`` · (1 - t)).

    The state is the first argument.  Where the network predicts twice the channels of the state
    (``out_channels``), the second half is a variance and left out.
    """
    (x_name,) = leading(network, 1, "the state first")
    call = partial(_timestep, sign=-1.0, scale=scale, x_name=x_name)
    time = "1 - t" if scale == 1 else f"{scale:g} (1 - t)"
    name = f"diffusers flow, reversed time: v = -network(x, {time})"
    return Convention(name, call, own=(x_name, "timestep", "return_dict"))


def forward_flow(network: nn.Module) -> Convention:
    """Return the convention v = network(x, timestep = t); otherwise as in `reversed_flow`."""
    (x_name,) = leading(network, 1, "the state first")
    call = partial(_timestep, sign=1.0, scale=1.0, x_name=x_name)
    name = "diffusers flow, forward time: v = network(x, t)"
    return Convention(name, call, own=(x_name, "timestep", "return_dict"))


def grid(scheduler: object) -> Tensor:
    """Return the canonical times t_i = 1 - σ_i of a flow scheduler, shape (K + 1,), float64.

    Raises:
        ValueError: its ``sigmas`` do not end at 0 (before ``set_timesteps``), or are no grid.
    """
    known: Any = scheduler
    sigmas = torch.as_tensor(known.sigmas, dtype=torch.float64).cpu()
    if sigmas[-1] != 0:
        raise ValueError(
            "scheduler.sigmas must end at 0: call scheduler.set_timesteps(...) first, with what "
            f"its pipeline passes; got {len(sigmas)} sigmas, the last {sigmas[-1].item():.6g}"
        )
    return grids.from_times(1 - sigmas)


def first_half(out: Tensor, x: Tensor) -> Tensor:
    """Return ``out`` without its second half, a variance, if it has twice the channels of ``x``."""
    return out.chunk(2, dim=1)[0] if out.shape[1] == 2 * x.shape[1] else out


def _of_a_flow(scheduler: object) -> bool:
    predicts = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    return type(scheduler).__name__.startswith("FlowMatch") or predicts == "flow_prediction"


def _timestep(
    network: nn.Module,
    x: Tensor,
    t: Tensor,
    extras: Extras,
    *,
    sign: float,
    scale: float,
    x_name: str,
) -> Tensor:
    native = t if sign > 0 else scale * (1 - t)
    (out,) = network(**{x_name: x}, timestep=native, return_dict=False, **extras)[:1]
    return sign * first_half(out, x)


def _lists(network: nn.Module, x: Tensor, t: Tensor, extras: Extras) -> Tensor:
    """Call Z-Image, which takes lists of (C, 1, H, W) and of captions (L, D)."""
    lists = {
        name: list(value.unbind()) if isinstance(value, Tensor) else value
        for name, value in extras.items()
    }
    out = network(x=list(x.unsqueeze(2).unbind()), t=t, return_dict=False, **lists)[0]
    return torch.stack(list(out)).squeeze(2)
