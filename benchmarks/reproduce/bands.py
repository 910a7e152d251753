r"""This file compares new runs with the published ones at one step.

Twelve published seeds have the mean success m, and the deviation s over seeds.  How far may the
mean of S new seeds lie from m, if both come from one distribution?  If seeds were normal, the
difference of the two means would have the variance s² (1/12 + 1/S), so that with probability 95 %

    | new mean − m |  <=  t s sqrt(1/12 + 1/S),      t = 2.201, Student's with 11 degrees,

which is a prediction interval (Hahn and Meeker, Statistical Intervals, 1991).  The table has the
half-width of Student's interval of m, c = t s / sqrt(12), hence s = c sqrt(12) / t.

Success rates are not normal near 1: where all 600 published episodes succeed, s is 0, but a failure
of a new one in a hundred would be no surprise.  A seed's rate over n episodes has at least the
variance p (1 − p) / n, whatever the agent; with p estimated by Laplace's rule of succession,
(k + 1) / (N + 2) for k successes of N published episodes, that is the least s².
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from applications.rl.report.published import SEEDS, PublishedCurve
from benchmarks.reproduce.config import PUBLISHED_EPISODES

T = float(student.ppf(0.975, SEEDS - 1))
"""Student's factor of a 95 % interval over the published seeds."""


@dataclass(frozen=True)
class Band:
    """Holds the mean success that new seeds are expected to have, at one step.

    Attributes:
        low, mean, high: ends of the interval, cut to [0, 1], and the published mean.
    """

    low: float
    mean: float
    high: float

    def holds(self, success: float) -> bool:
        """Say whether a success rate lies in the band."""
        return self.low - 1e-9 <= success <= self.high + 1e-9


def band(
    curve: PublishedCurve, step: int, *, seeds: int, episodes: int = PUBLISHED_EPISODES
) -> Band | None:
    """Return the band of a mean over new seeds; None where the curve has no such step.

    Arguments:
        curve: a published curve.
        step: number of updates.
        seeds: number S of new seeds.
        episodes: number n of episodes of each new seed.
    """
    found = np.flatnonzero(curve.steps == step)
    if not len(found):
        return None
    mean, half = float(curve.mean[found[0]]), float(curve.student[found[0]])
    played = SEEDS * PUBLISHED_EPISODES
    p = (played * mean + 1) / (played + 2)
    deviation = max(half * math.sqrt(SEEDS) / T, math.sqrt(p * (1 - p) / episodes))
    width = T * deviation * math.sqrt(1 / SEEDS + 1 / seeds)
    return Band(max(0.0, mean - width), mean, min(1.0, mean + width))


def verdict(
    curve: PublishedCurve | None,
    success: Mapping[int, Sequence[float]],
    *,
    episodes: int,
    differences: Sequence[str] = (),
) -> str:
    """Judge the runs of a task at the last published step that all of its seeds have reached.

    Arguments:
        curve: the published curve of the task; None where there is none.
        success: success rates of the seeds by step, at steps that all seeds reached.
        episodes: number of episodes of each rate.
        differences: what makes the runs a trial; they are then not judged.

    Returns:
        a line of text.
    """
    if differences:
        found = (
            f"last success {np.mean(success[max(success)]):.1%}" if success else "no evaluation yet"
        )
        return f"TRIAL of the pipeline, no reproduction ({'; '.join(differences)}); {found}"
    steps = [] if curve is None else [step for step in success if step in curve.steps]
    if curve is None or not steps:
        return "OPEN: no step of the published curve has been reached yet"
    step = max(steps)
    rates = success[step]
    expected = band(curve, step, seeds=len(rates), episodes=episodes)
    assert expected is not None
    mean = float(np.mean(rates))
    at = curve.steps == step
    side = "BELOW" if mean < expected.mean else "ABOVE"
    word = "REPRODUCED" if expected.holds(mean) else f"{side} the published success"
    return (
        f"{word} at step {step}: {mean:.1%} ({len(rates)} seeds, {episodes} episodes each), "
        f"expected of so many seeds {expected.low:.1%} to {expected.high:.1%}; published "
        f"{expected.mean:.1%} [{curve.low[at][0]:.1%}, {curve.high[at][0]:.1%}], {SEEDS} seeds"
    )
