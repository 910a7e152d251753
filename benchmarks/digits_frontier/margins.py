r"""Which of two methods is ahead at equal reward: a point against the frontier of a method.

The frontier of a method is the curve of its settings in the plane of reward R and diversity D,
straight between two of them.  At the reward of a tilt it lies at D_a + s (R - R_a), s = (D_b - D_a)
/ (R_b - R_a), so that the margin of the tilt is, with λ = (R - R_a) / (R_b - R_a),

    (D - s R) - (1 - λ) (D_a - s R_a) - λ (D_b - s R_b),

and, to first order, its variance is the sum of the variances of the three terms at fixed s and λ.
Where a curve passes the reward several times, its most diverse passage counts.  Points of the
exact tilt and of best-of-n are drawn from one pool of the base's samples, whose own error is left
out: where few of them carry the weight, it is as large as the error that is stated.

For closeness to the base the frontier is straight between two settings in the plane of R and √KL.
Near the base √KL is linear in the reward: a change of the distribution by ε moves R by a multiple
of ε and KL by a multiple of ε².  So, to leading order, the chord neither flatters nor harms the
point that is compared with it (a skewed reward leaves some per cent of KL, of either sign),
whereas a chord in KL, which is convex, would lie above what the method can do and flatter the
tilt.  The margin is in nats, c² - KL with c the height of the chord, larger where the tilt is
closer; with d = √KL at the ends its variance is, to first order, the variance of

    -KL + 2 c s R,   2 c (1 - λ) (d_a - s R_a),   2 c λ (d_b - s R_b).

Estimates of KL may be negative near the base.  That does not matter for the tilt, whose own KL
enters as it is.  At an end of a chord, where the root is needed, a setting whose KL is not two
standard errors above 0 is left out, so that the chord reaches from its predecessor to its
successor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks.digits_frontier.metrics import CLOSENESS, Metrics, mean, stderr


@dataclass(frozen=True)
class Margin:
    """The distance of a point above a frontier at the reward of the point.

    Attributes:
        difference: in diversity or in closeness; positive where the point is ahead.
        stderr: standard error of the difference.
    """

    difference: float
    stderr: float

    @property
    def at_least(self) -> bool:
        """True unless the point is below the frontier by more than two standard errors."""
        return self.difference >= -2 * self.stderr


def root(kl: Tensor) -> Tensor | None:
    """Return √KL by batch, linear in ``kl`` (m,); its mean is the root of the mean of ``kl``.

    Returns None where the mean is not finite, or is less than two standard errors above 0, unless
    all values are 0.
    """
    level = mean(kl)
    if not level >= 2 * stderr(kl):  # so for numbers that are not finite, too
        return None
    return math.sqrt(level) + (kl - level) / (2 * math.sqrt(level)) if level else kl


def margin(point: Metrics, curve: Sequence[Metrics], metric: str) -> Margin | None:
    """Return the smallest margin of ``point`` over the segments of ``curve`` that pass its reward.

    Arguments:
        point: metrics by batch, with ``reward``.
        curve: metrics by batch of the settings of a method, in the order of the settings.
        metric: name of the metric; for ``kl`` the smaller value is ahead, see the module docstring.

    Returns:
        The margin, or None where the curve does not reach the reward.
    """
    closeness = metric == CLOSENESS
    heights = [(p["reward"], root(p[metric]) if closeness else p[metric]) for p in curve]
    ends = [(reward, height) for reward, height in heights if height is not None]
    found = []
    R, D = point["reward"], point[metric]
    for (R_a, D_a), (R_b, D_b) in itertools.pairwise(ends):
        low, high = mean(R_a), mean(R_b)
        if not min(low, high) <= mean(R) <= max(low, high) or low == high:
            continue
        share = (mean(R) - low) / (high - low)
        slope = (mean(D_b) - mean(D_a)) / (high - low)
        chord = (1 - share) * mean(D_a) + share * mean(D_b)
        if closeness:
            difference, sign, pull = chord**2 - mean(D), -1.0, 2 * chord
        else:
            difference, sign, pull = mean(D) - chord, 1.0, -1.0
        terms = [sign * D + pull * slope * R]
        for weight, reward, height in ((1 - share, R_a, D_a), (share, R_b, D_b)):
            terms.append(pull * weight * (height - slope * reward))
        found.append(Margin(difference, math.hypot(*(stderr(term) for term in terms))))
    return min(found, key=lambda m: m.difference) if found else None
