"""The adapter that makes a velocity field of a pretrained network, and its further arguments.

The network is shared, not copied: its parameters are those of the original pipeline, and
``field.network`` is the original module.  `adjoint.tilt` trains a copy of the whole field, whose
``network`` is a copy of the original module, with the same names in its ``state_dict``:

    original.load_state_dict(tilted.field.network.state_dict())

Arguments of a network beside state and time keep their own names, and come from one of three
places: ``cond``, the conditions of a call, (B, *) each; ``expanded``, one condition for all
samples, (1, *) each, repeated to the batch (a prompt, a guidance scale); ``constants``, passed as
they are (position ids, shapes, keyword dictionaries).  A name it does not take is an error, also
where its own ``**kwargs`` would swallow it; conditions that only the reward reads are named by
``ignored``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from flows.field import Cond, check_cond
from flows.path import OnCanonicalPath
from flows.pretrained.convention import Convention, parameters, unwrapped


class Network(nn.Module):
    """A network that is called by its convention, as the ``model`` of an `OnCanonicalPath`."""

    def __init__(
        self,
        network: nn.Module,
        convention: Convention,
        constants: Mapping[str, object],
        expanded: Cond,
        conditions: Collection[str],
        ignored: Collection[str],
    ) -> None:
        super().__init__()
        for argument, names in (("conditions", conditions), ("ignored", ignored)):
            if isinstance(names, str):
                raise ValueError(f"{argument} must be a list of names, got the string {names!r}")
        self.network, self.ignored = network, frozenset(ignored)
        self.convention = convention
        self.takes, self.needs, self.swallows = _arguments(network, convention, conditions)
        for name, value in expanded.items():
            if not isinstance(value, Tensor) or value.shape[:1] != (1,):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"expanded[{name!r}] must be a tensor (1, *), got {got}")
        self._check_names(constants, "constants")
        self._check_names(expanded, "expanded")
        both = sorted(self.ignored & (self.takes | set(convention.own)))
        if both:
            raise ValueError(f"ignored must not name arguments of {self._class}, got {both}")
        twice = sorted(set(constants) & set(expanded))
        if twice:
            raise ValueError(f"constants and expanded must not share names, got {twice}")
        tensors = {name: c for name, c in constants.items() if isinstance(c, Tensor)}
        self.plain = {name: c for name, c in constants.items() if name not in tensors}
        self.fixed, self.repeated = tuple(tensors), tuple(expanded)
        for name, value in {**tensors, **expanded}.items():
            # Buffers move with the module; outside its state_dict, which stays the network's.
            # Detached: a prompt's embedding may come with the graph of its encoder.
            self.register_buffer(f"extra_{name}", value.detach(), persistent=False)

    def forward(self, z: Tensor, tau: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the prediction (B, *) at native state ``z`` (B, *) and time ``tau``, () or (B,).

        Raises:
            TypeError: a condition is no tensor.
            ValueError: a condition that the network does not take, that is fixed already, or whose
                leading size is not B; or one that it needs is missing.
        """
        dtype = _dtype(self.network, z) if self.convention.cast else z.dtype
        extras = self._extras(z, dtype, {} if cond is None else cond)
        return self.convention.call(self.network, z.to(dtype), tau.expand(z.shape[0]), extras)

    def _extras(self, x: Tensor, dtype: torch.dtype, cond: Cond) -> dict[str, object]:
        """Return the arguments of the network beside state and time."""
        cond = {name: value for name, value in cond.items() if name not in self.ignored}
        self._check_names(cond, "cond")
        given = {*self.plain, *self.fixed, *self.repeated}
        twice = sorted(given & set(cond))
        if twice:
            raise ValueError(f"cond must not name what is fixed at construction, got {twice}")
        missing = sorted(self.needs - given - set(cond))
        if missing:
            raise ValueError(
                f"{self._class} needs {missing}, got only {sorted(given | set(cond))}: name them "
                "in cond, or fix them with expanded= or constants="
            )
        for name, value in cond.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"cond[{name!r}] must be a tensor, got {type(value).__name__}")
        check_cond(cond, x)
        repeated = {name: getattr(self, f"extra_{name}") for name in self.repeated}
        # Contiguous: some networks reshape their arguments by `view`.
        repeated = {n: v.expand(len(x), *v.shape[1:]).contiguous() for n, v in repeated.items()}
        varying = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in {**repeated, **cond}.items()
        }
        fixed = {name: getattr(self, f"extra_{name}") for name in self.fixed}
        return {**self.plain, **fixed, **varying}

    def _check_names(self, names: Collection[str], where: str) -> None:
        unknown = sorted(set(names) - self.takes)
        if unknown:
            hint = "; its **kwargs would swallow any name: list those it knows with conditions="
            aside = f"; conditions for the reward alone are named by load(..., ignored={unknown})"
            raise ValueError(
                f"{where} names {unknown}, which {self._class} does not take: "
                f"it takes {sorted(self.takes) or 'none'}{hint if self.swallows else ''}"
                f"{aside if where == 'cond' else ''}"
            )

    @property
    def _class(self) -> str:
        return type(unwrapped(self.network)).__name__


class Pretrained(OnCanonicalPath):
    """A velocity field on the canonical path, made of a pretrained network.

    Outside ``t_min`` <= t <= ``t_max`` the velocity is held at its value there (see
    `OnCanonicalPath`).  From t = 0 this leads to t_min with about the distribution that the path
    has there, so a tilt may start at 0; a sampler that starts at t_min, as the pipelines of
    discrete models do, starts from standard normal noise times ``prior_scale()``.

    Arguments:
        network: the pretrained module, shared and not copied.
        convention: how it is called and what it predicts.
        constants: arguments that are always passed as they are; see the module docstring.
        expanded: conditions (1, *) for all samples, repeated to the batch.
        conditions: names that the ``**kwargs`` of the network understands.
        ignored: names of conditions that the network does not see, such as those of the reward.
        t_range: canonical times outside which the network must not be called.

    Raises:
        TypeError: ``network`` is not a module.
        ValueError: the network does not take an argument of the convention, of ``constants``, of
            ``expanded`` or of ``conditions``, or `OnCanonicalPath` refuses the rest.
    """

    def __init__(
        self,
        network: nn.Module,
        convention: Convention,
        *,
        constants: Mapping[str, object] | None = None,
        expanded: Cond | None = None,
        conditions: Collection[str] = (),
        ignored: Collection[str] = (),
        t_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        if not isinstance(network, nn.Module):
            raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}")
        model = Network(network, convention, constants or {}, expanded or {}, conditions, ignored)
        super().__init__(model, convention.schedule, convention.prediction, t_range=t_range)
        self.convention = convention

    @property
    def network(self) -> nn.Module:
        """The pretrained module; its ``state_dict`` loads into the original pipeline."""
        return cast(Network, self.model).network

    @property
    def required(self) -> frozenset[str]:
        """Return the names of the conditions that a call must give."""
        model = cast(Network, self.model)
        return frozenset(model.needs - {*model.plain, *model.fixed, *model.repeated})

    def prior_scale(self, t: float | None = None) -> float:
        """Return the standard deviation of X_t for data of mean 0 and variance 1.

        ``t`` is ``t_min`` if not given.  The result is √(t² + (1-t)²), which is 1/(α + σ) on a
        variance-preserving path: the noise that the pipelines of such models start from, carried to
        the canonical path.
        """
        t = self.t_min if t is None else t
        return math.hypot(t, 1 - t)

    def describe(self) -> str:
        """Describe in a few lines how the network was recognised."""
        model = cast(Network, self.model)
        count = sum(p.numel() for p in self.network.parameters())
        rows = {
            "network": f"{type(unwrapped(self.network)).__name__}, {count:,} parameters",
            "convention": self.convention.name,
            "path": f"{type(self.schedule).__name__}, predicts {self.prediction}",
            "exact for t in": f"[{self.t_min:.4g}, {self.t_max:.4g}], from noise to data",
            "conditions": ", ".join(sorted(model.takes)) or "none",
            "note": self.convention.note,
        }
        return "\n".join(f"{name:<16}{value}" for name, value in rows.items() if value)

    def extra_repr(self) -> str:
        """Return the name of the convention, for ``repr``."""
        return self.convention.name


def _arguments(
    network: nn.Module, convention: Convention, conditions: Collection[str]
) -> tuple[set[str], set[str], bool]:
    """Return names that the network takes, names it requires, and whether it has ``**kwargs``."""
    everything = parameters(network)
    kinds = [p.kind for p in everything.values()]
    swallows = inspect.Parameter.VAR_KEYWORD in kinds
    named = {
        name: p
        for name, p in everything.items()
        if p.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    name = type(unwrapped(network)).__name__
    unknown = sorted({*convention.own, *conditions} - set(named))
    if unknown and not swallows:
        raise ValueError(
            f"{name}.forward does not take {unknown}, which {convention.name} calls it with or "
            f"conditions names: it takes {sorted(named)}"
        )
    takes = {*named, *convention.extra, *conditions} - {*convention.own}
    needs = {n for n, p in named.items() if p.default is p.empty} | takes & {*convention.needs}
    needs -= {*convention.own}
    return takes, needs, swallows


def _dtype(network: nn.Module, x: Tensor) -> torch.dtype:
    """Return the dtype in which the network computes: its own attribute, or its parameters'."""
    stated = getattr(unwrapped(network), "dtype", None)
    if isinstance(stated, torch.dtype):
        return stated
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), x.dtype)
