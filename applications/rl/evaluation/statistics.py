"""Statistics of a few seeds: robust means, bootstrap intervals, intervals of success rates.

Scores are kept per task, one row per seed, S_m of shape (N_m, ...).  All runs count equally.  The
interquartile mean is the mean of the middle half of all runs (Agarwal et al., arXiv 2108.13264):
with n = Σ_m N_m and k = floor(n/4), the k smallest and the k largest are left out.

The uncertainty over seeds is a stratified bootstrap (same source, section 4.1).  Every resample
draws N_m seeds with replacement *within* each task m, so that no task is lost, and whole rows, so
that a curve keeps its correlation along the steps; the interval is between percentiles of the
statistic over the resamples.  For three seeds of one task a resample is the lowest seed alone with
probability 1/27 > 2.5%, so that the 95% interval simply runs from the lowest seed to the highest;
it contains the median of the distribution over seeds with probability 1 - 2 (1/2)³ = 75% only.
Read an interval together with the number of seeds.

One run's success rate k/n has Wilson's interval (1927): all p for which |k/n - p| is at most
z sqrt(p (1 - p)/n), which is

    (k/n + z²/2n ± z sqrt((k/n)(1 - k/n)/n + z²/4n²)) / (1 + z²/n).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import norm

Statistic = Callable[[np.ndarray], np.ndarray]


def mean(scores: np.ndarray) -> np.ndarray:
    """Return the mean over the first axis: (n, ...) to (...)."""
    return np.asarray(scores, dtype=np.float64).mean(0)


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Return the mean of the middle half along the first axis: (n, ...) to (...).

    Fewer than four runs have no quarter to leave out; the result is then their mean.
    """
    x = np.sort(np.asarray(scores, dtype=np.float64), 0)
    cut = len(x) // 4
    return x[cut : len(x) - cut].mean(0)


def bootstrap_interval(
    tasks: Sequence[np.ndarray],
    statistic: Statistic = mean,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the stratified bootstrap interval of a statistic over the seeds of some tasks.

    Arguments:
        tasks: for each task its scores (N_m, ...), a row per seed; trailing sizes are equal.
        statistic: function that maps pooled scores (n, ...) to (...), such as `mean` or
            `interquartile_mean`.
        level: probability between the two percentiles.
        resamples: number of resamples.
        seed: seed of the resampling.

    Returns:
        lower and upper ends, each of the trailing shape (...).

    Raises:
        ValueError: there is no task, a task has no seeds, trailing shapes differ, a score is not
            finite, or ``level`` or ``resamples`` is out of range.
    """
    scores = [np.asarray(s, dtype=np.float64) for s in tasks]
    if not scores or any(s.ndim == 0 or len(s) == 0 for s in scores):
        shapes = [s.shape for s in scores]
        raise ValueError(f"tasks must hold scores (seeds, ...) of at least one seed, got {shapes}")
    if len({s.shape[1:] for s in scores}) > 1:
        shapes = [s.shape for s in scores]
        raise ValueError(f"tasks must agree in all sizes but the number of seeds, got {shapes}")
    if not all(np.isfinite(s).all() for s in scores):
        raise ValueError("tasks must hold finite scores, got values that are not")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        rows = [s[generator.integers(len(s), size=len(s))] for s in scores]
        values.append(statistic(np.concatenate(rows)))
    tail = (1 - level) / 2
    low, high = np.quantile(np.stack(values), [tail, 1 - tail], axis=0)
    return low, high


def wilson_interval(successes: int, episodes: int, *, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a success rate.

    Arguments:
        successes: number k of successes, from 0 to ``episodes``.
        episodes: number n of episodes, at least 1.
        level: coverage.

    Returns:
        lower and upper end, within [0, 1].

    Raises:
        ValueError: an argument is out of range.
    """
    k, n = successes, episodes
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"successes must be from 0 to episodes >= 1, got {k} of {n}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    z = float(norm.ppf((1 + level) / 2))
    rate = k / n
    centre = rate + z**2 / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    # at k = 0 and k = n one end is exactly 0 or 1, which rounding would miss
    low = 0.0 if k == 0 else (centre - half) / scale
    high = 1.0 if k == n else (centre + half) / scale
    return low, high
