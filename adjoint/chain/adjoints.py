r"""The lean adjoint along a trajectory, and the full and scalar adjoints for comparison.

Lean (Domingo-Enrich et al. 2409.08861, eq. 38-39): the terms of the adjoint equation that vanish in
expectation at the optimum are left out, so that only the base is differentiated.  In continuous
time da/dt = -(∇(2v_β - x/t))ᵀ a, a_1 = -∇r(X_1); with c = a/t, dc/dt = -2 (∇v_β)ᵀ c.
Discretely λ_k = adjoint_x λ_{k+1} + adjoint_v J(x_k, adjoint_t)ᵀ λ_{k+1}: one vector-Jacobian
product a step, memory independent of the number of steps but for the stored trajectory.

Full (eq. 22-23 there): the gradient of the cost of the tilted chain itself,
a_k = ∂/∂x_k [Σ_{j≥k} ‖d_j‖²/(2 std_j²) - r(x_K)] with d = mean_v (v_θ - v_β), which needs
vector-Jacobian products of both fields.

Scalar (2610.10437): c is held constant, a_t = t a_1.  No product at all, and not the exact tilt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adjoint.chain.kernels import Kernel
from adjoint.chain.rollout import Trajectory
from adjoint.evaluator import Evaluator
from flows.field import Cond, VelocityField


@dataclass(frozen=True)
class Adjoint:
    """The adjoints along a trajectory, and the base velocities that came with them.

    Attributes:
        values: (K+1, B, *) λ_k, the last one -∇r(x_K).
        v_base: (K, B, *) base velocity at (x_k, t_k).
    """

    values: Tensor
    v_base: Tensor


def lean_adjoint(
    base: VelocityField | Evaluator,
    kernel: Kernel,
    xs: Tensor,
    terminal: Tensor,
    cond: Cond | None = None,
    *,
    noise: Tensor | None = None,
    running: Tensor | None = None,
    control_variates: Tensor | None = None,
) -> Adjoint:
    """Return the lean adjoint of the base along a trajectory.

    Arguments:
        base: velocity field of the base, or an evaluator of it.
        kernel: table of the chain.
        xs: (K+1, B, *) states of the trajectory.
        terminal: (B, *) -∇r at the end x_K, with which the adjoint starts.
        cond: conditions with leading size B.
        noise: (K, B, *) step noises of the trajectory, which the adjoint of a chain with a
            state-dependent noise needs; unused otherwise.
        running: (K, B, *) gradient of a running state cost at x_k, times the step; for control
            problems other than tilting, which have none.
        control_variates: (K, B, *) tensor that is added to λ_1 … λ_K before they are carried on;
            see `adjoint.chain.control_variates`.

    Adjoints have the dtype and device of xs.  The vector-Jacobian product costs a forward and a
    backward pass a step and also yields v_β(x_k, t_k) where the rule reads it at that time; the
    other velocities are evaluated in one batch.

    Raises:
        ValueError: the kernel has a state-dependent noise and no noise is given.
    """
    if kernel.state_noise is not None and noise is None:
        raise ValueError(f"noise of the trajectory is needed with kernel {kernel.name!r}, got None")
    base = Evaluator.of(base)
    value = terminal.detach().to(xs.device, xs.dtype)
    values, own = [value], {}
    adjoint_t, adjoint_x, adjoint_v = (
        column.to(xs.device, xs.dtype)
        for column in (kernel.adjoint_t, kernel.adjoint_x, kernel.adjoint_v)
    )
    scales = kernel.adjoint_scale.to(xs.device)
    factors_x, factors_v = adjoint_x.unbind(), adjoint_v.unbind()
    pull = base.pullbacks(xs[:-1], adjoint_t, cond)
    for k in reversed(range(kernel.steps)):
        whole = value if control_variates is None else value + control_variates[k]
        v, product = pull(k, whole)
        carried = factors_x[k] * whole + factors_v[k] * product
        if kernel.state_noise is not None and noise is not None:
            of_noise = _noise_pull(kernel, base, k, xs[k], noise[k], value, cond)
            carried = carried + scales[k + 1] / scales[k] * of_noise
        value = carried
        if running is not None:
            value = value + running[k] / scales[k]
        values.append(value)
        if kernel.own_time[k]:
            own[k] = v.to(xs.dtype)
    v_base = _at_own_time(lambda states, t: base.along(states, t, cond), kernel, xs, own)
    return Adjoint(torch.stack(values[::-1]), v_base)


def _noise_pull(
    kernel: Kernel,
    base: Evaluator,
    k: int,
    x: Tensor,
    noise: Tensor,
    adjoint: Tensor,
    cond: Cond | None,
) -> Tensor:
    """Return the term (B, *) that the state-dependent noise of step k adds to its adjoint."""
    of_state = kernel.state_noise
    assert of_state is not None

    def run(x: Tensor, noise: Tensor, adjoint: Tensor, cond: Cond | None) -> tuple[Tensor]:
        return (of_state.pull(base.field, k, x, noise, adjoint, cond),)

    return base.map(run, x, noise, adjoint, cond=cond)[0]


@torch.no_grad()
def _at_own_time(
    along: Callable[[Tensor, Tensor], Tensor], kernel: Kernel, xs: Tensor, own: dict[int, Tensor]
) -> Tensor:
    """Return base velocities v_β(x_k, t_k), (K, B, *), from those known at some steps already.

    Arguments:
        along: evaluates the base at states (S, B, *) and times (S,).
        own: velocities (B, *) by step, where the adjoint was read at the step's own time.
    """
    times = kernel.t.to(xs.device)
    if not own:
        return along(xs[:-1], times[:-1]).to(xs.dtype)
    other = [k for k in range(kernel.steps) if k not in own]
    if other:
        # A list as index would be sent to the device, and be waited for.
        states, some = (torch.stack([column[k] for k in other]) for column in (xs, times))
        own |= zip(other, along(states, some).to(xs.dtype), strict=True)
    return torch.stack([own[k] for k in range(kernel.steps)])


def scalar_adjoint(
    base: VelocityField | Evaluator,
    kernel: Kernel,
    xs: Tensor,
    terminal: Tensor,
    cond: Cond | None = None,
) -> Adjoint:
    """Return the scalar adjoint, c_k = -∇r(x_K) at every step; arguments as for `lean_adjoint`."""
    own_time = kernel.adjoint_scale[0] < 1  # there λ is c, elsewhere t c
    scale = torch.where(own_time, 1.0, kernel.t).to(xs.dtype)
    values = scale.reshape(-1, *([1] * terminal.ndim)) * terminal.detach()
    with torch.no_grad():
        v_base = Evaluator.of(base).along(xs[:-1], kernel.t[:-1], cond).to(xs.dtype)
    return Adjoint(values, v_base)


def full_adjoint(
    field: VelocityField | Evaluator,
    base: VelocityField | Evaluator,
    kernel: Kernel,
    trajectory: Trajectory,
    terminal: Tensor,
    cond: Cond | None = None,
) -> Adjoint:
    """Return the full adjoint of the tilted chain, in the variable λ of the kernel.

    At t = 0, where a = t c vanishes whatever c is, it is 0 for the own-time kernels too.

    Raises:
        ValueError: the kernel's adjoint is not the Jacobian of its own mean, or its noise depends
            on the state.
    """
    if not kernel.is_exact_adjoint or kernel.state_noise is not None:
        raise ValueError(f"the full adjoint is not defined for kernel {kernel.name!r}")
    field, base = Evaluator.of(field), Evaluator.of(base)
    a = terminal.detach()
    values, v_base = [a / kernel.adjoint_scale[-1]], []
    for k in reversed(range(kernel.steps)):
        x, mean_v = trajectory.xs[k], kernel.mean_v[k]
        t = kernel.t[k].to(x.dtype)
        if kernel.noiseless_last and k == kernel.steps - 1:
            v, product = base.velocity_and_vjp(x, t, mean_v * a, cond)
        else:
            with torch.no_grad():
                v = base.at(x, t, cond)
            pull = (mean_v / kernel.std[k]) ** 2 * (trajectory.v[k] - v)
            _, product = field.velocity_and_vjp(x, t, mean_v * a + pull, cond)
            product = product - base.velocity_and_vjp(x, t, pull, cond)[1]
        a = kernel.mean_x[k] * a + product
        values.append(a / kernel.adjoint_scale[k])
        v_base.append(v.to(x.dtype))
    return Adjoint(torch.stack(values[::-1]), torch.stack(v_base[::-1]))
