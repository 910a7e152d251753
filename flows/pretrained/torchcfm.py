"""The convention of torchcfm: ``model(t, x, y)``, or its MLP ``model(cat[x, t])``, noise at t = 0.

All its matchers but two regress X1 - X0 on the canonical path.  `VariancePreserving` has
sin, cos(πt/2) and their derivatives; the Schrödinger bridge adds noise of its own on the way and is
no path of data and noise.  A matcher's small ``sigma``, which blurs its data, is left out, as it is
when torchcfm samples.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from flows.pretrained.convention import (
    Convention,
    Extras,
    is_class,
    keyword_call,
    leading,
    parameters,
    unwrapped,
)
from flows.schedule import CondOT, Cosine

BASE = ("ConditionalFlowMatcher", "TargetConditionalFlowMatcher")
COUPLED = ("ExactOptimalTransportConditionalFlowMatcher",)
COSINE = ("VariancePreservingConditionalFlowMatcher",)
BRIDGE = ("SchrodingerBridgeConditionalFlowMatcher",)
NETWORKS = ("UNetModel", "MLP")


def recognises(network: nn.Module, scheduler: object) -> bool:
    """Tell whether network or matcher is of torchcfm."""
    return is_class(scheduler, BASE, "torchcfm") or is_class(network, NETWORKS, "torchcfm")


def convention(network: nn.Module, scheduler: object = None) -> Convention:
    """Return the convention of a network trained with torchcfm.

    Arguments:
        network: takes ``t`` and ``x`` by these names, or time and state first and in this order,
            or one tensor (B, d + 1) whose last column is the time.
        scheduler: the matcher it was trained with.

    Raises:
        ValueError: the matcher is missing, a bridge, or of another package.
    """
    if is_class(scheduler, BRIDGE):
        raise ValueError(
            "scheduler must be a matcher whose path is Gaussian given the data, "
            "got a Schrödinger bridge, which is not"
        )
    if not is_class(scheduler, BASE):
        raise ValueError(
            "scheduler must be the torchcfm matcher that the network was trained with, such as "
            f"ConditionalFlowMatcher(sigma=0.0); got {type(scheduler).__name__}"
        )
    notes = []
    if is_class(scheduler, COUPLED):
        notes.append(
            "optimal-transport couplings: a tilt is that of the memoryless chain's distribution"
        )
    if getattr(scheduler, "sigma", 0):
        notes.append(f"the matcher's sigma = {scheduler.sigma} blurs the data")  # type: ignore[attr-defined]
    call, own = _call(network)
    schedule = Cosine() if is_class(scheduler, COSINE) else CondOT()
    name = f"torchcfm, {type(scheduler).__name__}"
    return Convention(name, call, schedule, own=own, note="; ".join(notes))


def _call(network: nn.Module) -> tuple[partial[Tensor], tuple[str, ...]]:
    """Return the function that calls the network, and the arguments that it fills in."""
    first = leading(network, 1, "time and state, or both in one tensor")
    if len(parameters(network)) == 1:
        if getattr(unwrapped(network), "time_varying", True) is False:
            raise ValueError("network must be an MLP with time_varying=True, got one without time")
        return partial(_concatenated), first
    t_name, x_name = leading(network, 2, "time and state")
    if {"t", "x"} <= set(parameters(network)):
        t_name, x_name = "t", "x"
    return partial(keyword_call, x_name=x_name, t_name=t_name), (t_name, x_name)


def _concatenated(network: nn.Module, x: Tensor, t: Tensor, extras: Extras) -> Tensor:
    return network(torch.cat([x, t.to(x.dtype)[:, None]], dim=1))
