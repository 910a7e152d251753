"""The convention of diffusers' flow transformers, most of which predict noise - data.

Their schedulers hold noise levels σ = 1 - t, and their pipelines step x += (σ' - σ) out.  So

    reversed (SD3, FLUX, QwenImage, Sana)   v = -out(x, scale · (1 - t)),
    forward (Lumina2, Z-Image)              v = out(x, t),  the pipeline changes the sign.

The scale of the time is 1000 for SD3, 1000 times its configured ``timestep_scale`` for Sana, and 1
for the others.  A scheduler's shift changes the grid only, see `grid`.  States are what the
pipeline calls latents: packed tokens (B, N, C) for FLUX and QwenImage, (B, C, H, W) for the others.
Times stay in the state's dtype: bfloat16 cannot tell 999 from 1000.

Captions of Z-Image have no mask: a batch (B, L, D) of different lengths is padded by rows of zeros
at the end, which are cut off again.

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
NEEDS = {
    "SD3Transformer2DModel": ("encoder_hidden_states", "pooled_projections"),
    "FluxTransformer2DModel": ("encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids"),
    "QwenImageTransformer2DModel": ("encoder_hidden_states", "img_shapes"),
}
"""Arguments that a class fails without, though its signature has the default None for them."""
DIFFUSION = (
    "CogVideoXTransformer3DModel",
    "CogView3PlusTransformer2DModel",
    "ConsisIDTransformer3DModel",
    "DiTTransformer2DModel",
    "DualTransformer2DModel",
    "EasyAnimateTransformer3DModel",
    "HunyuanDiT2DModel",
    "LatteTransformer3DModel",
    "PixArtTransformer2DModel",
    "StableAudioDiTModel",
    "Transformer2DModel",
)
"""Transformers of diffusers that are no flows and need a scheduler with ``alphas_cumprod``."""


def recognises(network: nn.Module, scheduler: object) -> bool:
    """Tell whether network or scheduler is a flow transformer of diffusers."""
    known = (*REVERSED, *FORWARD, *LISTS)
    if is_class(network, known, "diffusers") or _of_a_flow(scheduler):
        return True
    # Nearly all other transformers of diffusers are flows too, and no table of betas fits them.
    name = type(unwrapped(network)).__name__
    of_diffusers = is_class(network, ("ModelMixin",), "diffusers")
    return of_diffusers and "Transformer" in name and not is_class(network, DIFFUSION)


def convention(network: nn.Module, scheduler: object = None) -> Convention:
    """Return the convention of a flow transformer; the scheduler changes nothing.

    Raises:
        ValueError: a class that is not known, whose direction of time cannot be told; or a
            scheduler that is none of a flow, as of a network distilled to another path.
    """
    known = is_class(network, (*REVERSED, *FORWARD, *LISTS))
    if known and scheduler is not None and not _of_a_flow(scheduler):
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
        own: tuple[str, ...] = ("x", "t", "return_dict")
        return Convention("diffusers flow, forward time, lists of samples", _lists, own=own)
    raise ValueError(
        f"network must be one of {', '.join((*REVERSED, *FORWARD, *LISTS))}, whose direction of "
        f"time is known, got {type(unwrapped(network)).__name__}; look at its pipeline and give "
        "convention=reversed_flow(network, scale) or forward_flow(network) of "
        "flows.pretrained.diffusers_flow, or, if it is no flow but predicts the noise, say, "
        "convention='diffusers_diffusion' and its scheduler"
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
    own = (x_name, "timestep", "return_dict")
    return Convention(name, call, own=own, needs=_needs(network), note=_distilled(network))


def forward_flow(network: nn.Module) -> Convention:
    """Return the convention v = network(x, timestep = t); otherwise as in `reversed_flow`."""
    (x_name,) = leading(network, 1, "the state first")
    call = partial(_timestep, sign=1.0, scale=1.0, x_name=x_name)
    name = "diffusers flow, forward time: v = network(x, t)"
    own = (x_name, "timestep", "return_dict")
    return Convention(name, call, own=own, needs=_needs(network), note=_distilled(network))


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


def _needs(network: nn.Module) -> tuple[str, ...]:
    """Return the arguments that the network fails without, whatever defaults it has for them."""
    names = next((names for cls, names in NEEDS.items() if is_class(network, (cls,))), ())
    return (*names, "guidance") if _distilled(network) else names


def _distilled(network: nn.Module) -> str:
    """Return a remark on a network that was distilled from a guided one; '' for others."""
    if not getattr(getattr(unwrapped(network), "config", None), "guidance_embeds", False):
        return ""
    return (
        "distilled from guidance: its ODE is no flow of independent noise, so that its chain and "
        "the tilt follow another distribution than its samples"
    )


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
        name: captions(value) if isinstance(value, Tensor) else value
        for name, value in extras.items()
    }
    out = network(x=list(x.unsqueeze(2).unbind()), t=t, return_dict=False, **lists)[0]
    return torch.stack(list(out)).squeeze(2)


def captions(padded: Tensor) -> list[Tensor]:
    """Return captions (L_i, D) of different length from (B, L, D) padded by rows of zeros."""
    lengths = (padded != 0).any(2).to(torch.int64).cumsum(1).argmax(1) + 1
    return [caption[:n] for caption, n in zip(padded.unbind(), lengths.tolist(), strict=True)]
