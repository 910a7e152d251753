"""Sampling a flow by its ODE, and the log-likelihood along it.

A sample solves dx/dt = v(x, t, cond) from noise at t = 0 to data at t = 1, by a solver of
torchdiffeq or by the two-step Adams-Bashforth method, which needs one evaluation per step and is of
second order:

    x_{k+1} = x_k + h_k ((1 + ω/2) v_k - (ω/2) v_{k-1}),   ω = h_k / h_{k-1},   first step Euler.

Likelihood: along a solution d log p_t(x_t)/dt = -∇·v(x_t, t) (Chen et al., arXiv 1806.07366,
eq. 8), hence, solving backward from x1,

    log p_1(x1) = log N(x0; 0, I) - ∫_0^1 ∇·v(x_t, t) dt.

The divergence is Σ_i e_iᵀ (∂v/∂x) e_i, exactly over the d unit vectors, or unbiasedly over random
signs e that stay fixed along the path (Hutchinson; Grathwohl et al., arXiv 1810.01367).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchdiffeq import odeint

from flows.field import Cond, VelocityField, check_velocity
from flows.grid import check_grid, uniform

FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "ab2")
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


@torch.no_grad()
def sample(
    field: VelocityField,
    x0: Tensor,
    *,
    grid: Tensor | int = 100,
    method: str = "midpoint",
    cond: Cond | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    trajectory: bool = False,
) -> Tensor:
    """Sample a flow: solve dx/dt = v(x, t, cond) from ``x0`` over the times of ``grid``.

    Arguments:
        field: velocity field; never evaluated outside the grid's range.
        x0: starting points, shape (B, *).
        grid: increasing times in [0, 1], or a number of uniform steps over [0, 1].  A fixed method
            steps on it; an adaptive one chooses its own steps and uses it for the output only.
        method: one of ``FIXED`` or ``ADAPTIVE``.
        cond: conditions of leading size B.
        rtol, atol: relative and absolute tolerance of the adaptive methods, of the root mean square
            over each sample's entries; the worst sample of the batch sets the steps of all.
        trajectory: return the states at all times of the grid.

    Returns:
        The last state (B, *), or all of them (K + 1, B, *); no gradient.

    Raises:
        ValueError: unknown method, bad grid, or a field that returns another shape.
        RuntimeError: an adaptive method could not reach its tolerance.
    """

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        return check_velocity(field(x, t, cond), x).to(x.dtype)

    times = _times(grid)
    states = _integrate(velocity, x0, times, method, rtol, atol, trajectory=trajectory)
    return states if trajectory else states[-1]


@torch.no_grad()
def log_likelihood(
    field: VelocityField,
    x1: Tensor,
    *,
    grid: Tensor | int = 100,
    method: str = "dopri5",
    divergence: str = "exact",
    probes: int = 1,
    cond: Cond | None = None,
    generator: torch.Generator | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Return the log density of the flow at ``x1`` in nats, and the noise the points come from.

    Arguments:
        field: velocity field, differentiable in x.
        x1: points, shape (B, *), at the last time of ``grid``.
        grid: as for `sample`; must start at 0.  Ending at t < 1 gives the density of X_t.
        method: as for `sample`.
        divergence: "exact" (d backward passes per evaluation) or "hutchinson" (``probes`` of them).
        probes: random sign vectors per point for "hutchinson".
        cond: conditions of leading size B.
        generator: source of the sign vectors.
        rtol, atol: as for `sample`.

    Returns:
        log p(x1), shape (B,), and x0, shape (B, *); no gradient.

    Raises:
        ValueError: unknown method or divergence, ``probes`` < 1, a grid that does not start at 0,
            or a field that returns another shape.
        RuntimeError: an adaptive method could not reach its tolerance.
    """
    times = _times(grid)
    if times[0] != 0:
        raise ValueError(
            f"grid must start at 0, where the distribution is N(0, I), got {float(times[0])}"
        )
    flat = x1.flatten(1)
    vectors = _trace_vectors(flat, divergence, probes, generator)
    scale = 1.0 / probes if divergence == "hutchinson" else 1.0

    def velocity_and_divergence(t: Tensor, state: Tensor) -> Tensor:
        with torch.enable_grad():
            x = state[:, :-1].detach().reshape(x1.shape).requires_grad_(True)
            v = check_velocity(field(x, t, cond), x).to(x.dtype)
        trace = scale * _trace(v, x, vectors)
        return torch.cat([v.detach().flatten(1), trace[:, None]], dim=1)

    start = torch.cat([flat, flat.new_zeros(len(flat), 1)], dim=1)
    end = _integrate(velocity_and_divergence, start, times.flip(0), method, rtol, atol)[-1]
    x0, change = end[:, :-1], end[:, -1]  # change = ∫ from 1 to 0 of the divergence
    log_p0 = -0.5 * (x0.square() + math.log(2 * math.pi)).sum(1)
    return log_p0 + change, x0.reshape(x1.shape)


def _trace_vectors(
    flat: Tensor, divergence: str, probes: int, generator: torch.Generator | None
) -> Sequence[Tensor]:
    """Return vectors e, each (B, d), whose sum of eᵀ J e estimates (or is) the trace of J."""
    if divergence == "exact":
        eye = torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device)
        return [row.expand_as(flat) for row in eye]
    if divergence != "hutchinson":
        raise ValueError(f"divergence must be 'exact' or 'hutchinson', got {divergence!r}")
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    bits = torch.randint(0, 2, (probes, *flat.shape), generator=generator, device=flat.device)
    return list((2 * bits - 1).to(flat.dtype))


def _trace(v: Tensor, x: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """Return Σ_e eᵀ (∂v/∂x) e per point, (B,); frees the graph of ``v`` at the last vector."""
    total = x.new_zeros(x.shape[0])
    if not v.requires_grad:  # a constant velocity has no divergence
        return total
    for i, e in enumerate(vectors):
        keep = i < len(vectors) - 1
        (row,) = torch.autograd.grad(
            v, x, e.reshape(x.shape), retain_graph=keep, allow_unused=True, materialize_grads=True
        )
        total = total + (row.flatten(1) * e).sum(1)
    return total


def _times(grid: Tensor | int) -> Tensor:
    """Return the checked grid of times, or a uniform one for a number of steps."""
    return check_grid(uniform(grid) if isinstance(grid, int) else grid)


def _integrate(
    velocity: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    times: Tensor,
    method: str,
    rtol: float,
    atol: float,
    *,
    trajectory: bool = False,
) -> Tensor:
    """Return the states at all ``times`` (monotone), or at the first and last, stacked."""
    if method not in FIXED + ADAPTIVE:
        raise ValueError(f"method must be one of {', '.join(FIXED + ADAPTIVE)}, got {method!r}")
    times = times.to(device=start.device, dtype=torch.float64)
    output = times if trajectory else times[[0, -1]]
    if method == "ab2":
        return _adams_bashforth(velocity, start, times, trajectory)
    if method in FIXED:
        on_grid = {"grid_constructor": lambda func, y, t: times}
        return odeint(velocity, start, output, method=method, options=on_grid)
    if not len(start):
        return start.expand(len(output), *start.shape)
    low, high = times.min(), times.max()

    def inside(t: Tensor, x: Tensor) -> Tensor:
        # The search for a first step may look beyond the end, where a field need not be defined.
        return velocity(t.clamp(low, high).to(x.dtype), x)

    def worst(error: Tensor) -> Tensor:
        # torchdiffeq's own norm is over the batch, where the many hide what the few lack.
        return error.flatten(1).square().mean(1).amax().sqrt()

    # the last step ends on the last time instead of beyond it
    options = {"step_t": times[-1:], "norm": worst}
    try:
        return odeint(inside, start, output, method=method, rtol=rtol, atol=atol, options=options)
    except AssertionError as error:  # how torchdiffeq reports it
        raise RuntimeError(f"{method} could not integrate the field: {error}") from error


def _adams_bashforth(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Tensor, trajectory: bool
) -> Tensor:
    """Integrate by the two-step Adams-Bashforth method of the module docstring on any grid."""
    states, previous, ratio = [x], None, 0.0
    steps = times.diff().tolist()
    for k, h in enumerate(steps):
        v = velocity(times[k].to(x.dtype), x)
        if previous is not None:
            ratio = h / steps[k - 1]
        x = x + h * (v if previous is None else (1 + ratio / 2) * v - ratio / 2 * previous)
        previous = v
        states = [*states, x] if trajectory else [states[0], x]
    return torch.stack(states)
