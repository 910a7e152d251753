"""Statistics against scipy, closed forms and full enumeration."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from applications.rl.evaluation.statistics import (
    bootstrap_interval,
    interquartile_mean,
    mean,
    wilson_interval,
)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 50])
def test_interquartile_mean_is_scipys_trimmed_mean(n):
    x = np.random.default_rng(n).normal(size=(n, 6))
    assert interquartile_mean(x) == pytest.approx(stats.trim_mean(x, 0.25, axis=0))


def test_interquartile_mean_ignores_outliers_and_the_mean_does_not():
    x = np.array([0.5, 0.5, 0.5, 1000.0])
    assert interquartile_mean(x) == 0.5
    assert mean(x) == pytest.approx(250.375)


def test_bootstrap_of_three_seeds_is_the_enumeration_of_all_27_resamples():
    seeds = np.array([0.1, 0.4, 1.0])
    every = [np.mean(draw) for draw in itertools.product(seeds, repeat=3)]
    low, high = bootstrap_interval([seeds], level=0.8, resamples=20_000)
    ends = np.quantile(every, [0.1, 0.9])
    assert (low, high) == pytest.approx(tuple(ends), abs=1e-12)


def test_the_interval_of_three_seeds_is_from_the_lowest_to_the_highest():
    low, high = bootstrap_interval([np.array([0.2, 0.9, 0.5])])
    assert (low, high) == pytest.approx((0.2, 0.9))


def test_bootstrap_of_many_seeds_is_the_normal_interval_of_the_mean():
    x = np.random.default_rng(0).normal(2.0, 3.0, size=4000)
    low, high = bootstrap_interval([x], resamples=4000)
    half = 1.96 * x.std() / math.sqrt(len(x))
    assert (low + high) / 2 == pytest.approx(x.mean(), abs=0.05 * half)
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)


def test_bootstrap_agrees_with_scipy_for_the_interquartile_mean():
    x = np.random.default_rng(1).beta(2, 5, size=40)
    ours = bootstrap_interval([x], interquartile_mean, resamples=9000)
    theirs = stats.bootstrap(
        (x,),
        lambda s, axis: stats.trim_mean(s, 0.25, axis=axis),
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.004)


def test_resampling_stays_within_tasks():
    """Seeds of one task agree, so only a resampling across tasks could vary."""
    tasks = [np.full(3, 0.0), np.full(5, 1.0)]
    assert bootstrap_interval(tasks) == (0.625, 0.625)
    assert bootstrap_interval([np.concatenate(tasks)])[0] < 0.4


def test_curves_are_resampled_by_whole_rows():
    """The difference of two steps of a rigid curve does not vary, if rows stay together."""
    curves = np.random.default_rng(3).normal(size=(5, 1)) + np.array([0.0, 1.0])
    low, high = bootstrap_interval([curves], lambda x: x.mean(0) @ np.array([-1.0, 1.0]))
    assert (low, high) == pytest.approx((1.0, 1.0))
    low, high = bootstrap_interval([curves])
    assert low.shape == high.shape == (2,)
    assert (high > low).all()


def test_bootstrap_depends_on_the_seed_alone():
    x = np.random.default_rng(4).normal(size=12)
    assert bootstrap_interval([x], seed=5) == bootstrap_interval([x], seed=5)
    assert bootstrap_interval([x], seed=5) != bootstrap_interval([x], seed=6)


@pytest.mark.parametrize(("k", "n"), [(0, 50), (50, 50), (1, 1), (0, 1), (7, 20), (33, 50)])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_wilson_is_scipys(k, n, level):
    theirs = stats.binomtest(k, n).proportion_ci(level, method="wilson")
    assert wilson_interval(k, n, level=level) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_wilson_ends_solve_its_defining_equation():
    for p in wilson_interval(13, 40):
        assert abs(13 / 40 - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / 40), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson_interval(3, 2), "got 3 of 2"),
        (lambda: wilson_interval(0, 0), "got 0 of 0"),
        (lambda: wilson_interval(1, 2, level=95), "level must be between 0 and 1, got 95"),
        (lambda: bootstrap_interval([]), "at least one seed"),
        (lambda: bootstrap_interval([np.zeros((0, 2))]), "at least one seed"),
        (lambda: bootstrap_interval([np.zeros((2, 2)), np.zeros((2, 3))]), "must agree"),
        (lambda: bootstrap_interval([np.array([0.0, math.nan])]), "finite"),
        (lambda: bootstrap_interval([np.zeros(2)], resamples=0), "resamples must be at least 1"),
    ],
)
def test_errors_name_the_argument_and_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
