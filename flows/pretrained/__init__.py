"""Pretrained flow and diffusion models of other packages as velocity fields.

`load` recognises a model by its class and the class of its scheduler: how the model is called,
which quantity it predicts and in which direction its time runs.  It prints what it recognised, and
wraps the model; the weights stay shared.  Each convention has its file, and no other package is
imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from flows.field import Cond
from flows.pretrained import (
    azula,
    diffusers_diffusion,
    diffusers_flow,
    edm,
    flow_matching,
    policy,
    score_sde,
    torchcfm,
)
from flows.pretrained.adapter import Pretrained
from flows.pretrained.convention import Convention, is_class, unwrapped

__all__ = ["CONVENTIONS", "Convention", "Pretrained", "load"]

CONVENTIONS: dict[str, Callable[[nn.Module, object], Convention]] = {
    "flow_matching": flow_matching.convention,
    "torchcfm": torchcfm.convention,
    "diffusers_flow": diffusers_flow.convention,
    "diffusers_diffusion": diffusers_diffusion.convention,
    "azula": azula.convention,
    "edm": edm.convention,
    "score_sde": score_sde.convention,
    "policy": policy.convention,
    "pi0": policy.pi0_convention,
}
"""Conventions by the name that ``load(convention=...)`` takes."""

_RECOGNISERS = {
    "flow_matching": flow_matching.recognises,
    "torchcfm": torchcfm.recognises,
    "diffusers_flow": diffusers_flow.recognises,
    "diffusers_diffusion": diffusers_diffusion.recognises,
    "azula": azula.recognises,
    "edm": edm.recognises,
    "score_sde": score_sde.recognises,
    "policy": policy.recognises,
}


def load(
    model: Any,
    *,
    scheduler: object = None,
    convention: str | Convention | None = None,
    constants: Mapping[str, object] | None = None,
    expanded: Cond | None = None,
    conditions: Collection[str] = (),
    ignored: Collection[str] = (),
    t_range: tuple[float, float] = (0.0, 1.0),
    quiet: bool = False,
) -> Pretrained:
    """Load a pretrained model as a velocity field, and print in one line how it was recognised.

    Arguments:
        model: the network, or a pipeline of diffusers, of which the transformer or UNet and the
            scheduler are taken.  Shared, not copied.
        scheduler: decides the path of the model where the model does not: a scheduler or path of
            flow_matching, a matcher of torchcfm, a scheduler of diffusers, an SDE of score_sde.
        convention: a name of `CONVENTIONS` or a `Convention` of your own, for classes that are not
            recognised; by default found by class.
        constants, expanded, conditions, ignored, t_range: see `Pretrained`.
        quiet: print nothing.

    Raises:
        TypeError: the model is not a module, or is a velocity field of this package already.
        ValueError: the class is not known, the scheduler is missing or does not fit, a name that
            the network does not take.
    """
    network, scheduler = _parts(model, scheduler)
    if isinstance(convention, str):
        if convention not in CONVENTIONS:
            known = ", ".join(CONVENTIONS)
            raise ValueError(f"convention must be one of {known}; got {convention!r}")
        convention = CONVENTIONS[convention](network, scheduler)
    elif convention is None:
        convention = _recognise(network, scheduler)
    field = Pretrained(
        network,
        convention,
        constants=constants,
        expanded=expanded,
        conditions=conditions,
        ignored=ignored,
        t_range=t_range,
    )
    if not quiet:
        limits = f"exact for {field.t_min:.4g} <= t <= {field.t_max:.4g}"
        note = f"; {convention.note}" if convention.note else ""
        name = type(unwrapped(network)).__name__
        print(
            f"{name}: {convention.name}, predicts {field.prediction}, {limits}{note}",
            file=sys.stderr,
        )
    return field


def _parts(model: Any, scheduler: object) -> tuple[nn.Module, object]:
    """Return the network and the scheduler of a model that may be a pipeline."""
    if is_class(model, ("DiffusionPipeline",), "diffusers"):
        network = getattr(model, "transformer", None) or getattr(model, "unet", None)
        if network is None:
            raise ValueError(
                f"model must be a pipeline with a transformer or a unet, got {type(model).__name__}"
            )
        return network, model.scheduler if scheduler is None else scheduler
    if not isinstance(model, nn.Module):
        raise TypeError(
            "model must be a torch.nn.Module or a pipeline of diffusers, "
            f"got {type(model).__name__}"
        )
    if type(model).__module__.partition(".")[0] == "flows":
        raise TypeError(
            f"model is a {type(model).__name__}, a velocity field already: use it as it is"
        )
    return model, scheduler


def _recognise(network: nn.Module, scheduler: object) -> Convention:
    """Find the convention by the classes of network and scheduler.

    Raises:
        ValueError: no convention fits; the message says what is known and how to go on.
    """
    for name, recognises in _RECOGNISERS.items():
        if recognises(network, scheduler):
            return CONVENTIONS[name](network, scheduler)
    inner = unwrapped(network)
    with_scheduler = "" if scheduler is None else f" with {type(scheduler).__name__}"
    raise ValueError(
        f"no convention is known for {type(inner).__module__}.{type(inner).__name__}"
        f"{with_scheduler}.  Known by class are the models of diffusers, azula, torchcfm, EDM and "
        "k-diffusion, score_sde and FQL; known by scheduler= are models of any class trained with "
        "flow_matching, torchcfm, diffusers or score_sde.  If yours is called like one of these, "
        f"say so: convention= one of {', '.join(CONVENTIONS)}.  If not, say how it is called: "
        'convention=Convention("mine", lambda network, x, t, extras: network(x, t), schedule, '
        'prediction, own=("x", "t")), with a schedule of flows.schedule, a prediction of '
        "flows.path and in own the names that forward has for state and time"
    )
