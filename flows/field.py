"""A flow is a velocity field: the protocol of velocity fields, and wrappers that compose them.

A velocity field is any callable ``v(x, t, cond)`` with ``x`` of shape (B, *), ``t`` a scalar
tensor or one of shape (B,), and ``cond`` one explicit mapping from names to tensors of leading
size B (or ``None``).  It returns a tensor of the shape of ``x``.  Time runs from noise at t = 0 to
data at t = 1 along the canonical path X_t = t X_1 + (1 - t) X_0 (see ``flows.path``).

A field may offer two more things, which save work where states at S times are given at once:

- the attribute ``broadcasts``, if true: the field also takes states (S, B, *) at times (S, 1),
  with conditions of leading size B, and computes what depends on the time alone only S times;
- the method ``linearised(x, t, cond)``: for states (S, B, *) at times (S,) it returns velocities
  and a function (k, c) -> (dv/dx)^T c at the k-th state, of shape (B, *), with constant weights.

Wrappers are modules, so they move between devices, are found by optimisers, and nest: guidance of
a residual on a frozen base is ``Guided(Residual(frozen(base), correction), ...)``.
`flows.testing.check_velocity_field` checks that a new field keeps these rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from flows.weights import copy_sharing

Cond = Mapping[str, Tensor]
Field = TypeVar("Field")
SomeCorrected = TypeVar("SomeCorrected", bound="Corrected")


class VelocityField(Protocol):
    """A velocity field is a callable ``v(x, t, cond)``; the module docstring has the shapes."""

    def __call__(self, x: Tensor, t: Tensor, cond: Cond | None = None, /) -> Tensor:
        """Return the velocity at ``x`` (B, *) and time ``t`` (scalar or (B,)), shaped as ``x``."""
        ...


def batch_time(t: Tensor | float, x: Tensor) -> Tensor:
    """Return the time ``t`` (scalar or (B,)) shaped to broadcast against the states ``x``.

    The result has the dtype and device of ``x``, and shape (1, ..., 1) for a scalar and
    (B, 1, ..., 1) for a batch of times.
    """
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    return t.reshape(-1, *([1] * (x.ndim - 1)))


def check_velocity(v: Tensor, x: Tensor, name: str = "field") -> Tensor:
    """Return the velocity ``v`` after checking that it is a floating tensor of the shape of ``x``.

    Raises:
        TypeError: ``v`` is not a floating-point tensor.
        ValueError: the shapes differ.
    """
    if not isinstance(v, Tensor) or not v.is_floating_point():
        got = v.dtype if isinstance(v, Tensor) else type(v).__name__
        raise TypeError(f"{name} must return a floating-point tensor, got {got}")
    if v.shape != x.shape:
        raise ValueError(
            f"{name} returned shape {tuple(v.shape)} for x of shape {tuple(x.shape)}; "
            "a velocity has the shape of x"
        )
    return v


def check_cond(cond: Cond | None, x: Tensor) -> None:
    """Check that every condition has one row for each sample of ``x`` (B, *).

    Raises:
        ValueError: naming the condition whose leading size is not B.
    """
    for name, value in (cond or {}).items():
        if value.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"cond[{name!r}] must have the leading size {x.shape[0]} of x, "
                f"got shape {tuple(value.shape)}"
            )


def frozen(field: Field) -> Field:
    """Return a copy of ``field`` in evaluation mode whose parameters require no gradient.

    Fields that are not modules are returned as they are: they hold no parameters.  A module with
    the attribute ``shares_weights = True``, such as the base of a low-rank tilt, keeps its
    parameters: they are shared with the copy.
    """
    if not isinstance(field, nn.Module):
        return field
    sharing = [m for m in field.modules() if getattr(m, "shares_weights", False)]
    clone = copy_sharing(field, [p for m in sharing for p in m.parameters()]).eval()
    return clone.requires_grad_(False)


class Corrected(nn.Module):
    """A velocity field made of a frozen base and a trained correction; subclasses combine them.

    Arguments:
        base: velocity field, copied and frozen: it never receives parameter gradients.
        correction: module with the same call; zero-initialise its last layer to start at the base.
    """

    def __init__(self, base: VelocityField, correction: nn.Module) -> None:
        super().__init__()
        self.base = frozen(base)
        self.correction = correction

    def train(self: SomeCorrected, mode: bool = True) -> SomeCorrected:
        """Set the mode of the correction; the frozen base stays in evaluation mode."""
        super().train(mode)
        if isinstance(self.base, nn.Module):
            self.base.eval()
        return self

    @property
    def broadcasts(self) -> bool:
        """True if base and correction take states (S, B, *) at times (S, 1)."""
        return all(getattr(part, "broadcasts", False) for part in (self.base, self.correction))


class Residual(Corrected):
    """The velocity field ``base + correction``, with a frozen base (see `Corrected`)."""

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the velocity, of the shape of ``x``."""
        return self.base(x, t, cond) + self.correction(x, t, cond)


class Guided(nn.Module):
    """Classifier-free guidance v_u + w (v_c - v_u), which makes a velocity field of another.

    Both velocities come from one evaluation of ``field`` on 2B samples, the unconditional ones
    first; ``field`` must treat samples independently.  With w other than 0 and 1 the result is in
    general not E[X_1 - X_0 | X_t] of any X_1, so its ODE and its memoryless chain sample two
    different distributions.

    Arguments:
        field: conditional velocity field.
        weight: w; 0 is unconditional, 1 conditional, above 1 extrapolates.
        null_cond: the mapping that stands for "no condition".  Its tensors have leading size 1 and
            are expanded to the batch; entries of ``cond`` that it does not name are kept.
        null_field: velocity field of v_u where that is another one, such as the base of a tilted
            ``field``; it costs an evaluation of its own.

    Raises:
        ValueError: the weight is not finite, or a null condition has another leading size than 1.

    Source: Ho and Salimans, "Classifier-free diffusion guidance" (arXiv 2207.12598), eq. 6, in
    velocity form and with their 1 + w written w.
    """

    def __init__(
        self,
        field: VelocityField,
        weight: float,
        null_cond: Cond,
        *,
        null_field: VelocityField | None = None,
    ) -> None:
        super().__init__()
        if not math.isfinite(weight):
            raise ValueError(f"weight must be finite, got {weight}")
        for name, value in null_cond.items():
            if value.shape[:1] != (1,):
                raise ValueError(
                    f"null_cond[{name!r}] must have leading size 1, got shape {tuple(value.shape)}"
                )
        self.field = field
        self.weight = weight
        self.null_field = null_field
        self._names = tuple(null_cond)
        for name, value in null_cond.items():
            self.register_buffer(f"null_{name}", value)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the guided velocity, of the shape of ``x``.

        Raises:
            ValueError: ``cond`` lacks a name of ``null_cond``, has another leading size than ``x``,
                or a shape to which the null condition does not expand.
        """
        cond = {} if cond is None else cond
        missing = [name for name in self._names if name not in cond]
        if missing:
            raise ValueError(f"cond lacks {missing}, which null_cond names; got {sorted(cond)}")
        check_cond(cond, x)
        nulls = {name: self._null(name, cond[name]) for name in self._names}
        if self.null_field is not None:
            v_u = self.null_field(x, t, {**cond, **nulls})
            v_c = self.field(x, t, cond)
        else:
            both = {name: torch.cat([nulls.get(name, c), c]) for name, c in cond.items()}
            batched = isinstance(t, Tensor) and t.ndim > 0
            times = t.expand(x.shape[0]).repeat(2) if batched else t
            v_u, v_c = self.field(torch.cat([x, x]), times, both).chunk(2)
        return v_u + self.weight * (v_c - v_u)

    def _null(self, name: str, value: Tensor) -> Tensor:
        """Return the null condition in the shape and dtype of ``value`` (B, *)."""
        null: Tensor = getattr(self, f"null_{name}").to(value.dtype)
        try:
            return null.expand(value.shape)
        except RuntimeError as error:
            raise ValueError(
                f"null_cond[{name!r}] of shape {tuple(null.shape)} does not expand to "
                f"cond[{name!r}] of shape {tuple(value.shape)}"
            ) from error
