"""A `Convention` says how one kind of pretrained network is called and what it predicts.

Most published models are Gaussian paths, so that `flows.path.OnCanonicalPath` does the mathematics
once their schedule and prediction are known.  What is left is how a network is called: the order
and names of its arguments, the scale and direction of its time, the sign, shape and dtype of its
output.  The other files of this package each hold one such convention; this one holds their common
parts, and recognises classes and arguments without importing the packages they come from.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from flows.schedule import CondOT, Schedule

Extras = Mapping[str, object]


class Call(Protocol):
    """A function that evaluates a network at a state and a native time."""

    def __call__(self, network: nn.Module, x: Tensor, t: Tensor, extras: Extras, /) -> Tensor:
        """Return the prediction (B, *) at ``x`` (B, *) and native times ``t`` (B,), with extras."""
        ...


@dataclass(frozen=True)
class Convention:
    """The way in which a kind of network is called, and the quantity that it predicts.

    Attributes:
        name: a name for people.
        call: evaluates the network.  ``x`` comes in the network's dtype, ``t`` in that of the
            state; the result may have any floating dtype.
        schedule: α and σ in the network's own time.
        prediction: of `flows.path.PREDICTIONS`.
        own: arguments of the network that ``call`` fills in; no condition may have these names.
        extra: names that ``call`` understands beside those in the network's signature.
        needs: arguments that the network fails without, though its signature has defaults for them.
        cast: whether states and floating conditions are cast to the network's dtype; off for
            networks that cast themselves.
        note: a remark that `load` prints.
    """

    name: str
    call: Call
    schedule: Schedule = field(default_factory=CondOT)
    prediction: str = "velocity"
    own: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    cast: bool = True
    note: str = ""


def keyword_call(
    network: nn.Module, x: Tensor, t: Tensor, extras: Extras, *, x_name: str, t_name: str
) -> Tensor:
    """Call a network with state, time and extras by name, the time in the dtype of the state."""
    return network(**{x_name: x, t_name: t.to(x.dtype)}, **extras)


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of ``torch.compile``, data parallelism and peft."""
    inner = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module"}
    inner |= {"DataParallel": "module"}
    while True:
        name = type(network).__name__
        if name in inner:
            network = getattr(network, inner[name])
        elif name.startswith("PeftModel"):
            network = network.get_base_model()  # type: ignore[operator]
        else:
            return network


def is_class(thing: object, names: Collection[str], package: str = "") -> bool:
    """Tell whether ``thing`` is an instance of a class with one of these names.

    Names are compared so that no package has to be imported; ``package`` limits them to one
    package.  Wrappers of a module are seen through.
    """
    thing = unwrapped(thing) if isinstance(thing, nn.Module) else thing
    return any(
        cls.__name__ in names and package in ("", cls.__module__.partition(".")[0])
        for cls in type(thing).__mro__
    )


def parameters(network: nn.Module) -> dict[str, inspect.Parameter]:
    """Return the parameters of the network's ``forward``, by name and in order."""
    return dict(inspect.signature(unwrapped(network).forward).parameters)


def leading(network: nn.Module, count: int, expected: str) -> tuple[str, ...]:
    """Return the names of the first ``count`` parameters of the network's ``forward``.

    Raises:
        ValueError: ``forward`` has fewer; ``expected`` names them in the message.
    """
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [name for name, p in parameters(network).items() if p.kind not in starred]
    if len(names) < count:
        raise ValueError(
            f"{type(unwrapped(network)).__name__}.forward must take {expected}, "
            f"got {inspect.signature(unwrapped(network).forward)}"
        )
    return tuple(names[:count])


def refuse_scheduler(scheduler: object, convention: str) -> None:
    """Raise ValueError if a scheduler is given to a convention that needs none."""
    if scheduler is not None:
        raise ValueError(
            f"scheduler must be None for {convention}, whose path is known without one, "
            f"got {type(scheduler).__name__}"
        )
