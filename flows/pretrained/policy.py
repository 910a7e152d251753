"""The conventions of flow policies, whose state is an action and whose condition an observation.

    FQL, QAM        ``network(observation, x, t)`` with t of shape (B, 1), noise at 0,
                    actions at 1, v = out.
    π0, SmolVLA     time 1 is noise: x = time · noise + (1 - time) · actions, out = noise - actions,
                    v = -out(x, 1 - t), ``network(x, time, **observation)`` with time of shape (B,).

The condition has the name of the network's own argument ("observations" in FQL's).

The classes of π0 and SmolVLA themselves compute a loss in ``forward`` and hide the velocity in
``denoise_step``, behind a cache of the observation's tokens.  What is adapted is a small module
around them: its ``forward(x, time, **observation)`` embeds the observation, fills the cache and
returns ``denoise_step``; the original is a submodule of it and keeps its names.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from flows.pretrained.convention import (
    Convention,
    Extras,
    is_class,
    keyword_call,
    leading,
    refuse_scheduler,
)

NETWORKS = ("ActorVectorField",)


def recognises(network: nn.Module, scheduler: object) -> bool:
    """Tell whether the network is a flow actor in the manner of FQL."""
    return is_class(network, NETWORKS)


def convention(network: nn.Module, scheduler: object = None) -> Convention:
    """Return the convention network(observation, x, t) of FQL and QAM.

    Raises:
        ValueError: a scheduler, or fewer arguments.
    """
    refuse_scheduler(scheduler, "policies")
    _, x_name, t_name = leading(network, 3, "observation, actions and times")
    call = partial(_column, x_name=x_name, t_name=t_name)
    return Convention("flow policy, network(observation, x, t)", call, own=(x_name, t_name))


def pi0_convention(network: nn.Module, scheduler: object = None) -> Convention:
    """Return the convention network(x, time, **observation) of π0 and SmolVLA.

    Raises:
        ValueError: a scheduler, or fewer arguments.
    """
    refuse_scheduler(scheduler, "policies")
    x_name, t_name = own = leading(network, 2, "actions and time")
    call = partial(_reversed, x_name=x_name, t_name=t_name)
    return Convention("flow policy, reversed time: v = -network(x, 1 - t)", call, own=own)


def _column(
    network: nn.Module, x: Tensor, t: Tensor, extras: Extras, *, x_name: str, t_name: str
) -> Tensor:
    return keyword_call(network, x, t[:, None], extras, x_name=x_name, t_name=t_name)


def _reversed(
    network: nn.Module, x: Tensor, t: Tensor, extras: Extras, *, x_name: str, t_name: str
) -> Tensor:
    return -keyword_call(network, x, 1 - t, extras, x_name=x_name, t_name=t_name)
