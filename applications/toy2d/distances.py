"""Distances of samples from the exact tilt: sliced Wasserstein distance and mode frequencies.

In one dimension the Wasserstein-2 distance is that of the quantile functions, which for samples are
steps: W2² = ∫_0^1 (F⁻¹(q) - G⁻¹(q))² dq.  The sliced distance is its root mean square over random
directions θ on the sphere, SW2² = E_θ W2²(θᵀx, θᵀy).

Between finite sets of *one* distribution it is not zero, but of order N^(-1/2); ``w2_ratio``
divides by that floor.

References:
    Rabin et al., Wasserstein Barycenter and its Application to Texture Mixing, 2011.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from applications.toy2d.targets import nearest

Generator = torch.Generator | None


class Weighted(Protocol):
    """An exact tilt with frequencies of its modes: ``GridTilt`` and ``ResampledTilt``."""

    def mode_frequencies(self, modes: Tensor) -> Tensor:
        """Return the probability (C,) of each nearest-centre cell."""
        ...


def directions(dim: int, count: int, *, generator: Generator = None) -> Tensor:
    """Draw ``count`` uniform directions on the unit sphere, float64 (dim, count).

    Raises:
        ValueError: ``count`` is not positive.
    """
    if count < 1:
        raise ValueError(f"projections must be a positive number, got {count}")
    theta = torch.randn(dim, count, generator=generator, dtype=torch.float64)
    return theta / theta.norm(dim=0, keepdim=True)


def sliced_wasserstein(
    x: Tensor, y: Tensor, *, projections: int = 128, generator: Generator = None
) -> float:
    """Compute the sliced Wasserstein-2 distance of ``x`` (N, *) and ``y`` (M, *).

    Raises:
        ValueError: the rows differ in shape, a set is empty or holds a value that is not finite, or
            ``projections`` is not positive.
    """
    x, y = _rows(x, "x"), _rows(y, "y")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have rows of one size, got {x.shape[1]} and {y.shape[1]}")
    return _sliced(x, y, directions(x.shape[1], projections, generator=generator))


def w2_ratio(
    x: Tensor,
    exact_a: Tensor,
    exact_b: Tensor,
    *,
    size: int | None = None,
    projections: int = 128,
    generator: Generator = None,
) -> float:
    """Divide the sliced distance of ``x`` from exact samples by that between two exact sets.

    The three sets are cut into blocks of N rows, N = ``size`` or else len(x): x_1, …, x_Q, and
    P = floor(min(len(exact_a), len(exact_b)) / N) pairs a_p, b_p of independent exact sets; rows
    that do not fill a block are not used.  Then, with q = p modulo Q,

        ratio = mean_p ½ [SW2(x_q, a_p) + SW2(x_q, b_p)] / mean_p SW2(a_p, b_p),

    all distances between sets of N rows and along the same directions.  Its expectation is about 1
    for an exact ``x``, which is the floor.  A single value scatters around it, mostly by the random
    sizes of the modes: by about 0.35 for one block each, 0.2 for one block of ``x`` and eight exact
    pairs, and 0.1 for eight of each.  NaN where all exact rows are one point.

    Raises:
        ValueError: as ``sliced_wasserstein``, or a set has fewer rows than a block.
    """
    x, a, b = _rows(x, "x"), _rows(exact_a, "exact_a"), _rows(exact_b, "exact_b")
    if not x.shape[1] == a.shape[1] == b.shape[1]:
        sizes = (x.shape[1], a.shape[1], b.shape[1])
        raise ValueError(f"x, exact_a and exact_b must have rows of one size, got {sizes}")
    n = len(x) if size is None else size
    if not 1 <= n <= min(len(x), len(a), len(b)):
        raise ValueError(
            f"x, exact_a and exact_b must hold at least one block of {n} rows, "
            f"got {len(x)}, {len(a)} and {len(b)}"
        )
    theta = directions(x.shape[1], projections, generator=generator)
    distance, floor = 0.0, 0.0
    for p in range(min(len(a), len(b)) // n):
        q = p % (len(x) // n)
        x_q, a_p, b_p = x[q * n : (q + 1) * n], a[p * n : (p + 1) * n], b[p * n : (p + 1) * n]
        distance += 0.5 * (_sliced(x_q, a_p, theta) + _sliced(x_q, b_p, theta))
        floor += _sliced(a_p, b_p, theta)
    return distance / floor if floor else math.nan


def mode_frequencies(x: Tensor, modes: Tensor) -> Tensor:
    """Compute the fraction (C,) of the rows of ``x`` (N, d) nearest to each of ``modes`` (C, d)."""
    return nearest(x, modes).bincount(minlength=len(modes)).double() / len(x)


def mode_tv(x: Tensor, exact: Tensor | Weighted, modes: Tensor) -> float:
    """Compute the total variation ½ Σ_c |f_c(x) - f_c(exact)| of the mode frequencies.

    Arguments:
        x: Samples (N, d).
        exact: Exact samples (M, d), or an exact tilt, whose frequencies carry no sampling noise.
        modes: Centres (C, d); a point belongs to the nearest.  For targets without modes these are
            a fixed partition (see ``targets``).

    The floor by chance is about sqrt(C / (2πN)) for N samples spread over C modes and a noiseless
    ``exact``.
    """
    if isinstance(exact, Tensor):
        reference = mode_frequencies(exact, modes)
    else:
        reference = exact.mode_frequencies(modes)
    return 0.5 * float((mode_frequencies(x, modes) - reference.to(x.device)).abs().sum())


def _sliced(x: Tensor, y: Tensor, theta: Tensor) -> float:
    theta = theta.to(x.device)
    return float(_squared_w2(x @ theta, y @ theta).mean().sqrt())


def _squared_w2(x: Tensor, y: Tensor) -> Tensor:
    """Compute the squared W2 distances (P,) of the columns of ``x`` (N, P) and ``y`` (M, P)."""
    n, m = len(x), len(y)
    x, y = x.sort(0).values, y.sort(0).values
    if n == m:
        return (x - y).square().mean(0)
    # Both quantile functions are constant between the levels i/n and j/m: integers times 1/(nm).
    ends = torch.cat((torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n)).unique()
    ends = ends.to(x.device)
    widths = ends.diff(prepend=ends.new_zeros(1)).double() / (n * m)
    return widths @ (x[(ends - 1) // m] - y[(ends - 1) // n]).square()


def _rows(x: Tensor, name: str) -> Tensor:
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(f"{name} must have shape (N, *) with N > 0, got {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinite values")
    return x.detach().flatten(1).double()
