"""ODE solvers against exact flow maps, log-likelihoods against closed-form densities."""

import math

import pytest
import torch

from flows.mixture import GaussianMixture
from flows.sampling import ADAPTIVE, FIXED, log_likelihood, sample

F64 = torch.float64
MEAN = torch.tensor([0.5, -1.0], dtype=F64)
STD = torch.tensor([0.4, 1.5], dtype=F64)
GAUSSIAN = GaussianMixture(torch.ones(1), MEAN[None], torch.diag(STD.square())[None])
NOISE = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=F64)


def exact(x0, t):
    """The flow map of N(m, diag(s²)): x_t = t m + sqrt(t² s² + (1 - t)²) x0."""
    return t * MEAN + (t**2 * STD.square() + (1 - t) ** 2).sqrt() * x0


def mixture(dim, seed=0):
    g = torch.Generator().manual_seed(seed)
    factors = torch.randn(3, dim, dim, generator=g, dtype=F64) / math.sqrt(dim)
    covariances = factors @ factors.mT + 0.2 * torch.eye(dim, dtype=F64)
    return GaussianMixture(
        torch.tensor([0.2, 0.3, 0.5]), torch.randn(3, dim, generator=g, dtype=F64), covariances
    )


def uneven(steps):
    """Steps of alternating lengths 1 : 3, whose ratio does not tend to one under refinement."""
    widths = torch.tensor([0.0] + [1.0, 3.0] * (steps // 2), dtype=F64)
    return widths.cumsum(0) / widths.sum()


def cdf_error(method, grid):
    """In one dimension a flow keeps quantiles: F_1(x_1) = Φ(x_0), whatever the mixture."""
    field = GaussianMixture(
        torch.tensor([0.3, 0.7]),
        torch.tensor([[-1.0], [1.5]], dtype=F64),
        torch.tensor([[[0.5]], [[1.2]]], dtype=F64),
    )
    x0 = torch.linspace(-2.5, 2.5, 41, dtype=F64)[:, None]
    x1 = sample(field, x0, grid=grid, method=method)
    below = torch.special.ndtr((x1 - field.means[:, 0]) / field.covariances[:, 0, 0].sqrt())
    return float((below @ field.weights - torch.special.ndtr(x0[:, 0])).norm())


@pytest.mark.parametrize("grid", [int, uneven], ids=["uniform", "uneven"])
@pytest.mark.parametrize(
    ("method", "order"),
    [("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4), ("ab2", 2)],
)
def test_order_of_convergence(method, order, grid):
    errors = [cdf_error(method, grid(steps)) for steps in (60, 120)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)
    assert errors[1] < 0.02


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.slow
def test_adaptive_methods_reach_the_tolerance(method):
    x1 = sample(GAUSSIAN, NOISE, method=method, rtol=1e-6, atol=1e-6)
    assert (x1 - exact(NOISE, 1.0)).abs().max() < 2e-5


@pytest.mark.parametrize("method", ["rk4", "ab2", "dopri5"])
def test_trajectory_is_the_flow_at_every_time_of_the_grid(method):
    grid = torch.tensor([0.1, 0.15, 0.4, 0.8, 0.95], dtype=F64)
    start = exact(NOISE, 0.1)
    states = sample(
        GAUSSIAN, start, grid=grid, method=method, trajectory=True, rtol=1e-7, atol=1e-7
    )
    assert states.shape == (5, 64, 2)
    assert torch.equal(states[0], start)
    tolerance = {"rk4": 2e-2, "ab2": 0.5, "dopri5": 1e-5}[method]
    for state, t in zip(states, grid, strict=True):
        assert (state - exact(NOISE, float(t))).abs().max() < tolerance
    last = sample(GAUSSIAN, start, grid=grid, method=method, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(last, states[-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "errors"),
    [("euler", (-0.70, -0.385, -0.20)), ("ab2", (-0.21, -0.06, -0.016))],
)
def test_variance_error_at_few_steps(method, errors):
    """½N(±2, ¼) tilted by exp(0.6 x), pushed forward by quadrature over the noise."""
    base = GaussianMixture.isotropic(torch.tensor([[-2.0], [2.0]], dtype=F64), 0.5)
    field, _ = base.tilt(torch.zeros(1, 1), torch.tensor([0.6]))
    x0 = torch.linspace(-7, 7, 4001, dtype=F64)[:, None]
    weights = (-0.5 * x0.square()).softmax(0)
    for steps, expected in zip((5, 10, 20), errors, strict=True):
        x1 = sample(field, x0, grid=steps, method=method)
        variance = (weights * x1.square()).sum() - (weights * x1).sum().square()
        assert float(variance - field.covariance()[0, 0]) == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize("method", FIXED + ADAPTIVE)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_the_field_is_never_evaluated_outside_the_grid(method, scale):
    seen = []

    def field(x, t, cond):
        assert t.shape == ()
        assert t.dtype == x.dtype
        seen.append(float(t))
        return scale * torch.ones_like(x)

    x0 = NOISE.float()
    grid = torch.tensor([0.2, 0.5, 0.9])
    torch.testing.assert_close(sample(field, x0, grid=grid, method=method), x0 + 0.7 * scale)
    assert min(seen) == pytest.approx(0.2, abs=1e-6)
    assert max(seen) <= 0.9 + 1e-6


def test_adams_bashforth_evaluates_once_per_step():
    count = 0

    def field(x, t, cond):
        nonlocal count
        count += 1
        return GAUSSIAN(x, t)

    sample(field, NOISE, grid=17, method="ab2")
    assert count == 17


def test_conditions_reach_the_field_and_nothing_keeps_a_gradient():
    gain = torch.linspace(0, 1, 64, dtype=F64)[:, None].requires_grad_(True)

    def field(x, t, cond):
        return cond["gain"].expand_as(x)

    x0 = NOISE.clone().requires_grad_(True)
    x1 = sample(field, x0, grid=4, cond={"gain": gain})
    torch.testing.assert_close(x1, x0.detach() + gain.detach())
    assert not x1.requires_grad
    log_p, _ = log_likelihood(field, x0, cond={"gain": gain})
    assert not log_p.requires_grad


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("end", [1.0, 0.5])
@pytest.mark.slow
def test_exact_log_likelihood(dim, end):
    field = mixture(dim)
    x = field.marginal(end).sample(30, generator=torch.Generator().manual_seed(1))
    grid = torch.tensor([0.0, end], dtype=F64)
    log_p, x0 = log_likelihood(field, x, grid=grid, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_p, field.log_prob(x, end), rtol=0, atol=1e-6)
    back = sample(field, x0, grid=grid, method="dopri5", rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("method", "tolerance"), [("rk4", 1e-6), ("ab2", 1e-3)])
@pytest.mark.slow
def test_exact_log_likelihood_by_fixed_steps(method, tolerance):
    field = mixture(2)
    x = field.sample(30, generator=torch.Generator().manual_seed(1))
    log_p, _ = log_likelihood(field, x, grid=200, method=method)
    torch.testing.assert_close(log_p, field.log_prob(x), rtol=0, atol=tolerance)


@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.slow
def test_hutchinson_is_unbiased(probes):
    """The same point with 2000 draws of signs: the mean is the closed form within its error."""
    field = mixture(3)
    x = torch.tensor([[0.4, -0.8, 0.3]], dtype=F64)
    log_p, _ = log_likelihood(
        field,
        x.expand(2000, 3),
        method="rk4",
        grid=60,
        divergence="hutchinson",
        probes=probes,
        generator=torch.Generator().manual_seed(0),
    )
    error = float(log_p.std()) / math.sqrt(2000)
    assert 0.001 < error * math.sqrt(probes) < 0.1
    assert abs(float(log_p.mean() - field.log_prob(x)[0])) < 4 * error


def test_hutchinson_follows_the_generator_and_is_exact_for_a_diagonal_jacobian():
    x = exact(NOISE, 1.0)
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    for g in seeds:
        log_p, _ = log_likelihood(GAUSSIAN, x, divergence="hutchinson", generator=g, atol=1e-7)
        torch.testing.assert_close(log_p, GAUSSIAN.log_prob(x), rtol=0, atol=1e-4)
    field, x = mixture(2), NOISE[:4]
    runs = [
        log_likelihood(
            field, x, divergence="hutchinson", generator=torch.Generator().manual_seed(seed)
        )[0]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2])


def test_shaped_states():
    """States (B, 1, 2, 2) flow as their flattened selves, samples and likelihoods alike."""
    flat = mixture(4)

    def field(x, t, cond):
        return flat(x.flatten(1), t).reshape(x.shape)

    x = torch.randn(6, 1, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    x1 = sample(field, x, grid=10)
    assert x1.shape == x.shape
    torch.testing.assert_close(x1.flatten(1), sample(flat, x.flatten(1), grid=10))
    log_p, x0 = log_likelihood(field, x1, rtol=1e-8, atol=1e-8)
    assert x0.shape == x.shape
    torch.testing.assert_close(log_p, flat.log_prob(x1.flatten(1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("function", [sample, log_likelihood])
def test_bad_arguments(function):
    with pytest.raises(ValueError, match=r"method must be one of euler, .*, got 'eular'"):
        function(GAUSSIAN, NOISE, method="eular")
    with pytest.raises(ValueError, match=r"returned shape \(64, 1\)"):
        function(lambda x, t, cond: x[:, :1], NOISE)
    with pytest.raises(ValueError, match="grid"):
        function(GAUSSIAN, NOISE, grid=torch.tensor([0.0, 0.5, 0.4, 1.0]))
    with pytest.raises(RuntimeError, match="dopri5 could not integrate the field"):
        function(lambda x, t, cond: x / 0, NOISE, method="dopri5")


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
@pytest.mark.slow
def test_a_likelihood_does_not_depend_on_the_points_beside_it(method):
    """A point between two narrow modes, which needs short steps, beside many that do not."""
    law = GaussianMixture.isotropic(torch.tensor([[-3.0], [3.0]], dtype=F64), 0.1)
    hard = torch.tensor([[0.05]], dtype=F64)
    beside = torch.cat([hard, law.sample(2000, generator=torch.Generator().manual_seed(0))])
    found = log_likelihood(law, beside, method=method)[0][:1]
    assert float(found - law.log_prob(hard)) == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("method", ["midpoint", "ab2", "dopri5"])
def test_no_points_are_sampled_to_none(method):
    assert sample(GAUSSIAN, NOISE[:0], method=method).shape == (0, 2)
    assert sample(GAUSSIAN, NOISE[:0], method=method, grid=4, trajectory=True).shape == (5, 0, 2)


def test_bad_arguments_of_the_likelihood():
    with pytest.raises(ValueError, match="grid must start at 0"):
        log_likelihood(GAUSSIAN, NOISE, grid=torch.tensor([0.5, 1.0]))
    with pytest.raises(ValueError, match="divergence must be 'exact' or 'hutchinson', got 'exakt'"):
        log_likelihood(GAUSSIAN, NOISE, divergence="exakt")
    with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
        log_likelihood(GAUSSIAN, NOISE, divergence="hutchinson", probes=0)
