"""Checks that a velocity field keeps the promises of `flows.field`; for tests of a new field.

    from flows.testing import check_velocity_field

    def test_my_field():
        check_velocity_field(MyField(dim=3), torch.randn(5, 3))

The rules are the functions of `RULES`.  A field that keeps them can be sampled, trained, wrapped,
and tilted.  They are about the calls, not about the values: that a field transports noise to data
is for tests of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flows.autodiff import velocity_and_vjp
from flows.field import Cond, VelocityField, check_velocity


@dataclass(frozen=True)
class Case:
    """A field and the states at which its rules are checked."""

    field: VelocityField
    x: Tensor
    """States (B, *)."""
    t: Tensor
    """Times (B,), different for each state."""
    cond: Cond | None
    rtol: float
    atol: float

    def same(self, found: Tensor, expected: Tensor, rule: str) -> None:
        """Compare two tensors.

        Raises:
            AssertionError: they differ; the message starts with the rule.
        """
        torch.testing.assert_close(
            found, expected, rtol=self.rtol, atol=self.atol, msg=lambda text: f"{rule}: {text}"
        )

    def rows(self, rows: Any) -> tuple[Tensor, Tensor, Cond | None]:
        """Select states, times and conditions."""
        cond = None if self.cond is None else {name: c[rows] for name, c in self.cond.items()}
        return self.x[rows], self.t[rows], cond


def check_velocity_field(
    field: VelocityField,
    x: Tensor,
    cond: Cond | None = None,
    *,
    times: tuple[float, float] = (0.2, 0.8),
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> None:
    """Check that a velocity field keeps every rule of `RULES`.

    A module is checked in evaluation mode and left in the mode in which it came.  Its parameters
    get gradients, which are dropped at the end.

    Arguments:
        field: the velocity field v(x, t, cond).
        x: states (B, *) at which it can be evaluated, with B at least 2.
        cond: conditions of leading size B, if the field needs them.
        times: the lowest and the highest time at which the field is evaluated.
        rtol, atol: how far numbers that should be equal may differ.

    Raises:
        ValueError: ``x`` has fewer than two rows.
        AssertionError: a rule is broken; the message says which.
    """
    if x.ndim < 2 or len(x) < 2:
        raise ValueError(f"x must have shape (B, *) with B at least 2, got {tuple(x.shape)}")
    t = torch.linspace(*times, len(x), dtype=x.dtype, device=x.device)
    with _evaluating(field):
        for rule in RULES:
            rule(Case(field, x, t, cond, rtol, atol))


def check_shape(case: Case) -> None:
    """Check that velocities are finite floating-point tensors of the shape of the states."""
    v = case.field(case.x, case.t, case.cond)
    try:
        check_velocity(v, case.x)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"shape: {error}") from error
    assert bool(v.isfinite().all()), f"values: the velocity is not finite at {case.x} and {case.t}"
    case.same(case.field(case.x, case.t, case.cond), v, "two evaluations must give the same")


def check_times(case: Case) -> None:
    """Check that a scalar time stands for the same time in all rows."""
    t = case.t[0]
    expected = case.field(case.x, t.expand(len(case.x)), case.cond)
    case.same(case.field(case.x, t, case.cond), expected, "a scalar time must stand for (B,) times")


def check_rows(case: Case) -> None:
    """Check that the velocity of a row depends on the state, time and conditions of that row."""
    v = case.field(case.x, case.t, case.cond)
    for i in range(len(case.x)):
        alone = case.field(*case.rows(slice(i, i + 1)))
        case.same(v[i : i + 1], alone, f"rows must not mix, but row {i} differs from it alone")


def check_broadcasts(case: Case) -> None:
    """Check that a field with a true ``broadcasts`` takes states (S, B, *) at times (S, 1)."""
    if not getattr(case.field, "broadcasts", False):
        return
    xs, ts = torch.stack([case.x, 2 * case.x, -case.x]), case.t[[0, -1, 1]]
    expected = [case.field(x, t, case.cond) for x, t in zip(xs, ts, strict=True)]
    found = case.field(xs, ts[:, None], case.cond)
    case.same(found, torch.stack(expected), "broadcasts is true, so (S, B, *) at (S, 1) must work")


def check_linearised(case: Case) -> None:
    """Check that ``linearised`` gives the velocities and vector-Jacobian products of the field."""
    linearised = getattr(case.field, "linearised", None)
    if linearised is None:
        return
    xs, ts = torch.stack([case.x, 2 * case.x]), case.t[[0, -1]]
    vs, pull = linearised(xs, ts, case.cond)
    for k in (1, 0):
        cotangent = (1 + k) * case.x.cos()
        v, product = velocity_and_vjp(case.field, xs[k], ts[k], cotangent, case.cond)
        case.same(vs[k], v, "linearised must give the velocities of the field")
        case.same(pull(k, cotangent), product, "linearised must give (dv/dx)^T c")


def check_derivative(case: Case) -> None:
    """Check that the vector-Jacobian product is that of the velocity, and that states stay as is.

    The product is held against a central difference along a direction.  A field that is detached
    from its states would pass for one that does not depend on them, and tilts by it would be wrong.
    """
    x, before = case.x, case.x.clone()
    direction, cotangent = (2 * x).sin(), x.cos()
    _, product = velocity_and_vjp(case.field, x, case.t, cotangent, case.cond)
    assert torch.equal(x, before), "the field must not change its states in place"
    h = torch.finfo(x.dtype).eps ** (1 / 3)
    with torch.no_grad():
        there, back = (case.field(x + s * h * direction, case.t, case.cond) for s in (1, -1))
    change = ((there - back) / (2 * h) * cotangent).flatten(1).sum(1)
    found = (product * direction).flatten(1).sum(1)
    size = float(change.abs().amax() + found.abs().amax())
    assert float((found - change).abs().amax()) <= 0.05 * size + 10 * h, (
        f"derivative: (dv/dx)^T c along a direction is {found.tolist()}, but differences of the "
        f"velocity give {change.tolist()}: the field must be differentiable in its states"
    )


def check_copies(case: Case) -> None:
    """Check that a deep copy, and one that loads the state dict, give the same velocities."""
    expected = case.field(case.x, case.t, case.cond)
    clone = replace(case, field=copy.deepcopy(case.field))
    case.same(clone.field(case.x, case.t, case.cond), expected, "a deep copy must give the same")
    if not isinstance(clone.field, nn.Module) or not isinstance(case.field, nn.Module):
        return
    with torch.no_grad():
        for parameter in clone.field.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(1)
    case.same(
        case.field(case.x, case.t, case.cond),
        expected,
        "a deep copy must not share what is trained",
    )
    clone.field.load_state_dict(case.field.state_dict())
    found = clone.field(case.x, case.t, case.cond)
    case.same(found, expected, "a copy that loads the state dict must give the same")


def check_gradients(case: Case) -> None:
    """Check that every parameter that requires a gradient gets a finite one."""
    if not isinstance(case.field, nn.Module):
        return
    named = [(name, p) for name, p in case.field.named_parameters() if p.requires_grad]
    if not named:
        return
    case.field(case.x, case.t, case.cond).square().sum().backward()
    for name, parameter in named:
        gradient = parameter.grad
        assert gradient is not None, f"gradients: none reaches the parameter {name}"
        assert bool(gradient.isfinite().all()), f"gradients: that of {name} is not finite"


Rule = Callable[[Case], None]
RULES: tuple[Rule, ...] = (
    check_shape,
    check_times,
    check_rows,
    check_broadcasts,
    check_linearised,
    check_derivative,
    check_copies,
    check_gradients,
)
"""The rules that every velocity field keeps, each a function that raises AssertionError."""


@contextmanager
def _evaluating(field: VelocityField) -> Iterator[None]:
    """Put a module into evaluation mode, and its modes and gradients back afterwards."""
    if not isinstance(field, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in field.modules()]
    gradients = [(parameter, parameter.grad) for parameter in field.parameters()]
    field.eval().zero_grad(set_to_none=True)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient
