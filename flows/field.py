"""What a flow is to this package: a velocity field, and the wrappers that compose velocity fields.

A velocity field is any callable ``v(x, t, cond)`` with ``x`` of shape (B, *), ``t`` a scalar
tensor or one of shape (B,), and ``cond`` one explicit mapping from names to tensors of leading
size B (or ``None``).  It returns a tensor of the shape of ``x``.  Time runs from noise at t = 0 to
data at t = 1 along the canonical path X_t = t X_1 + (1 - t) X_0 (see ``flows.path``).

Wrappers are modules, so they move between devices, are found by optimisers, and nest: guidance of
a residual on a frozen base is ``Guided(Residual(frozen(base), correction), ...)``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

Cond = Mapping[str, Tensor]
Field = TypeVar("Field")


class VelocityField(Protocol):
    """A callable ``v(x, t, cond)`` on the canonical path; see the module docstring for shapes."""

    def __call__(self, x: Tensor, t: Tensor, cond: Cond | None = None, /) -> Tensor:
        """Velocity at ``x`` (B, *) and time ``t`` (scalar or (B,)), with the shape of ``x``."""
        ...


def batch_time(t: Tensor | float, x: Tensor) -> Tensor:
    """``t`` (scalar or (B,)) in the dtype and device of ``x``, shaped to broadcast against it.

    Returns shape (1, ..., 1) for a scalar and (B, 1, ..., 1) for a batch of times.
    """
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    return t.reshape(-1, *([1] * (x.ndim - 1)))


def check_velocity(v: Tensor, x: Tensor, name: str = "field") -> Tensor:
    """``v`` itself if it is a floating tensor of the shape of ``x``.

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


def velocity_and_vjp(
    field: VelocityField, x: Tensor, t: Tensor, cotangent: Tensor, cond: Cond | None = None
) -> tuple[Tensor, Tensor]:
    """Velocity v(x, t) and the vector-Jacobian product (dv/dx)^T cotangent, both detached.

    One forward and one backward pass; parameters receive no gradient.  Shapes: all (B, *).
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        v = field(x, t, cond)
        if not v.requires_grad:  # a constant velocity has a zero Jacobian
            return v.detach(), torch.zeros_like(x)
        (product,) = torch.autograd.grad(v, x, cotangent.to(v.dtype), allow_unused=True)
    return v.detach(), torch.zeros_like(x) if product is None else product


def frozen(field: Field) -> Field:
    """A copy of ``field`` that no optimiser changes: evaluation mode, no parameter gradients.

    Fields that are not modules are returned as they are: they hold no parameters.
    """
    if not isinstance(field, nn.Module):
        return field
    clone = copy.deepcopy(field).eval()
    return clone.requires_grad_(False)


class Residual(nn.Module):
    """``base + correction``: the base never receives parameter gradients, the correction does.

    Arguments:
        base: velocity field, copied and frozen.
        correction: module with the same call; zero-initialise its last layer to start at the base.
    """

    def __init__(self, base: VelocityField, correction: nn.Module) -> None:
        super().__init__()
        self.base = frozen(base)
        self.correction = correction

    def train(self, mode: bool = True) -> Residual:
        """Switch the correction only: the frozen base stays in evaluation mode."""
        super().train(mode)
        if isinstance(self.base, nn.Module):
            self.base.eval()
        return self

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Velocity of the shape of ``x``."""
        return self.base(x, t, cond) + self.correction(x, t, cond)


class Guided(nn.Module):
    """Classifier-free guidance v_u + w (v_c - v_u) as a velocity field.

    Arguments:
        field: conditional velocity field.
        weight: w; 0 is unconditional, 1 conditional, above 1 extrapolates.
        null_cond: the mapping that stands for "no condition".  Its tensors have leading size 1 and
            are expanded to the batch; entries of ``cond`` that it does not name are kept.

    Source: Ho and Salimans, "Classifier-free diffusion guidance" (arXiv 2207.12598), eq. 6, in
    velocity form and with their 1 + w written w.
    """

    def __init__(self, field: VelocityField, weight: float, null_cond: Cond) -> None:
        super().__init__()
        for name, value in null_cond.items():
            if value.shape[:1] != (1,):
                raise ValueError(
                    f"null_cond[{name!r}] must have leading size 1, got shape {tuple(value.shape)}"
                )
        self.field = field
        self.weight = weight
        self._names = tuple(null_cond)
        for name, value in null_cond.items():
            self.register_buffer(f"null_{name}", value)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Guided velocity of the shape of ``x``.

        Raises:
            ValueError: ``cond`` lacks a name of ``null_cond``.
        """
        cond = {} if cond is None else cond
        missing = [name for name in self._names if name not in cond]
        if missing:
            raise ValueError(f"cond lacks {missing}, which null_cond names; got {sorted(cond)}")
        nulls = {
            name: getattr(self, f"null_{name}").expand(x.shape[0], *cond[name].shape[1:])
            for name in self._names
        }
        v_u = self.field(x, t, {**cond, **nulls})
        v_c = self.field(x, t, cond)
        return v_u + self.weight * (v_c - v_u)
