"""The convention of score_sde_pytorch's continuous-time networks: ``network(x, labels)``.

    VPSDE   labels = 999 s, s from 0 (data) to 1 (noise); the output is E[X0 | x]: the package's
            score function divides it by -σ.
    VESDE   labels = σ; the output is the score (the network divides by σ itself).

The discrete-time models of the package (``continuous = False``) quantise their labels and are not
meant here, nor is subVPSDE.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from flows.pretrained.convention import Convention, Extras, is_class, keyword_call, leading
from flows.schedule import VE, VP

NETWORKS = ("NCSNpp", "DDPM", "NCSNv2", "NCSN")
STEPS = 999.0


def recognises(network: nn.Module, scheduler: object) -> bool:
    """Tell whether network or scheduler is of score_sde."""
    return is_class(scheduler, ("VPSDE", "VESDE")) or is_class(network, NETWORKS, "models")


def convention(network: nn.Module, scheduler: object = None) -> Convention:
    """Return the convention of a network of score_sde.

    Arguments:
        network: takes state and labels first, in this order.
        scheduler: the SDE it was trained with, ``VPSDE`` or ``VESDE``.

    Raises:
        ValueError: another SDE, or none.
    """
    sde: Any = scheduler
    x_name, t_name = own = leading(network, 2, "state and labels")
    if is_class(sde, ("VPSDE",)):
        call = partial(_vp, x_name=x_name, t_name=t_name)
        schedule = VP(float(sde.beta_0), float(sde.beta_1))
        return Convention("score_sde, VPSDE", call, schedule, "noise", own=own)
    if is_class(sde, ("VESDE",)):
        call = partial(keyword_call, x_name=x_name, t_name=t_name)
        levels = VE(float(sde.sigma_min), float(sde.sigma_max))
        return Convention("score_sde, VESDE", call, levels, "score", own=own)
    raise ValueError(
        "scheduler must be the SDE that the network was trained with, VPSDE or VESDE: it decides "
        f"what the network predicts; got {type(sde).__name__}"
    )


def _vp(
    network: nn.Module, x: Tensor, t: Tensor, extras: Extras, *, x_name: str, t_name: str
) -> Tensor:
    # `VP` runs from noise to data, score_sde the other way.
    return keyword_call(network, x, STEPS * (1 - t), extras, x_name=x_name, t_name=t_name)
