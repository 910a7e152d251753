"""The convention of the flow_matching package: ``model(x=x, t=t, **extras)``, noise at t = 0.

They predict α̇ X1 + σ̇ X0 of their scheduler's path.  Times are passed as (B,), as in training.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from flows.pretrained.convention import Convention, is_class, keyword_call
from flows.schedule import VP, CondOT, Cosine, LinearVP, Polynomial, Schedule

SCHEDULES: dict[str, Callable[[Any], Schedule]] = {
    "CondOTScheduler": lambda s: CondOT(),
    "CosineScheduler": lambda s: Cosine(),
    "LinearVPScheduler": lambda s: LinearVP(),
    "PolynomialConvexScheduler": lambda s: Polynomial(float(s.n)),
    "VPScheduler": lambda s: VP(float(s.beta_min), float(s.beta_max)),
}
"""Schedulers of flow_matching by class name."""


def recognises(network: nn.Module, scheduler: object) -> bool:
    """Tell whether network or scheduler is of the package flow_matching."""
    paths = ("AffineProbPath", "Scheduler")
    return is_class(scheduler, paths, "flow_matching") or is_class(
        network, ("ModelWrapper",), "flow_matching"
    )


def convention(network: nn.Module, scheduler: object = None) -> Convention:
    """Return the convention of a network trained with flow_matching.

    Arguments:
        network: takes ``x`` and ``t`` by name.
        scheduler: a scheduler or an ``AffineProbPath`` of flow_matching.

    Raises:
        ValueError: the scheduler is missing or unknown.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)
    for name, make in SCHEDULES.items():
        if is_class(scheduler, (name,)):
            call = partial(keyword_call, x_name="x", t_name="t")
            return Convention(f"flow_matching, {name}", call, make(scheduler), own=("x", "t"))
    raise ValueError(
        f"scheduler must be one of {', '.join(SCHEDULES)} of flow_matching, or a path with one: "
        f"the network does not say which it was trained with; got {type(scheduler).__name__}"
    )
