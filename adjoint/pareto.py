r"""Estimates the tail of importance weights, by a generalised Pareto distribution.

Above a high threshold u, weights of almost any distribution follow

    P(w - u > x | w > u) = (1 + k x / σ)^(-1/k).

Moments of order 1/k and above do not exist: at k = 1/2 the variance of the weights is infinite, at
k = 1 their mean.  The estimate of k from the largest weights so tells what their sample variance
cannot, which has not seen the tail.  Means under the weights are reliable below k = 0.7 (Vehtari,
Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling", 1507.02646).

The estimate is that of Zhang and Stephens ("A new and efficient estimation method for the
generalized Pareto distribution", Technometrics 2009): with b = -k/σ the likelihood is maximal over
k at k(b) = mean log(1 - b x), and b is the mean over its profile likelihood, on a grid of quantiles
of a weak prior.  The number k is drawn toward 1/2 as ten further observations would (1507.02646,
appendix C).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PRIOR_SHAPE, PRIOR_SIZE = 0.5, 10
"""Shape toward which the estimate is drawn, and as how many observations."""

ROUNDING = 1e-3
"""Largest log-weight over their mean that has no tail: rounding in float32 looks like one."""


def tail_shape(log_weights: Tensor) -> float:
    """Return the shape k of the upper tail of weights, from the largest of them.

    The tail are the largest min(N/5, 3 √N) of N weights (1507.02646, section 2.2).  -∞ where they
    are fewer than five, or where all weights are equal but for `ROUNDING`.

    Arguments:
        log_weights: (N,) log-weights, up to a constant.
    """
    n = len(log_weights)
    size = int(min(n / 5, 3 * math.sqrt(n)))
    if size < 5 or float(log_weights.max() - log_weights.mean()) < ROUNDING:
        return -math.inf
    ordered = log_weights.double().sort().values
    weights = (ordered[-size - 1 :] - ordered[-1]).exp()
    return pareto_shape(weights[1:] - weights[0])


def pareto_shape(excesses: Tensor) -> float:
    """Return the estimated shape k of the generalised Pareto distribution of excesses.

    Arguments:
        excesses: (M,) excesses x ≥ 0 over the threshold.
    """
    x = excesses.double().sort().values
    n, largest = len(x), float(x[-1])
    if not largest > 0:
        return -math.inf
    x = x / largest
    quartile = x[int(n / 4 + 0.5) - 1].clamp_min(1e-12)
    points = 30 + int(math.sqrt(n))
    i = torch.arange(1, points + 1, dtype=x.dtype, device=x.device)
    b = 1 + (1 - (points / (i - 0.5)).sqrt()) / (3 * quartile)
    k = torch.log1p(-b[:, None] * x).mean(1)
    log_likelihood = n * ((-b / k).log() - k - 1)
    b_mean = (log_likelihood.softmax(0) * b).sum()
    shape = float(torch.log1p(-b_mean * x).mean())
    return (n * shape + PRIOR_SIZE * PRIOR_SHAPE) / (n + PRIOR_SIZE)
