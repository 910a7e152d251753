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
from functools import partial

import torch
from torch import Tensor

from adjoint.chain.conditional_covariance import noise_pull
from adjoint.chain.kernels import Kernel
from adjoint.chain.rollout import Trajectory, by_micro_batches, rows_of, velocity_along
from flows.autodiff import velocity_and_vjp
from flows.field import Cond, VelocityField


@dataclass(frozen=True)
class Adjoint:
    """Adjoints along a trajectory.

    Attributes:
        values: (K+1, B, *) λ_k, the last one -∇r(x_K).
        v_base: (K, B, *) base velocity at (x_k, t_k).
    """

    values: Tensor
    v_base: Tensor


def lean_adjoint(
    base: VelocityField,
    kernel: Kernel,
    xs: Tensor,
    terminal: Tensor,
    cond: Cond | None = None,
    *,
    noise: Tensor | None = None,
    running: Tensor | None = None,
    control_variates: Tensor | None = None,
    micro_batch: int = 0,
    device: torch.device | str | None = None,
) -> Adjoint:
    """Lean adjoint of the base along states xs (K+1, B, *) from ``terminal`` = -∇r(x_K) (B, *).

    Arguments:
        noise: (K, B, *) step noises of the trajectory, which the adjoint of a chain with full
            covariance needs (`adjoint.chain.conditional_covariance`); unused otherwise.
        running: (K, B, *) gradient of a running state cost at x_k, times the step; for control
            problems other than tilting, which have none.
        control_variates: (K, B, *) what is added to λ_1 … λ_K before they are carried on; see
            `adjoint.chain.control_variates`.
        micro_batch, device: see `adjoint.chain.rollout`; by default all B, and where xs is.

    Adjoints have the dtype of xs, also where the base computes in another one.  The product costs a
    forward and a backward pass a step and also yields v_β(x_k, t_k) where the rule reads it at that
    time; the others are evaluated in one batch (of ``micro_batch`` states, if that is smaller).  A
    base that has the method ``linearised`` (`flows.field`) makes the forward passes of all steps in
    one batch too, so that only the backward ones follow each other.

    Raises:
        ValueError: the kernel has full covariance and no noise is given.
    """
    if kernel.start_covariance is not None and noise is None:
        raise ValueError(f"noise of the trajectory is needed with kernel {kernel.name!r}, got None")
    if 0 < micro_batch < len(terminal):

        def run(i: slice) -> tuple[Tensor, Tensor]:
            part = lean_adjoint(
                base,
                kernel,
                xs[:, i],
                terminal[i],
                rows_of(cond, i),
                noise=None if noise is None else noise[:, i],
                running=None if running is None else running[:, i],
                control_variates=None if control_variates is None else control_variates[:, i],
                micro_batch=micro_batch,
                device=device,
            )
            return part.values, part.v_base

        return Adjoint(*by_micro_batches(run, len(terminal), micro_batch))
    home, device = xs.device, torch.device(device or xs.device)
    cond = rows_of(cond, slice(None), device)
    value = terminal.detach().to(device, xs.dtype)
    values, own = [value.to(home)], {}
    t, adjoint_x, adjoint_v = (
        column.to(xs.dtype).unbind()
        for column in (kernel.adjoint_t, kernel.adjoint_x, kernel.adjoint_v)
    )
    linearised = getattr(base, "linearised", None)
    if linearised is not None:
        vs, pull = linearised(xs[:-1].to(device), kernel.adjoint_t.to(xs.dtype), cond)
    for k in reversed(range(kernel.steps)):
        x = xs[k].to(device)
        whole = value if control_variates is None else value + control_variates[k].to(device)
        if linearised is None:
            v, product = velocity_and_vjp(base, x, t[k], whole, cond)
        else:
            v, product = vs[k], pull(k, whole)
        carried = adjoint_x[k] * whole + adjoint_v[k] * product
        if kernel.start_covariance is not None and noise is not None:
            scale = kernel.adjoint_scale[k + 1] / kernel.adjoint_scale[k]
            eps = noise[k].to(device)
            carried = carried + scale * noise_pull(base, kernel, k, x, eps, value, cond)
        value = carried
        if running is not None:
            value = value + running[k].to(device) / kernel.adjoint_scale[k]
        values.append(value.to(home))
        if kernel.own_time[k]:
            own[k] = v.to(home, xs.dtype)
    along = partial(velocity_along, base, cond=cond, micro_batch=micro_batch, device=device)
    v_base = _at_own_time(along, kernel, xs, own)
    return Adjoint(torch.stack(values[::-1]), v_base)


@torch.no_grad()
def _at_own_time(
    along: Callable[[Tensor, Tensor], Tensor], kernel: Kernel, xs: Tensor, own: dict[int, Tensor]
) -> Tensor:
    """v_β(x_k, t_k), evaluating those steps whose adjoint was read at another time."""
    if not own:
        return along(xs[:-1], kernel.t[:-1]).to(xs.dtype)
    other = [k for k in range(kernel.steps) if k not in own]
    if other:
        # A list as index would be sent to the device, and be waited for.
        states, times = (torch.stack([column[k] for k in other]) for column in (xs, kernel.t))
        own |= zip(other, along(states, times).to(xs.dtype), strict=True)
    return torch.stack([own[k] for k in range(kernel.steps)])


def scalar_adjoint(
    base: VelocityField,
    kernel: Kernel,
    xs: Tensor,
    terminal: Tensor,
    cond: Cond | None = None,
) -> Adjoint:
    """Scalar adjoint, c_k = -∇r(x_K) at every step; arguments as for `lean_adjoint`."""
    own_time = kernel.adjoint_scale[0] < 1  # there λ is c, elsewhere t c
    scale = torch.where(own_time, 1.0, kernel.t).to(xs.dtype)
    values = scale.reshape(-1, *([1] * terminal.ndim)) * terminal.detach()
    with torch.no_grad():
        v_base = velocity_along(base, xs[:-1], kernel.t[:-1], cond).to(xs.dtype)
    return Adjoint(values, v_base)


def full_adjoint(
    field: VelocityField,
    base: VelocityField,
    kernel: Kernel,
    trajectory: Trajectory,
    terminal: Tensor,
    cond: Cond | None = None,
) -> Adjoint:
    """Full adjoint of the tilted chain, in the variable λ of the kernel.

    At t = 0, where a = t c vanishes whatever c is, it is 0 for the own-time kernels too.

    Raises:
        ValueError: the kernel's adjoint is not the Jacobian of its own mean, or its noise has a
            covariance that depends on the state.
    """
    if not kernel.is_exact_adjoint or kernel.start_covariance is not None:
        raise ValueError(f"the full adjoint is not defined for kernel {kernel.name!r}")
    a = terminal.detach()
    values, v_base = [a / kernel.adjoint_scale[-1]], []
    for k in reversed(range(kernel.steps)):
        x, mean_v = trajectory.xs[k], kernel.mean_v[k]
        t = kernel.t[k].to(x.dtype)
        if kernel.noiseless_last and k == kernel.steps - 1:
            v, product = velocity_and_vjp(base, x, t, mean_v * a, cond)
        else:
            with torch.no_grad():
                v = base(x, t, cond)
            pull = (mean_v / kernel.std[k]) ** 2 * (trajectory.v[k] - v)
            _, product = velocity_and_vjp(field, x, t, mean_v * a + pull, cond)
            product = product - velocity_and_vjp(base, x, t, pull, cond)[1]
        a = kernel.mean_x[k] * a + product
        values.append(a / kernel.adjoint_scale[k])
        v_base.append(v.to(x.dtype))
    return Adjoint(torch.stack(values[::-1]), torch.stack(v_base[::-1]))
