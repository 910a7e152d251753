"""Conversions and changes of path against one Gaussian target in closed form."""

import itertools
import math

import pytest
import torch
from helpers.gaussian_paths import F64, REFERENCES, canonical_velocity, predictions
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flows import path
from flows.autodiff import velocity_and_vjp
from flows.mixture import GaussianMixture
from flows.path import MARGIN, PREDICTIONS, OnCanonicalPath, convert
from flows.schedule import CondOT, Cosine

EVERY = pytest.mark.parametrize("name", REFERENCES)
PREDICTED = pytest.mark.parametrize("prediction", PREDICTIONS)
M, S = 0.6, 0.35
X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
# Both ends, close to both, and the inside.
TIMES = [0.0, 1e-6, 1e-3, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98, 0.999, 1 - 1e-6, 1.0]
ALL_TIMES = torch.tensor(TIMES, dtype=F64).repeat_interleave(len(X))
STATES = X.repeat(len(TIMES), 1)


def native_model(reference, prediction, m=M, s=S):
    def model(z, tau, cond):
        tau = tau.reshape(-1, *[1] * (z.ndim - 1))
        return predictions(reference, z, tau, m, s)[prediction]

    return model


def adapted(name, prediction, **options):
    reference = REFERENCES[name]
    return OnCanonicalPath(
        native_model(reference, prediction), reference.schedule, prediction, **options
    )


def expected_limits(name, prediction):
    """Where the velocity is exact, by hand."""
    noisy = {"vp": 1 / (1 + math.sqrt(math.expm1(10.05))), "table": 1 / (1 + math.exp(1.8))}
    noisy.update(ve=1 / 81, ve_to_zero=1 / 81)
    clean = {"ve": 1 / 1.002, "table": 1 / (1 + math.exp(-2.0))}
    lowest, highest = noisy.get(name, 0.0), clean.get(name, 1.0)
    vanishing = prediction == "velocity" and name in ("polynomial_2", "polynomial_3")
    if name not in noisy and (prediction in ("noise", "score") or vanishing):
        lowest += MARGIN
    if name not in clean and prediction == "clean":
        highest -= MARGIN
    return lowest, highest


def tolerance(name, t):
    """1e-12, and what rounding native time costs near the data where σ ∝ √(1 - τ).

    A rounded τ is the right time of another t, ε/σ away or √ε at most; the velocity moves by as
    much times |dv/dt|, below 30 here.
    """
    rounding = torch.full_like(t, 1.2e-16) / (1 - t).clamp_min(1.1e-8)
    return 1e-12 + 30 * rounding * ((t < 1) & (name in ("linear_vp", "vp")))


@EVERY
@PREDICTED
def test_limits_are_where_the_schedule_or_the_prediction_ends(name, prediction):
    field = adapted(name, prediction)
    assert (field.t_min, field.t_max) == pytest.approx(expected_limits(name, prediction), abs=1e-15)


@EVERY
@PREDICTED
def test_the_canonical_velocity_is_exact_on_every_path(name, prediction):
    field = adapted(name, prediction)
    v, vjp = velocity_and_vjp(field, STATES, ALL_TIMES, torch.ones_like(STATES))
    held = ALL_TIMES.clamp(field.t_min, field.t_max)[:, None]
    expected, slope = canonical_velocity(STATES, held, M, S)
    limit = tolerance(name, held)
    assert bool(((v - expected).abs() <= limit).all())
    assert bool(((vjp - slope).abs() <= limit).all())


@EVERY
@PREDICTED
@settings(max_examples=25, deadline=None)
@given(
    t=st.floats(0.02, 0.98),
    m=st.floats(-3.0, 3.0),
    s=st.floats(0.1, 3.0),
    x=st.floats(-4.0, 4.0),
)
@pytest.mark.slow
def test_the_canonical_velocity_is_exact_for_any_gaussian(name, prediction, t, m, s, x):
    reference = REFERENCES[name]
    model = native_model(reference, prediction, m, s)
    field = OnCanonicalPath(model, reference.schedule, prediction)
    x = torch.full((1, 1), x, dtype=F64)
    held = min(max(t, field.t_min), field.t_max)
    expected, slope = canonical_velocity(x, held, m, s)
    # The conversion is as sensitive to the network's rounding as dv/dx at s = 0.1 is to x.
    v, vjp = velocity_and_vjp(field, x, torch.tensor(t, dtype=F64), torch.ones_like(x))
    torch.testing.assert_close(v, expected, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(vjp, torch.full_like(x, slope), rtol=1e-12, atol=1e-11)


@EVERY
@PREDICTED
def test_a_batch_of_times_is_each_time_alone(name, prediction):
    field = adapted(name, prediction)
    t = torch.tensor(TIMES, dtype=F64)
    x = X[: len(t), :, None].expand(-1, -1, 2)
    alone = torch.cat([field(x[k : k + 1], t[k]) for k in range(len(t))])
    torch.testing.assert_close(field(x, t), alone, rtol=1e-14, atol=1e-14)


@EVERY
@PREDICTED
def test_single_precision_stays_close_and_finite(name, prediction):
    field = adapted(name, prediction)
    v = field(STATES.float(), ALL_TIMES.float())
    held = ALL_TIMES.clamp(field.t_min, field.t_max)[:, None]
    assert v.dtype == torch.float32
    # ε amplified by 1/MARGIN at the ends of the singular predictions, and the √ε of `tolerance`.
    expected, _ = canonical_velocity(STATES, held, M, S)
    torch.testing.assert_close(v.double(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("source", "target"), itertools.permutations(PREDICTIONS, 2))
@EVERY
def test_every_conversion_on_every_path(name, source, target):
    reference = REFERENCES[name]
    noisy, clean = reference.schedule.time_range
    times = noisy + (clean - noisy) * torch.linspace(0.1, 0.95, len(X), dtype=F64)
    all_of_them = predictions(reference, X, times[:, None], M, S)
    result = convert(
        all_of_them[source], X, times, source=source, target=target, schedule=reference.schedule
    )
    torch.testing.assert_close(result, all_of_them[target], rtol=1e-12, atol=1e-12)


def test_converting_to_itself_changes_nothing():
    for prediction in PREDICTIONS:
        kept = convert(X, X, 0.0, source=prediction, target=prediction, schedule=CondOT())
        assert kept is X


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 0.99), st.permutations(PREDICTIONS), st.integers(0, 2**31))
@pytest.mark.slow
def test_a_round_trip_of_conversions_closes(t, order, seed):
    g = torch.Generator().manual_seed(seed)
    x, value = torch.randn(2, 5, 3, generator=g, dtype=F64)
    around = value
    for source, target in itertools.pairwise([*order, order[0]]):
        around = convert(around, x, t, source=source, target=target, schedule=Cosine())
    torch.testing.assert_close(around, value, rtol=1e-9, atol=1e-9)


class TestCanonicalFunctions:
    t = torch.linspace(0.05, 0.95, len(X), dtype=F64)
    closed = predictions(REFERENCES["condot"], X, t[:, None], M, S)

    @pytest.mark.parametrize("name", ["clean", "noise", "score"])
    def test_each_follows_from_the_velocity_and_back(self, name):
        forward, backward = getattr(path, name), getattr(path, f"velocity_from_{name}")
        v = self.closed["velocity"]
        close = {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(forward(X, v, self.t), self.closed[name], **close)
        torch.testing.assert_close(backward(X, self.closed[name], self.t), v, **close)

    def test_velocity_is_the_difference_of_the_ends(self):
        ends = path.velocity(self.closed["clean"], self.closed["noise"])
        torch.testing.assert_close(ends, self.closed["velocity"], rtol=1e-12, atol=1e-12)

    def test_interpolation_runs_from_noise_to_data(self):
        x0, x1 = X, X.flip(0)
        assert torch.equal(path.interpolate(x0, x1, 0.0), x0)
        assert torch.equal(path.interpolate(x0, x1, 1.0), x1)
        expected = x0 + self.t[:, None] * (x1 - x0)
        torch.testing.assert_close(path.interpolate(x0, x1, self.t), expected, rtol=0, atol=1e-14)
        shaped = path.interpolate(x0[:, :, None], x1[:, :, None], self.t)
        torch.testing.assert_close(shaped[..., 0], expected, rtol=0, atol=1e-14)

    def test_score_is_the_gradient_of_the_log_density(self):
        mixture = GaussianMixture.isotropic(X[:4], std=0.3)
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(mixture.log_prob(x, self.t).sum(), x)
        result = path.score(X, mixture(X, self.t), self.t)
        torch.testing.assert_close(result, gradient, rtol=1e-10, atol=1e-10)


def test_a_nonlinear_model_keeps_its_jacobian():
    # A mixture on the cosine path: z has the law of (α + σ) X_t, so E[X1 | z] is the mixture's own.
    mixture = GaussianMixture.isotropic(torch.tensor([[-1.0, 0.5], [1.0, 0.0]], dtype=F64), 0.4)

    def predicts_clean(z, tau, cond):
        alpha, sigma = (math.pi / 2 * tau).sin(), (math.pi / 2 * tau).cos()
        return mixture.clean(z / (alpha + sigma), alpha / (alpha + sigma))

    field = OnCanonicalPath(predicts_clean, Cosine(), "clean")
    cotangent = X[:, 1:]
    for t in (0.0, 0.2, 0.6, 0.95):
        time = torch.tensor(t, dtype=F64)
        ours = velocity_and_vjp(field, X[:, :2], time, cotangent)
        exact = velocity_and_vjp(mixture, X[:, :2], time, cotangent)
        for value, expected in zip(ours, exact, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


class TestCall:
    def test_times_keep_their_shape_and_conditions_pass(self):
        seen = []

        def model(z, tau, cond):
            seen.append((tau.shape, cond))
            return z

        field, cond = OnCanonicalPath(model, Cosine()), {"label": torch.ones(16)}
        field(X, torch.tensor(0.5), cond)
        field(X, torch.full((16,), 0.5), cond)
        field(X, 0.5)
        assert seen == [((), cond), ((16,), cond), ((), None)]

    def test_the_model_is_shared_and_trains(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.ones((), dtype=F64))

            def forward(self, z, tau, cond):
                return self.scale * z

        model = Scaled()
        field = OnCanonicalPath(model, CondOT())
        assert list(field.parameters()) == [model.scale]
        field(X, 0.3).sum().backward()
        assert float(model.scale.grad) == pytest.approx(float(X.sum()), abs=1e-12)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, F64])
    def test_a_model_of_another_precision_returns_in_that_of_x(self, dtype):
        field = OnCanonicalPath(lambda z, tau, cond: z.to(dtype), CondOT())
        assert field(X.float(), 0.5).dtype == torch.float32

    def test_t_range_narrows_the_calls(self):
        field = adapted("condot", "velocity", t_range=(0.1, 0.8))
        assert (field.t_min, field.t_max) == (0.1, 0.8)
        assert torch.equal(field(X, 0.0), field(X, 0.1))
        assert torch.equal(field(X, 1.0), field(X, 0.8))
        assert not torch.equal(field(X, 0.2), field(X, 0.1))

    @pytest.mark.parametrize("t_range", [(0.5, 0.5), (0.7, 0.2), (0.0, 0.01), (math.nan, 1.0)])
    def test_a_range_without_times_is_refused(self, t_range):
        with pytest.raises(ValueError, match=r"t_range must overlap .* \[0.0123457, 0.998004\]"):
            adapted("ve", "clean", t_range=t_range)

    def test_unknown_predictions_are_refused(self):
        with pytest.raises(
            ValueError, match=r"prediction must be one of velocity, .* got 'epsilon'"
        ):
            OnCanonicalPath(lambda z, tau, cond: z, CondOT(), "epsilon")
        for source, target, name in (("flow", "clean", "source"), ("clean", "flow", "target")):
            with pytest.raises(ValueError, match=f"{name} must be one of .* got 'flow'"):
                convert(X, X, 0.5, source=source, target=target, schedule=CondOT())

    def test_a_model_of_the_wrong_shape_is_named(self):
        field = OnCanonicalPath(lambda z, tau, cond: z[:, :1], CondOT())
        with pytest.raises(ValueError, match=r"model returned shape \(16, 1\)"):
            field(X, 0.5)
