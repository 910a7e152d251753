"""Gaussian expectations of smooth functions of the state that are known on a grid.

Between narrow modes the functions have a peak far narrower than the noise of a step, which a fixed
number of Gauss-Hermite nodes misses.  So every rule here is trapezoidal, which converges
exponentially for Gaussian weights, with a spacing as fine as the finest of the states.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline, RectBivariateSpline

from benchmarks.fixed_points.problems import Array

REACH = 8.0
"""Standard deviations over which an expectation is summed."""

LEVEL = 0.2
"""Distance of the logarithms of the noise levels that are tabulated."""


NARROW = 3.0
"""Largest noise, in units of the coarsest spacing of the states, with nodes of its own."""


def gaussian_sums(
    states: Array, mean: Array, std: Array
) -> Iterator[tuple[NDArray[np.bool_], Array, Array]]:
    """Yield the rows, points and logarithms of weights of sums that approach N(mean, std²).

    Where the noise is narrow, points are mean + std ε, (n, P); elsewhere they are the states
    themselves, continued on both sides, (1, P).  The weights (n, P) of a row sum to one.
    """
    gaps = np.diff(states)
    narrow = std < NARROW * gaps.max()
    if narrow.any():
        half = int(np.ceil(REACH * max(8.0, std[narrow].max() / (2 * gaps.min()))))
        nodes = np.linspace(-REACH, REACH, 2 * half + 1)
        log_weights = -0.5 * nodes**2
        log_weights = log_weights - np.log(np.exp(log_weights).sum())
        points = mean[narrow, None] + std[narrow, None] * nodes
        yield narrow, points, np.broadcast_to(log_weights, points.shape)
    if not narrow.all():
        wide = ~narrow
        beyond = np.linspace(0.0, REACH * std[wide].max(), 101)[1:]
        x = np.concatenate([states[0] - beyond[::-1], states, states[-1] + beyond])
        log_weights = -0.5 * ((x - mean[wide, None]) / std[wide, None]) ** 2
        log_weights = log_weights + np.log(np.gradient(x))
        total = np.exp(log_weights).sum(1, keepdims=True)
        yield wide, x[None], log_weights - np.log(total)


class Curve:
    """Cubic spline through values (N,) on states (N,), continued by its end tangents."""

    def __init__(self, states: Array, values: Array) -> None:
        self.states = states
        self.spline = CubicSpline(states, values)
        self.slope = self.spline(states[[0, -1]], 1)

    def __call__(self, x: Array) -> Array:
        """Return the values at ``x`` of any shape."""
        inside = np.clip(x, self.states[0], self.states[-1])
        out = x - inside
        value: Array = self.spline(inside)
        return value + np.where(out < 0, self.slope[0], self.slope[1]) * out

    def smoothed(self, std: float) -> Array:
        """Return E[value(x + std ε)] at the states, (N,)."""
        spread = np.full_like(self.states, std)
        ((_, points, log_weights),) = gaussian_sums(self.states, self.states, spread)
        return (np.exp(log_weights) * self(points)).sum(1)


class Expectation:
    """The function E[value(m + std ε)] of m (N,), and its derivative, for fixed std (N,).

    One noise level for all states needs one smoothed curve; several are tabulated at levels a
    factor exp(`LEVEL`) apart and interpolated in log std.
    """

    def __init__(self, curve: Curve, std: Array) -> None:
        self.states, self.log_std = curve.states, np.log(std)
        low, high = self.log_std.min(), self.log_std.max()
        if high - low < 1e-9:
            self.one: Curve | None = Curve(self.states, curve.smoothed(float(std[0])))
            return
        self.one = None
        self.levels = np.linspace(low, high, max(4, int(np.ceil((high - low) / LEVEL)) + 1))
        table = np.stack([curve.smoothed(float(np.exp(level))) for level in self.levels], 1)
        self.table = RectBivariateSpline(self.states, self.levels, table)

    def derivative(self, m: Array) -> Array:
        """Return the derivative in m, which times std is E[ε value(m + std ε)]."""
        inside = np.clip(m, self.states[0], self.states[-1])
        slope: Array = (
            self.one.spline(inside, 1) if self.one else self.table.ev(inside, self.log_std, dx=1)
        )
        return slope

    def largest(self) -> tuple[Array, Array]:
        """Return bounds (N,) on |E[value]| and |E[ε value]|, whatever the mean m."""
        if self.one:
            table, levels = self.one(self.states)[:, None], self.log_std[:1]
        else:
            levels = self.levels
            table = self.table(self.states, levels)
        value = np.abs(table).max(0)
        slope = np.abs(np.gradient(table, self.states, axis=0)).max(0) * np.exp(levels)
        return np.interp(self.log_std, levels, value), np.interp(self.log_std, levels, slope)

    def __call__(self, m: Array) -> Array:
        """Return the expectations."""
        if self.one:
            return self.one(m)
        inside = np.clip(m, self.states[0], self.states[-1])
        value: Array = self.table.ev(inside, self.log_std)
        return value + self.derivative(inside) * (m - inside)
