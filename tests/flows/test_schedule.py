"""Schedules against formulas of their own, their derivatives by autograd, and their inverses."""

import math

import pytest
import torch
from helpers.gaussian_paths import REFERENCES
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.schedule import VE, VP, Polynomial, Table

F64 = torch.float64
INF = math.inf
EVERY = pytest.mark.parametrize("name", REFERENCES)


def inner_times(schedule, count=37):
    """Native times from 1 % to 99 % of the range."""
    noisy, clean = schedule.time_range
    return noisy + (clean - noisy) * torch.linspace(0.01, 0.99, count, dtype=F64)


def ddpm():
    """The scaled-linear table of Stable Diffusion."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2
    kept = torch.cumprod(1 - betas, 0)
    return Table(kept.sqrt(), (1 - kept).sqrt())


@EVERY
def test_coefficients_are_the_closed_forms(name):
    schedule, alpha, sigma, alpha_dot, sigma_sigma_dot = REFERENCES[name]
    t = inner_times(schedule)
    close = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(schedule.alpha(t), alpha(t), **close)
    torch.testing.assert_close(schedule.sigma(t), sigma(t), **close)
    torch.testing.assert_close(schedule.alpha_dot(t), alpha_dot(t), **close)
    torch.testing.assert_close(schedule.sigma_dot(t), sigma_sigma_dot(t) / sigma(t), **close)
    torch.testing.assert_close(schedule.snr(t), alpha(t) / sigma(t), **close)


@EVERY
def test_derivatives_are_those_of_autograd(name):
    schedule = REFERENCES[name].schedule
    t = inner_times(schedule).requires_grad_()
    for value, derivative in (("alpha", "alpha_dot"), ("sigma", "sigma_dot")):
        y = getattr(schedule, value)(t)
        grad = torch.zeros_like(t)
        if y.requires_grad:
            (grad,) = torch.autograd.grad(y.sum(), t, materialize_grads=True)
        torch.testing.assert_close(getattr(schedule, derivative)(t), grad, rtol=1e-11, atol=1e-13)


@EVERY
@settings(max_examples=60, deadline=None)
@given(exponent=st.floats(-4.0, 4.0))
def test_the_inverse_inverts_the_signal_to_noise(name, exponent):
    schedule = REFERENCES[name].schedule
    lowest, highest = schedule.snr(torch.tensor(schedule.time_range, dtype=F64)).tolist()
    rho = torch.tensor(min(max(10**exponent, lowest), highest), dtype=F64)
    tau = schedule.snr_inverse(rho)
    # Rounding the inverse by ε moves σ by up to ε/σ on the variance-preserving paths: ρ² ε in ρ.
    torch.testing.assert_close(
        schedule.snr(tau), rho, rtol=1e-12 + 4e-16 * max(1.0, float(rho)) ** 2, atol=0
    )


@EVERY
def test_snr_grows_from_noise_to_data(name):
    schedule = REFERENCES[name].schedule
    assert bool((schedule.snr(inner_times(schedule)).diff() > 0).all())


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_pure_noise_and_pure_data_have_a_time(name, dtype):
    schedule = REFERENCES[name].schedule
    tau = schedule.snr_inverse(torch.tensor([[0.0], [INF]], dtype=dtype))
    assert tau.dtype == dtype
    noisy, clean = torch.tensor(schedule.time_range, dtype=dtype)
    assert tau.shape == (2, 1)
    assert abs(tau[0] - noisy) <= 8 * torch.finfo(dtype).eps * max(noisy, clean)
    assert tau[1] == clean


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("make", [lambda b: VP(beta_min=b), lambda b: VE(sigma_min=b)])
def test_rounding_leads_no_time_out_of_the_range(make, dtype):
    for b in torch.linspace(0.1, 8.0, 80).tolist():
        schedule = make(b)
        noisy, clean = torch.tensor(schedule.time_range, dtype=dtype)
        tau = schedule.snr_inverse(torch.tensor([0.0, 0.05, 1.0, INF], dtype=dtype))
        assert bool(((tau - noisy) * (tau - clean) <= 0).all())


@EVERY
def test_single_precision_follows_double(name):
    schedule = REFERENCES[name].schedule
    rho = torch.logspace(-1.5, 1.5, 20, dtype=F64)
    tau = schedule.snr_inverse(rho)
    torch.testing.assert_close(
        schedule.snr_inverse(rho.float()).double(), tau, rtol=1e-5, atol=1e-5
    )
    for exact, single in zip(
        schedule.coefficients(tau), schedule.coefficients(tau.float()), strict=True
    ):
        assert single.dtype == torch.float32
        assert single.shape == tau.shape
        torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("condot", (0.0, 1.0)),
        ("cosine", (0.0, 1.0)),
        ("linear_vp", (0.0, 1.0)),
        ("polynomial_3", (0.0, 1.0)),
        ("vp", (math.exp(-5.025) / (math.exp(-5.025) + math.sqrt(1 - math.exp(-10.05))), 1.0)),
        ("ve", (1 / 81, 1 / 1.002)),
        ("ve_to_zero", (1 / 81, 1.0)),
        ("table", (1 / (1 + math.exp(1.8)), 1 / (1 + math.exp(-2.0)))),
    ],
)
def test_canonical_range(name, expected):
    assert REFERENCES[name].schedule.canonical_range == pytest.approx(expected, abs=1e-15)


def test_variance_preserving_ends_are_finite_but_for_sigma_dot():
    for name in ("linear_vp", "vp"):
        alpha, sigma, alpha_dot, sigma_dot = REFERENCES[name].schedule.coefficients(
            torch.ones((), dtype=F64)
        )
        assert (alpha, sigma, sigma_dot) == (1, 0, -INF)
        assert alpha_dot == {"linear_vp": 1, "vp": 0.05}[name]


class TestTable:
    def test_entries_are_kept(self):
        g = torch.Generator().manual_seed(0)
        alphas = torch.rand(50, generator=g, dtype=F64).cumsum(0) + 0.01
        sigmas = torch.rand(50, generator=g, dtype=F64).flip(0).cumsum(0).flip(0) + 0.01
        table = Table(alphas, sigmas)
        k = torch.arange(50, dtype=F64)
        assert table.time_range == (0.0, 49.0)
        torch.testing.assert_close(table.alpha(k), alphas, rtol=1e-14, atol=0)
        torch.testing.assert_close(table.sigma(k), sigmas, rtol=1e-14, atol=0)
        torch.testing.assert_close(table.snr_inverse(alphas / sigmas), k, rtol=1e-12, atol=1e-12)

    def test_derivatives_include_those_of_the_variance(self):
        table = Table([0.3, 0.5, 2.0], [0.9, 1.1, 0.7])
        t = torch.tensor([0.2, 0.7, 1.0, 1.4], dtype=F64, requires_grad=True)
        a, s = table.alpha(t), table.sigma(t)
        for value, derivative in ((a, table.alpha_dot(t)), (s, table.sigma_dot(t))):
            (grad,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
            torch.testing.assert_close(derivative, grad, rtol=1e-13, atol=0)
        inside = torch.tensor([1.0, 1.0 + 1e-9], dtype=F64)  # an entry has the slope after it
        at_entry, after = table.alpha_dot(inside)
        assert float(at_entry) == pytest.approx(float(after), rel=1e-7)

    def test_between_entries_snr_is_geometric_and_variance_kept(self):
        table = ddpm()
        k = torch.arange(999, dtype=F64)
        middle = (table.snr(k) * table.snr(k + 1)).sqrt()
        torch.testing.assert_close(table.snr(k + 0.5), middle, rtol=1e-12, atol=0)
        norm = table.alpha(k + 0.3) ** 2 + table.sigma(k + 0.3) ** 2
        torch.testing.assert_close(norm, torch.ones_like(norm), rtol=0, atol=1e-14)

    def test_stable_diffusion_ends_where_it_is_known_to(self):
        table = ddpm()
        assert table.time_range == (999.0, 0.0)
        assert float(table.alpha(torch.tensor(999.0, dtype=F64))) == pytest.approx(0.0683, abs=5e-5)
        assert table.canonical_range[0] == pytest.approx(0.0640, abs=5e-5)

    def test_a_reversed_table_is_the_same_path(self):
        alphas, sigmas = torch.tensor([0.9, 0.6, 0.1]), torch.tensor([0.2, 0.5, 0.9])
        forward, backward = Table(alphas, sigmas), Table(alphas.flip(0), sigmas.flip(0))
        rho = torch.logspace(-0.9, 0.6, 30, dtype=F64)
        tau = forward.snr_inverse(rho)
        torch.testing.assert_close(backward.snr_inverse(rho), 2 - tau, rtol=0, atol=1e-14)
        a, b = forward.coefficients(tau), backward.coefficients(2 - tau)
        torch.testing.assert_close(b.alpha, a.alpha, rtol=1e-13, atol=0)
        torch.testing.assert_close(b.sigma_dot, -a.sigma_dot, rtol=1e-13, atol=0)

    def test_accepts_sequences_and_any_shape_of_times(self):
        table = Table([0.9, 0.1], [0.1, 0.9])
        assert table.alpha(torch.full((2, 1, 3), 0.5).mT).shape == (2, 3, 1)
        assert float(table.snr(torch.tensor(0.5, dtype=F64))) == pytest.approx(1.0, abs=1e-15)

    @pytest.mark.parametrize(
        ("alphas", "sigmas", "message"),
        [
            (
                [0.9, 0.5, 0.6],
                [0.1, 0.5, 0.4],
                r"strictly monotone, got \[1.0, 1.[45]\d*\] at indices 1 and 2",
            ),
            ([0.5, 0.5], [0.5, 0.5], "strictly monotone"),
            ([0.9, 0.0], [0.1, 1.0], "alphas must be positive and finite, got 0.0"),
            ([0.9, 0.5], [0.1, INF], "sigmas must be positive and finite, got inf"),
            ([0.9, math.nan], [0.1, 0.5], "alphas must be positive and finite, got nan"),
            ([0.9], [0.1], r"K >= 2, got \(1,\)"),
            ([0.9, 0.8], [0.1, 0.2, 0.3], r"got \(2,\) and \(3,\)"),
            ([[0.9, 0.8]], [[0.1, 0.2]], r"got \(1, 2\)"),
        ],
    )
    def test_a_wrong_table_is_refused(self, alphas, sigmas, message):
        with pytest.raises(ValueError, match=message):
            Table(alphas, sigmas)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VP(beta_min=0.0), "got 0.0 and 20.0"),
        (lambda: VP(beta_min=2.0, beta_max=1.0), "got 2.0 and 1.0"),
        (lambda: VE(sigma_min=-1.0), "got -1.0 and 80.0"),
        (lambda: VE(sigma_max=INF), "got 0.002 and inf"),
        (lambda: Polynomial(0.0), "n must be positive and finite, got 0.0"),
        (lambda: Polynomial(math.nan), "n must be positive and finite, got nan"),
    ],
)
def test_wrong_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_constant_rate_vp_is_exponential():
    tau = torch.linspace(0.1, 1.0, 10, dtype=F64)
    schedule = VP(beta_min=3.0, beta_max=3.0)
    torch.testing.assert_close(schedule.alpha(tau), (-1.5 * (1 - tau)).exp(), rtol=1e-14, atol=0)
    torch.testing.assert_close(schedule.snr_inverse(schedule.snr(tau)), tau, rtol=1e-14, atol=1e-14)
