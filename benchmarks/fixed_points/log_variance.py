r"""Optimum of the variance of log w in one dimension, by dynamic programming.

On trajectories of the model itself the gradient of ½ Var(log w) is the gradient of the reverse
Kullback-Leibler divergence KL(model chain | base chain tilted by e^r) (Richter et al. 2010.10436),
so that the two have their stationary points in common.  Both chains have the noise of the kernel
and differ by a shift d_k(x) of each step's mean, and the divergence plus log Z is the cost

    E[Σ_k d_k(x_k)² / (2 std_k(x_k)²) - r(x_K)],

a control problem in discrete time.  Its cost to go V_K = -r,

    V_k(x) = min_d  d² / (2 std_k²) + E[V_{k+1}(mean_x x + mean_v v_β + d + std_k ε)],

is solved backward on a grid of states, the expectation by quadrature, and the optimal
velocity is v_β + d_k / mean_v.  The global minimum is found among `SCAN` shifts and refined by
bisection of the derivative d / std² + E[V'].  No shift beyond std √(2 (E[V | d = 0] - min V)) can
be better than none.
"""

from __future__ import annotations

import numpy as np

from adjoint import Kernel
from benchmarks.fixed_points.problems import Array, Problem, base_step
from benchmarks.fixed_points.quadrature import REACH, Curve, Expectation

SCAN = np.linspace(-1.0, 1.0, 65)
"""Shifts among which the minimum is sought, as fractions of their bound."""


def best_shift(ahead: Curve, mean: Array, std: Array) -> tuple[Array, Array]:
    """Return the shift of smallest cost and this cost at every state, each (N,), for std > 0."""
    expected = Expectation(ahead, std)

    def cost(d: Array) -> Array:
        return d**2 / (2 * std**2) + expected(mean + d)

    def slope(d: Array) -> Array:
        return d / std**2 + expected.derivative(mean + d)

    reached = np.concatenate([ahead.states, mean - REACH * std, mean + REACH * std])
    gain = np.maximum(cost(np.zeros_like(mean)) - ahead(reached).min(), 0.0)
    bound = std * np.sqrt(2 * gain) + 1e-9
    best, least = np.zeros_like(mean), np.full_like(mean, np.inf)
    for fraction in SCAN:
        found = cost(fraction * bound)
        best, least = np.where(found < least, fraction * bound, best), np.minimum(found, least)
    half = bound * (SCAN[1] - SCAN[0])
    low, high = best - half, best + half
    for _ in range(40):
        middle = 0.5 * (low + high)
        up = slope(middle) > 0
        low, high = np.where(up, low, middle), np.where(up, middle, high)
    d = 0.5 * (low + high)
    return d, cost(d)


def log_variance_optimum(problem: Problem, kernel: Kernel) -> tuple[Array, Array]:
    """Return the optimal velocity and v_β at the grid times on the states, each (K, N)."""
    states = problem.states
    to_go = -problem.reward(states)
    found = []
    for k in reversed(range(kernel.steps)):
        v_base, mean, std = base_step(problem, kernel, k)
        ahead, d = Curve(states, to_go), np.zeros_like(states)
        if std.any():
            d, to_go = best_shift(ahead, mean, std)
        else:
            to_go = ahead(mean)
        found.append((v_base + d / float(kernel.mean_v[k]), v_base))
    v, v_base_all = (np.stack(part) for part in zip(*found[::-1], strict=True))
    return v, v_base_all
