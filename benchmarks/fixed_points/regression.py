r"""Fixed points of adjoint matching in one dimension: its solutions without noise.

Adjoint matching is a regression on states that its own solution visits.  With a velocity free to
take any value at every state and step, the solution v_θ satisfies, with the columns of the scheme's
kernel (`adjoint.chain`), J the Jacobian of v_β and Λ_K = -r',

    M_k(x)  = E[Λ_{k+1}(x_{k+1}) | x_k = x],     x_{k+1} = mean_x x + mean_v v_θ(x, t_k) + std ε,
    Λ_k(x)  = (adjoint_x + adjoint_v J(x, adjoint_t)) M_k(x)  =  E[λ_k | x_k = x],
              plus (scale_{k+1} / scale_k) L'(x) E[ε Λ_{k+1}] where the noise is L(x) ε,
    v_θ(x, t_k) = v_β(x, t_k) - (residual_a / residual_v) · (M_k if residual_at_next else Λ_k)(x).

Solved backward in k on a grid of states, M_k by quadrature.  The mean of the step
depends on v_θ(x, t_k), so every state has a scalar equation to solve; where modes are apart some
states have several roots, and the solver takes the root that the regression itself reaches from
v_β, the first in the direction of its target.  With importance weights the expectation is under the
tilted base chain and explicit: with h_k(x) = E_β[h_{k+1}(x_{k+1}) | x_k = x] and h_K = e^r,
M_k(x) = E_β[h_{k+1} Λ_{k+1} | x_k = x] / h_k(x).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from adjoint import Kernel
from benchmarks.fixed_points.problems import Array, Problem, base_step
from benchmarks.fixed_points.quadrature import Curve, Expectation, gaussian_sums
from flows import velocity_and_vjp

SCAN = np.linspace(0.0, 1.0, 161) ** 2
"""Corrections at which a sign change is sought, as fractions of their bound."""


def first_root(target: Callable[[Array], Array], bound: Array) -> Array:
    """Solve c = target(c) for c (N,), each |c| ≤ ``bound`` (N,), at every state.

    Among several roots it takes the first one in the direction of target(0).

    Raises:
        RuntimeError: a state has no root within its bound.
    """
    at_zero = -target(np.zeros_like(bound))
    side = -np.sign(at_zero) * bound
    low, high = np.zeros_like(bound), np.zeros_like(bound)
    open_ = at_zero != 0
    for a, b in itertools.pairwise(SCAN):
        crossed = open_ & (np.sign(side * b - target(side * b)) != np.sign(at_zero))
        low, high = np.where(crossed, side * a, low), np.where(crossed, side * b, high)
        open_ &= ~crossed
        if not open_.any():
            break
    else:
        raise RuntimeError(f"no fixed point at states number {np.flatnonzero(open_)}")
    for _ in range(40):
        middle = 0.5 * (low + high)
        same = np.sign(middle - target(middle)) == np.sign(at_zero)
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    return 0.5 * (low + high)


@dataclass(frozen=True)
class Equation:
    """The equation of one step: v_θ - v_β = ratio · E[(slope + pull ε) Λ_{k+1}].

    Attributes:
        mean, std: (N,) the base's next state without noise, and the noise.
        ratio, move: numbers -residual_a / residual_v and mean_v.
        slope, pull: (N,) the columns of the adjoint, or 1 and 0 where Λ_{k+1} is read itself.
    """

    mean: Array
    std: Array
    ratio: float
    move: float
    slope: Array
    pull: Array

    def moments(self, ahead: Curve) -> tuple[Array, Array]:
        """Return E[Λ_{k+1}] and E[ε Λ_{k+1}] at the first root, each (N,)."""
        if not self.std.any():
            return ahead(self.mean), np.zeros_like(self.mean)
        expected = Expectation(ahead, self.std)

        def moments(c: Array) -> tuple[Array, Array]:
            m = self.mean + self.move * c
            return expected(m), self.std * expected.derivative(m)

        def target(c: Array) -> Array:
            first, kick = moments(c)
            return self.ratio * (self.slope * first + self.pull * kick)

        value, kick = expected.largest()
        bound = abs(self.ratio) * (np.abs(self.slope) * value + np.abs(self.pull) * kick)
        return moments(first_root(target, 1.5 * bound + 1e-9))


def weighted_moments(
    ahead: Curve, log_h: Curve, mean: Array, std: Array
) -> tuple[Array, Array, Array]:
    """Return log E[h], E[h Λ] / E[h] and E[h ε Λ] / E[h] at mean + std ε, each (N,)."""
    log_total, first, kick = (np.zeros_like(mean) for _ in range(3))
    if not std.any():
        return log_h(mean), ahead(mean), kick
    for rows, x, log_weights in gaussian_sums(ahead.states, mean, std):
        log_w = log_h(x) + log_weights
        top = log_w.max(1)
        weights = np.exp(log_w - top[:, None])
        total = weights.sum(1)
        log_total[rows] = np.log(total) + top
        reached = weights * ahead(x) / total[:, None]
        first[rows] = reached.sum(1)
        kick[rows] = (reached * (x - mean[rows, None])).sum(1) / std[rows]
    return log_total, first, kick


def adjoint_columns(problem: Problem, kernel: Kernel, k: int) -> tuple[Array, Array]:
    """Return slope and pull (N,) of Λ_k = E[(slope + pull ε) Λ_{k+1}]."""
    x = torch.from_numpy(problem.states)[:, None]
    one = torch.ones_like(x)
    _, jacobian = velocity_and_vjp(problem.base, x, kernel.adjoint_t[k], one)
    slope = float(kernel.adjoint_x[k]) + float(kernel.adjoint_v[k]) * jacobian[:, 0].numpy()
    if kernel.state_noise is None:
        return slope, np.zeros_like(slope)
    pull = kernel.state_noise.pull(problem.base, k, x, one, one)[:, 0].numpy()
    return slope, pull * float(kernel.adjoint_scale[k + 1] / kernel.adjoint_scale[k])


def fixed_point(problem: Problem, kernel: Kernel, *, weighted: bool = False) -> tuple[Array, Array]:
    """Return v_θ and v_β at the grid times on the problem's states, each (K, N)."""
    states = problem.states
    value = problem.kappa * states - problem.b  # Λ
    log_h = problem.reward(states)
    found = []
    for k in reversed(range(kernel.steps)):
        v_base, mean, std = base_step(problem, kernel, k)
        slope, pull = adjoint_columns(problem, kernel, k)
        residual_v, residual_a = float(kernel.residual_v[k]), float(kernel.residual_a[k])
        # A step without a residual keeps the base.
        ratio = -residual_a / residual_v if residual_v else 0.0
        read = (slope, pull)
        if kernel.residual_at_next:
            read = (np.ones_like(slope), np.zeros_like(pull))
        ahead = Curve(states, value)
        if weighted:
            log_h, first, kick = weighted_moments(ahead, Curve(states, log_h), mean, std)
        else:
            equation = Equation(mean, std, ratio, float(kernel.mean_v[k]), *read)
            first, kick = equation.moments(ahead)
        value = slope * first + pull * kick
        found.append((v_base + ratio * (read[0] * first + read[1] * kick), v_base))
    v, v_base_all = (np.stack(part) for part in zip(*found[::-1], strict=True))
    return v, v_base_all
