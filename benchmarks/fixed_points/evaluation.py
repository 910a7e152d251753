"""Columns of the table: velocity error, mode weight by ODE, and the base chain under the tilt.

The correction v_θ - v_β is linear in time between the grid times and 0 at t = 1, as v* - v_β is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.integrate import cumulative_trapezoid
from scipy.stats import norm

from adjoint import Kernel
from benchmarks.fixed_points.problems import Array, Problem, base_step

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
ODE_STEPS = 1000


def correction_at(kernel: Kernel, v: Array, v_base: Array) -> Callable[[float], Array]:
    """Return the function of t that gives v - v_β (N,) of the rows v, v_base (K, N)."""
    corrections = np.concatenate([v - v_base, np.zeros((1, v.shape[1]))])
    times = kernel.t.numpy()

    def at(t: float) -> Array:
        k = min(max(int(np.searchsorted(times, t + 1e-9)) - 1, 0), kernel.steps - 1)
        share = (t - times[k]) / (times[k + 1] - times[k])
        between: Array = (1 - share) * corrections[k] + share * corrections[k + 1]
        return between

    return at


def velocity_error(problem: Problem, kernel: Kernel, v: Array, v_base: Array) -> float:
    """Return the mean relative velocity error of v (K, N) over ``TIMES``.

    At one time it is E[(v_θ - v*)²] / E[(v* - v_β)²] under the exact marginal p*_t: 0 is the exact
    tilt, 1 the base.  It is a ratio of squares; its root is the relative error.
    """
    exact, x = problem.exact(), torch.from_numpy(problem.states)[:, None]
    cells = np.gradient(problem.states)
    at = correction_at(kernel, v, v_base)
    errors = []
    for t in TIMES:
        right = (exact(x, t) - problem.base(x, t))[:, 0].numpy()
        density = exact.log_prob(x, t).exp().numpy() * cells
        errors.append((density * (at(t) - right) ** 2).sum() / (density * right**2).sum())
    return float(np.mean(errors))


def mode_weight(problem: Problem, kernel: Kernel, v: Array, v_base: Array) -> float:
    """Return the probability of the right mode in samples by the ODE of v (K, N).

    The flow of a line keeps the order of its points.  So the right mode is reached from the starts
    above one, found by integrating the ODE backward from the state between the modes.
    """
    at = correction_at(kernel, v, v_base)

    def velocity(x: float, t: float) -> float:
        base = problem.base(torch.tensor([[x]], dtype=torch.float64), t)
        return float(base) + float(np.interp(x, problem.states, at(t)))

    x, h = problem.between, 1 / ODE_STEPS
    for i in reversed(range(ODE_STEPS)):
        t = (i + 1) * h
        middle = x - 0.5 * h * velocity(x, t)
        x = x - h * velocity(middle, t - 0.5 * h)
    return float(norm.sf(x))


def base_chain(problem: Problem, kernel: Kernel) -> tuple[float, float]:
    """Return log E[e^r] and the weight of the right mode under the tilted base chain.

    The density of the base chain is carried forward by the trapezoidal rule on the states, and the
    rows of a step's transition matrix sum to one.
    """
    x, cells = problem.states, np.gradient(problem.states)
    p = norm.pdf(x) * cells
    p, ends = p / p.sum(), x
    for k in range(kernel.steps):
        _, mean, std = base_step(problem, kernel, k)
        if not std.any():
            ends = mean
            continue
        step = cells * norm.pdf(x, mean[:, None], std[:, None])
        p = p @ (step / np.maximum(step.sum(1, keepdims=True), 1e-300))
    tilted = p * np.exp(problem.reward(ends))
    below = cumulative_trapezoid(tilted / cells, x, initial=0.0)
    left = np.interp(problem.between, ends, below) / below[-1]
    return math.log(tilted.sum()), float(1 - left)
