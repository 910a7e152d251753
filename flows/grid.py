"""Time grids 0 <= t_0 < ... < t_K <= 1, from noise to data.

A grid is a one-dimensional floating-point tensor of K + 1 times for K steps, kept in float64 so
that step lengths are not lost to rounding.  The shifted grid is diffusers' FlowMatchEuler shift,
which spends more steps near the noise,

    σ' = s σ / (1 + (s - 1) σ),   σ = 1 - t,

written in t = 1 - σ without cancellation: t' = t / (t + s (1 - t)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def uniform(steps: int) -> Tensor:
    """Return a uniform grid of ``steps`` + 1 times from 0 to 1, in float64.

    Raises:
        ValueError: ``steps`` is not a positive integer.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    return torch.arange(steps + 1, dtype=torch.float64) / steps


def shifted(steps: int, shift: float) -> Tensor:
    """Return the grid of ``steps`` + 1 times, in float64, that is shifted toward the noise.

    A ``shift`` of 1 gives the uniform grid; a larger one spends more steps near the noise.

    Source: Esser et al., "Scaling rectified flow transformers" (arXiv 2403.03206), eq. 23.

    Raises:
        ValueError: ``steps`` is not a positive integer, ``shift`` is not positive and finite, or
            it is so far from 1 that neighbouring times coincide.
    """
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift must be positive and finite, got {shift}")
    t = uniform(steps)
    return check_grid(t / (t + shift * (1 - t)))


def from_times(times: Sequence[float] | Tensor) -> Tensor:
    """Return a grid of the given times, in float64, after the checks of `check_grid`."""
    return check_grid(torch.as_tensor(times, dtype=torch.float64))


def check_grid(grid: Tensor) -> Tensor:
    """Return ``grid`` after checking that its times increase within [0, 1].

    The check synchronises with the device.

    Raises:
        ValueError: ``grid`` is not floating point and one-dimensional with at least two entries,
            or its entries are not finite, within [0, 1] and strictly increasing.
    """
    if grid.ndim != 1 or grid.numel() < 2 or not grid.is_floating_point():
        raise ValueError(
            "grid must be a floating-point tensor of shape (K + 1,) with K >= 1, "
            f"got {grid.dtype} of shape {tuple(grid.shape)}"
        )
    times = grid.tolist()
    for k, time in enumerate(times):
        if not 0 <= time <= 1:  # also true of NaN
            raise ValueError(f"grid must lie in [0, 1], got grid[{k}] = {time}")
        if k and time <= times[k - 1]:
            raise ValueError(
                "grid must be strictly increasing, from noise at 0 to data at 1; "
                f"got grid[{k - 1}] = {times[k - 1]}, grid[{k}] = {time}"
            )
    return grid


def check_time(t: Tensor | float, name: str = "t") -> None:
    """Check that times lie in [0, 1].

    This is for entry points only, as it synchronises with the device.

    Raises:
        ValueError: an entry of ``t`` lies outside [0, 1] or is not a number.
    """
    times = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    outside = times[~((times >= 0) & (times <= 1))]
    if outside.numel():
        raise ValueError(f"{name} must lie in [0, 1], got {outside.flatten()[0].item()}")
