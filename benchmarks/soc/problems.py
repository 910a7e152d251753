r"""Stochastic optimal control problems whose optimal control is known.

    dX = (b(X) + σ u(X, t)) dt + σ dB on [0, 1],   minimise E[∫ ½‖u‖² + f(X) dt + g(X_1)].

The value function V gives u* = -σᵀ∇V.  All four are written in the coordinates σ⁻¹X, in which the
noise is standard, b becomes σ⁻¹ b(σ ·), and u* is the same:

- Ornstein-Uhlenbeck with quadratic costs, b = Ax, f = xᵀPx, g = xᵀQx, σ = I: V = xᵀF(t)x + c(t),
  dF/dt = -(FA + AᵀF) + 2F² - P, F(1) = Q, and u* = -2F(t)x.
- Ornstein-Uhlenbeck with a linear cost, b = Ax, g = ωᵀx: u* = -σᵀ e^{Aᵀ(1-t)} ω at every state.
- Double well, b = -∇Σκ_i(x_i²-1)², g = Σν_i(x_i²-1)²: V is a sum over the dimensions, and in each
  ψ = e^{-V} obeys the linear equation ∂ψ/∂t + bψ' + ½ψ'' = 0, ψ(1) = e^{-g} (Hopf and Cole).

Source: Domingo-Enrich et al., "Stochastic optimal control matching" (arXiv 2312.02027), section 5,
with its constants: dimensions 20, 20, 10, 10; the linear problem has A = -I + ξ, σ = I + ξ with
ξ_ij ~ N(0, 0.1²) and ω = 1; the double well has κ = 5, ν = 3 in three dimensions and 1 in the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from scipy.linalg import solve_banded
from torch import Tensor

from adjoint import ValueFunction
from flows import Cond, VelocityField

Array = NDArray[np.float64]
Control = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True, eq=False)
class ControlProblem:
    """A control problem with standard noise, and its optimal control.

    Attributes:
        name, dim: name of the problem, and dimension of a state.
        drift: b, as a velocity field (x, t, cond) → (B, dim).
        running: the cost f, (x, cond) → (B,), or None for no running cost.
        terminal: the cost g, (x, cond) → (B,).
        control: the optimal u*, (x, t) → (B, dim).
        start: (dim,) state at t = 0.
    """

    name: str
    dim: int
    drift: VelocityField
    running: ValueFunction | None
    terminal: ValueFunction
    control: Control
    start: Tensor


def linear_drift(A: Tensor) -> VelocityField:
    """Return the drift b(x) = A x."""

    def drift(x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        return x @ A.to(x).T

    return drift


def quadratic_form(P: Tensor) -> ValueFunction:
    """Return the function x ↦ xᵀPx."""

    def form(x: Tensor, cond: Cond | None = None) -> Tensor:
        return ((x @ P.to(x)) * x).sum(1)

    return form


def riccati(A: Tensor, P: Tensor, Q: Tensor) -> Callable[[float], Tensor]:
    """Return t ↦ F(t), (d, d) float64, the solution of the Riccati equation above."""
    a, p = A.double().numpy(), P.double().numpy()

    def backward(s: float, flat: Array) -> Array:  # s = 1 - t
        F = flat.reshape(a.shape)
        rate: Array = F @ a + a.T @ F - 2 * F @ F + p
        return rate.ravel()

    start = Q.double().numpy().ravel()
    solution = solve_ivp(backward, (0, 1), start, dense_output=True, rtol=1e-9, atol=1e-11).sol
    return lambda t: torch.from_numpy(solution(1 - t).reshape(a.shape))


def quadratic_ou(name: str, a: float, p: float, q: float, dim: int = 20) -> ControlProblem:
    """Make an Ornstein-Uhlenbeck problem with A = aI, P = pI, Q = qI, start from N(0, I/4)."""
    eye = torch.eye(dim)
    F = riccati(a * eye, p * eye, q * eye)
    return ControlProblem(
        name=name,
        dim=dim,
        drift=linear_drift(a * eye),
        running=quadratic_form(p * eye),
        terminal=quadratic_form(q * eye),
        control=lambda x, t: -2 * x @ F(t).to(x),
        start=0.5 * torch.randn(dim, generator=torch.Generator().manual_seed(0)),
    )


def linear_ou(dim: int = 10) -> ControlProblem:
    """Make an Ornstein-Uhlenbeck problem with a linear cost, in coordinates σ⁻¹X, start 0."""
    xi = 0.1 * torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)).double()
    eye = torch.eye(dim, dtype=torch.float64)
    A, sigma, omega = -eye + xi, eye + xi, torch.ones(dim, dtype=torch.float64)

    def terminal(x: Tensor, cond: Cond | None = None) -> Tensor:
        return x @ (sigma.T @ omega).to(x)

    def control(x: Tensor, t: float) -> Tensor:
        u = -sigma.T @ torch.linalg.matrix_exp(A.T * (1 - t)) @ omega
        return u.to(x).expand_as(x)

    return ControlProblem(
        name="ou_linear",
        dim=dim,
        drift=linear_drift(torch.linalg.solve(sigma, A @ sigma)),
        running=None,
        terminal=terminal,
        control=control,
        start=torch.zeros(dim),
    )


def log_psi_gradient(
    drift: Callable[[Array], Array],
    cost: Callable[[Array], Array],
    *,
    half_width: float = 2.75,
    cells: int = 1375,
    steps: int = 1000,
) -> tuple[Array, Array]:
    """Return states (N,) and the control u* = ∂ log ψ/∂x (steps+1, N) at t = 0, 1/steps, ..., 1.

    Crank-Nicolson in time with four implicit half-steps at the start (Rannacher), central
    differences in space, reflecting ends; ``drift`` and ``cost`` (g) are functions of one variable.
    """
    x = np.linspace(-half_width, half_width, cells + 1)
    dx, dt = x[1] - x[0], 1 / steps
    up, down = 0.5 / dx**2 + drift(x) / (2 * dx), 0.5 / dx**2 - drift(x) / (2 * dx)
    up[0], down[0], up[-1], down[-1] = up[0] + down[0], 0.0, 0.0, up[-1] + down[-1]
    middle = -(up + down)

    def implicit(psi: Array, tau: float) -> Array:
        bands = np.zeros((3, len(x)))
        bands[0, 1:], bands[1], bands[2, :-1] = -tau * up[:-1], 1 - tau * middle, -tau * down[1:]
        solved: Array = solve_banded((1, 1), bands, psi)
        return solved

    def explicit(psi: Array, tau: float) -> Array:
        above, below = np.append(psi[1:], 0.0), np.append(0.0, psi[:-1])
        stepped: Array = psi + tau * (up * above + middle * psi + down * below)
        return stepped

    psi = np.exp(-cost(x))
    rows = [psi]
    for i in range(steps):
        if i < 2:
            psi = implicit(implicit(psi, dt / 2), dt / 2)
        else:
            psi = implicit(explicit(psi, dt / 2), dt / 2)
        rows.append(psi)
    tiny = np.finfo(np.float64).tiny
    gradient: Array = np.gradient(np.log(np.maximum(np.stack(rows[::-1]), tiny)), dx, axis=1)
    return x, gradient


def well_control(kappa: float, nu: float) -> tuple[Array, Array]:
    """Return states and u* of one dimension of the double well, by `log_psi_gradient`."""
    return log_psi_gradient(lambda x: -4 * kappa * x * (x**2 - 1), lambda x: nu * (x**2 - 1) ** 2)


def double_well(dim: int = 10, hard: int = 3) -> ControlProblem:
    """Make a double well with κ = 5, ν = 3 in the first ``hard`` dimensions, from the origin."""
    kappa, nu = torch.ones(dim), torch.ones(dim)
    kappa[:hard], nu[:hard] = 5.0, 3.0
    tables = {}
    for key in {(k, n) for k, n in zip(kappa.tolist(), nu.tolist(), strict=True)}:
        states, u = well_control(*key)
        tables[key] = torch.from_numpy(u)
    low, dx, steps = float(states[0]), float(states[1] - states[0]), len(u) - 1
    table = torch.stack([tables[k, n] for k, n in zip(kappa.tolist(), nu.tolist(), strict=True)])

    def control(x: Tensor, t: float) -> Tensor:
        """Interpolate the control linearly in time and in the state."""
        k = min(int(t * steps), steps - 1)
        rows = torch.lerp(table[:, k], table[:, k + 1], t * steps - k).to(x)  # (dim, N)
        place = ((x - low) / dx).clamp(0, rows.shape[1] - 1.001)
        left = place.long()
        below, above = rows.gather(1, left.T).T, rows.gather(1, left.T + 1).T
        return torch.lerp(below, above, place - left)

    def drift(x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        return -4 * kappa.to(x) * x * (x.square() - 1)

    def terminal(x: Tensor, cond: Cond | None = None) -> Tensor:
        return (nu.to(x) * (x.square() - 1).square()).sum(1)

    return ControlProblem(
        name="double_well",
        dim=dim,
        drift=drift,
        running=None,
        terminal=terminal,
        control=control,
        start=torch.zeros(dim),
    )


PROBLEMS: dict[str, Callable[[], ControlProblem]] = {
    "ou_quadratic_easy": lambda: quadratic_ou("ou_quadratic_easy", 0.2, 0.2, 0.1),
    "ou_quadratic_hard": lambda: quadratic_ou("ou_quadratic_hard", 1.0, 1.0, 0.5),
    "ou_linear": linear_ou,
    "double_well": double_well,
}
