"""Time grids against diffusers' shift formula, and everything a grid must not be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flows import grid as grids

F64 = torch.float64


@pytest.mark.parametrize("steps", [1, 3, 10, 1000])
def test_uniform_is_k_over_steps_to_the_last_bit(steps):
    assert grids.uniform(steps).tolist() == [k / steps for k in range(steps + 1)]
    assert grids.uniform(steps).dtype == F64


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.floats(0.05, 20.0))
def test_shifted_is_diffusers_shift_of_sigma(steps, shift):
    sigma = 1 - torch.arange(steps + 1, dtype=F64) / steps
    expected = 1 - shift * sigma / (1 + (shift - 1) * sigma)
    t = grids.shifted(steps, shift)
    torch.testing.assert_close(t, expected, rtol=0, atol=2e-14)
    assert (t[0], t[-1]) == (0, 1)  # which the formula in σ misses by rounding
    assert grids.check_grid(t) is t


def test_shift_moves_the_grid_toward_the_noise():
    # FlowMatchEulerDiscreteScheduler(shift=3) with 4 steps: sigmas 1, 0.9, 0.75, 0.5, 0.
    torch.testing.assert_close(
        grids.shifted(4, 3.0), torch.tensor([0, 0.1, 0.25, 0.5, 1.0], dtype=F64), rtol=0, atol=1e-15
    )
    assert torch.equal(grids.shifted(7, 1.0), grids.uniform(7))


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "3"])
def test_steps_must_be_a_positive_integer(steps):
    with pytest.raises(ValueError, match=f"steps must be a positive integer, got {steps!r}"):
        grids.uniform(steps)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.inf, math.nan])
def test_shift_must_be_positive_and_finite(shift):
    with pytest.raises(ValueError, match="shift must be positive and finite, got"):
        grids.shifted(4, shift)


def test_a_shift_that_merges_times_is_refused():
    with pytest.raises(ValueError, match="strictly increasing"):
        grids.shifted(4, 1e-300)


def test_given_keeps_the_times():
    times = grids.from_times([0.1, 0.15, 0.9])
    assert times.dtype == F64
    assert times.tolist() == [0.1, 0.15, 0.9]
    assert torch.equal(grids.from_times(torch.tensor([0, 1])), torch.tensor([0.0, 1.0], dtype=F64))


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0.0, 0.5, 0.5, 1.0], r"grid\[1\] = 0.5, grid\[2\] = 0.5"),
        ([1.0, 0.5, 0.0], r"from noise at 0 to data at 1; got grid\[0\] = 1.0"),
        ([0.0, math.nan, 1.0], r"grid\[1\] = nan"),
        ([0.0, math.inf], r"grid\[1\] = inf"),
        ([-0.1, 1.0], r"grid\[0\] = -0.1"),
        ([0.0, 1.5], r"grid\[1\] = 1.5"),
        ([0.5], r"shape \(1,\)"),
        ([[0.0, 1.0]], r"shape \(1, 2\)"),
        (0.5, r"shape \(\)"),
    ],
)
def test_a_wrong_grid_is_refused_with_its_value(times, message):
    with pytest.raises(ValueError, match=message):
        grids.from_times(times)


def test_an_integer_grid_is_refused():
    with pytest.raises(ValueError, match=r"floating-point tensor .* got torch.int64"):
        grids.check_grid(torch.tensor([0, 1]))


@pytest.mark.parametrize("t", [0.0, 1.0, 0.3, torch.tensor(0.5), torch.tensor([0.0, 1.0])])
def test_times_of_the_unit_interval_pass(t):
    grids.check_time(t)


@pytest.mark.parametrize(
    ("t", "value"),
    [(-0.01, "-0.01"), (1000.0, "1000.0"), (math.nan, "nan"), (torch.tensor([0.5, 2.0]), "2.0")],
)
def test_times_outside_are_refused_by_name(t, value):
    with pytest.raises(ValueError, match=rf"start must lie in \[0, 1\], got {value}"):
        grids.check_time(t, "start")
