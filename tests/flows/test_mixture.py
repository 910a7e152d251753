"""The Gaussian mixture against quadrature, automatic differentiation and torch.distributions."""

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.utils._python_dispatch import TorchDispatchMode

from flows.field import Residual
from flows.mixture import GaussianMixture
from flows.networks.mlp import MLPVelocity

F64 = torch.float64
TIMES = (0.05, 0.3, 0.5, 0.8, 0.97)


def one_dim(weights, means, variances):
    return GaussianMixture(
        torch.tensor(weights, dtype=F64),
        torch.tensor(means, dtype=F64)[:, None],
        torch.tensor(variances, dtype=F64)[:, None, None],
    )


PROBLEM_A = one_dim([0.5, 0.5], [-2.0, 2.0], [0.25, 0.25])
PROBLEM_B = one_dim([0.5, 0.5], [-1.5, 1.2], [0.09, 0.49])
LINE = torch.linspace(-12, 12, 40001, dtype=F64)


def random_mixture(dim, count=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    factors = torch.randn(count, dim, dim, generator=g, dtype=F64) / math.sqrt(dim)
    covariances = factors @ factors.mT + 0.1 * torch.eye(dim, dtype=F64)
    weights = torch.rand(count, generator=g, dtype=F64) + 0.2
    return GaussianMixture(
        weights, 1.5 * torch.randn(count, dim, generator=g, dtype=F64), covariances
    )


def points(dim, n=40, seed=1, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, dim, generator=g, dtype=F64)


def reference(mixture, t=1.0):
    """The marginal at t by torch.distributions."""
    eye = torch.eye(mixture.dim, dtype=F64)
    covariances = t**2 * mixture.covariances + (1 - t) ** 2 * eye
    components = MultivariateNormal(t * mixture.means, covariances)
    return MixtureSameFamily(Categorical(mixture.weights), components)


def posterior_moments(mixture, x, t):
    """E[X1 | X_t = x] and its variance in 1-D by quadrature over X1; x of shape (B, 1)."""
    log_w = reference(mixture).log_prob(LINE[:, None]) - (x - t * LINE).square() / (
        2 * (1 - t) ** 2
    )
    w = log_w.softmax(1)
    mean = (w * LINE).sum(1)
    return mean, (w * LINE.square()).sum(1) - mean.square()


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("t", [0.0, *TIMES, 1.0])
def test_log_prob_is_that_of_torch_distributions(dim, t):
    mixture, x = random_mixture(dim), points(dim)
    expected = reference(mixture, t).log_prob(x)
    torch.testing.assert_close(mixture.log_prob(x, t), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixture.marginal(t).log_prob(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("t", [0.0, *TIMES, 1.0])
def test_score_is_the_gradient_of_log_prob(dim, t):
    mixture, x = random_mixture(dim), points(dim).requires_grad_(True)
    (expected,) = torch.autograd.grad(reference(mixture, t).log_prob(x).sum(), x)
    torch.testing.assert_close(mixture.score(x, t), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mixture", [PROBLEM_A, PROBLEM_B], ids=["A", "B"])
@pytest.mark.parametrize("t", TIMES)
def test_posterior_by_quadrature(mixture, t):
    x = torch.linspace(-3, 3, 13, dtype=F64)[:, None]
    mean, variance = posterior_moments(mixture, x, t)
    velocity = (mean - x[:, 0]) / (1 - t)  # X1 - X0 = (X1 - X_t) / (1 - t)
    torch.testing.assert_close(mixture.clean(x, t)[:, 0], mean, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(mixture(x, t)[:, 0], velocity, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        mixture.posterior_covariance(x, t)[:, 0, 0], variance, rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("dim", [2, 5])
@pytest.mark.parametrize("t", TIMES)
def test_velocity_is_the_score_identity(dim, t):
    """v = (x + (1 - t) ∇log p_t)/t, with the score from another implementation."""
    mixture, x = random_mixture(dim), points(dim).requires_grad_(True)
    (score,) = torch.autograd.grad(reference(mixture, t).log_prob(x).sum(), x)
    expected = (x.detach() + (1 - t) * score) / t
    torch.testing.assert_close(mixture(x, t), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("t", TIMES)
def test_velocity_solves_the_continuity_equation(t):
    """∂_t log p + ∇·v + v·∇log p = 0: the velocity moves the density as it should."""
    mixture, x = random_mixture(3), points(3).requires_grad_(True)
    times = torch.full((len(x),), t, dtype=F64, requires_grad=True)
    dt, score = torch.autograd.grad(mixture.log_prob(x, times).sum(), (times, x))
    v = mixture(x, times)
    rows = [torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(3)]
    residual = dt + sum(rows) + (v * score).sum(1)
    assert residual.abs().max() < 1e-9 * dt.abs().max()


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("t", TIMES)
def test_posterior_covariance_is_the_jacobian_of_the_posterior_mean(dim, t):
    mixture, x = random_mixture(dim), points(dim, 10).requires_grad_(True)
    clean = mixture.clean(x, t)
    rows = [torch.autograd.grad(clean[:, i].sum(), x, retain_graph=True)[0] for i in range(dim)]
    expected = (1 - t) ** 2 / t * torch.stack(rows, 1)
    torch.testing.assert_close(mixture.posterior_covariance(x, t), expected, rtol=1e-9, atol=1e-11)


def test_both_ends_are_exact():
    mixture, x = random_mixture(3), points(3)
    torch.testing.assert_close(mixture(x, 0.0), mixture.mean() - x, rtol=0, atol=1e-13)
    torch.testing.assert_close(mixture(x, 1.0), x, rtol=0, atol=1e-13)
    torch.testing.assert_close(mixture.clean(x, 1.0), x, rtol=0, atol=1e-13)
    prior = mixture.covariance().expand(len(x), 3, 3)
    torch.testing.assert_close(mixture.posterior_covariance(x, 0.0), prior, rtol=0, atol=1e-12)
    assert mixture.posterior_covariance(x, 1.0).abs().max() < 1e-25


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [1e3, 1e15, 1e30])
def test_finite_far_away_in_single_precision(t, size):
    mixture = random_mixture(2).float()
    x = size * torch.tensor([[1.0, -0.5], [0.0, 1.0], [-1.0, -1.0]])
    x.requires_grad_(True)
    v = mixture(x, t)
    (gradient,) = torch.autograd.grad(v.sum(), x)
    for value in (v, gradient, mixture.score(x, t), mixture.log_prob(x, t)):
        assert value.isfinite().all()


def test_times_per_point_and_responsibilities():
    mixture, x = random_mixture(2), points(2, 20)
    t = torch.linspace(0, 1, 20, dtype=F64)
    for method in (mixture, mixture.clean, mixture.score, mixture.responsibilities):
        one_by_one = torch.cat([method(x[i : i + 1], t[i]) for i in range(20)])
        torch.testing.assert_close(method(x, t), one_by_one, rtol=1e-12, atol=1e-12)
    components = reference(mixture).component_distribution
    joint = components.log_prob(x[:, None]) + mixture.weights.log()
    torch.testing.assert_close(mixture.responsibilities(x), joint.softmax(1))


def test_states_of_several_times_at_once():
    mixture = random_mixture(2)
    x = torch.randn(3, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    expected = torch.stack([mixture(x[k], t[k]) for k in range(3)])
    torch.testing.assert_close(mixture(x, t[:, None]), expected)
    assert Residual(mixture, MLPVelocity(2)).broadcasts
    assert not Residual(lambda x, t, cond: x, MLPVelocity(2)).broadcasts


def test_samples_have_the_moments_and_follow_the_generator():
    mixture, n = random_mixture(3), 200_000
    x = mixture.sample(n, generator=torch.Generator().manual_seed(3))
    assert torch.equal(x, mixture.sample(n, generator=torch.Generator().manual_seed(3)))
    deviations = (x.mean(0) - mixture.mean()) / (mixture.covariance().diagonal() / n).sqrt()
    assert deviations.abs().max() < 4
    outer = (x - mixture.mean())[:, :, None] * (x - mixture.mean())[:, None]
    errors = (outer.mean(0) - mixture.covariance()) / (outer.std(0) / math.sqrt(n))
    assert errors.abs().max() < 4.5


def test_samples_in_many_dimensions_take_the_memory_of_the_samples():
    """A matrix for each of the samples would take 13 GB; tensors of 2^26 numbers are refused."""
    d, n = 256, 50_000
    means = torch.zeros(2, d)
    means[:, 0] = torch.tensor([-3.0, 3.0])
    covariances = torch.stack([torch.eye(d), 0.1 * torch.eye(d) + 0.4])
    mixture = GaussianMixture(torch.tensor([0.25, 0.75]), means, covariances)

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            assert not isinstance(result, torch.Tensor) or result.numel() < 2**26, function
            return result

    with Largest():
        x = mixture.sample(n, generator=torch.Generator().manual_seed(0))
    right = x[:, 0] > 0
    assert abs(float(right.double().mean()) - 0.75) < 4 * math.sqrt(0.75 * 0.25 / n) + 0.002
    for rows, component in ((~right, 0), (right, 1)):
        y = x[rows][:, 1:]  # away from the coordinate that tells the components apart
        expected = covariances[component][1:, 1:]
        assert float((torch.cov(y.T) - expected).abs().max()) < 6 / math.sqrt(len(y))
        assert float(y.mean(0).abs().max()) < 5 / math.sqrt(len(y))


# Problem, A, b, and the truth: mean, variance, mass right of the midpoint of the means, log Z.
TILTS = {
    "A": (PROBLEM_A, 0.0, 0.6, (1.8173, 1.4701, 0.9168, 0.6387)),
    "B": (PROBLEM_B, 0.0, 0.8, (1.3138, 1.2159, 0.8938, 0.5203)),
    "C": (PROBLEM_B, 1.5, 0.9, (0.7862, 0.5927, 0.9093, -0.7788)),
}


@pytest.mark.parametrize("name", TILTS)
def test_tilt_pins_and_quadrature(name):
    mixture, kappa, b, pins = TILTS[name]
    tilted, log_z = mixture.tilt(torch.tensor([[kappa]], dtype=F64), torch.tensor([b], dtype=F64))
    middle = tilted.means.mean()
    right = 0.5 * torch.special.erfc(
        (middle - tilted.means) / (2 * tilted.covariances[:, 0]).sqrt()
    )
    mass = tilted.weights @ right[:, 0]
    found = (tilted.mean()[0], tilted.covariance()[0, 0], mass, log_z)
    for value, pin in zip(found, pins, strict=True):
        assert float(value) == pytest.approx(pin, abs=6e-5)
    components = reference(mixture).component_distribution.log_prob(LINE[:, None, None])
    log_w = components + mixture.weights.log() + (b * LINE - 0.5 * kappa * LINE**2)[:, None]
    w = log_w.flatten().softmax(0).reshape(-1, 2)
    mean = (w.sum(1) * LINE).sum()
    variance = (w.sum(1) * (LINE - mean).square()).sum()
    total = log_w.logsumexp((0, 1)) + (LINE[1] - LINE[0]).log()
    found = (tilted.mean()[0], tilted.covariance()[0, 0], tilted.weights[1], log_z)
    for value, truth in zip(found, (mean, variance, w[:, 1].sum(), total), strict=True):
        assert float(value) == pytest.approx(float(truth), abs=1e-9)


@pytest.mark.parametrize("dim", [2, 5])
def test_tilted_density_is_the_base_times_the_exponential_of_the_reward(dim):
    """Pointwise, so that weights, means, covariances and log Z are judged together."""
    mixture, x = random_mixture(dim), points(dim)
    g = torch.Generator().manual_seed(4)
    root = torch.randn(dim, dim, generator=g, dtype=F64)
    A = root @ root.mT / dim - 0.05 * torch.eye(dim, dtype=F64)
    A = A + 0.3 * (root - root.mT)  # the antisymmetric part must not matter
    b = torch.randn(dim, generator=g, dtype=F64)
    tilted, log_z = mixture.tilt(A, b)
    reward = -0.5 * torch.einsum("bi,ij,bj->b", x, A, x) + x @ b
    expected = reference(mixture).log_prob(x) + reward - log_z
    torch.testing.assert_close(reference(tilted).log_prob(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("b", "log_weight"), [(60.0, -240.0), (400.0, -708.3964)])
def test_tilt_that_underflows_stays_a_mixture(b, log_weight):
    mixture = GaussianMixture.isotropic(torch.tensor([[-2.0], [2.0]]), 0.5)
    tilted, log_z = mixture.tilt(torch.zeros(1, 1), torch.tensor([b]))
    assert float(tilted.log_weights[0]) == pytest.approx(log_weight, rel=1e-6)
    assert float(log_z) == pytest.approx(math.log(0.5) + b * 2 + 0.5 * b**2 * 0.25, rel=1e-6)
    for law in (tilted, tilted.marginal(1.0)):
        assert float(law.mean()[0]) == pytest.approx(2 + b * 0.25)
        assert law(torch.zeros(1, 1), 0.5).isfinite().all()


def test_mmse_pins_of_problem_a():
    """E Var(X1 | X_t) at t = 0, .1, ..., .9, the table that moment-matched kernels use."""
    pins = (4.25, 4.0379, 3.3428, 2.2768, 1.1945, 0.4821, 0.2009, 0.1085, 0.0501, 0.0118)
    x = torch.linspace(-8, 8, 4001, dtype=F64)[:, None]
    for k, pin in enumerate(pins):
        p = PROBLEM_A.log_prob(x, k / 10).exp()
        variance = PROBLEM_A.posterior_covariance(x, k / 10)[:, 0, 0]
        assert float((p * variance).sum() / p.sum()) == pytest.approx(pin, abs=6e-5)


def test_module_behaviour():
    mixture = random_mixture(2)
    other = GaussianMixture.isotropic(torch.zeros(3, 2, dtype=F64), 1.0)
    other.load_state_dict(mixture.state_dict())
    x = points(2)
    torch.testing.assert_close(other(x, 0.4), mixture(x, 0.4), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            random_mixture(2).float()(x.float(), 0.4), mixture(x, 0.4).float(), rtol=1e-4, atol=1e-4
        )
    assert mixture(x.float(), 0.4).dtype == torch.float32


def test_isotropic():
    mixture = GaussianMixture.isotropic(
        points(2, 3), torch.tensor([0.5, 1.0, 2.0], dtype=F64), torch.tensor([1.0, 2.0, 1.0])
    )
    variances = torch.tensor([0.25, 1.0, 4.0], dtype=F64)[:, None, None]
    assert torch.equal(mixture.covariances, variances * torch.eye(2, dtype=F64))
    assert mixture.weights.tolist() == [0.25, 0.5, 0.25]
    with pytest.raises(ValueError, match=r"std must be positive, got -1.0"):
        GaussianMixture.isotropic(torch.zeros(2, 2), -1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.tensor([1.0, -1.0])}, r"weights must be positive, got \[1.0, -1.0\]"),
        ({"weights": torch.ones(3)}, r"must have shapes .* got \(3,\)"),
        ({"means": torch.zeros(2)}, "must have shapes"),
        ({"means": torch.zeros(2, 2, dtype=torch.int64)}, "means must be floating point"),
        ({"means": torch.full((2, 2), math.nan)}, "means must be finite"),
        ({"covariances": torch.eye(2)}, "must have shapes"),
        ({"covariances": -torch.eye(2).expand(2, 2, 2)}, "positive definite; component 0"),
        ({"covariances": torch.ones(2, 2, 2).triu() + 1}, "covariances must be symmetric"),
    ],
)
def test_bad_parameters(change, message):
    good = {"weights": torch.ones(2), "means": torch.zeros(2, 2)}
    good["covariances"] = torch.eye(2).expand(2, 2, 2)
    GaussianMixture(**good)
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**{**good, **change})


def test_bad_arguments():
    mixture = random_mixture(2)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 2\), got \(4, 3\)"):
        mixture(torch.zeros(4, 3), 0.5)
    with pytest.raises(ValueError, match=r"positive definite; component \d has eigenvalue -"):
        mixture.tilt(-1e3 * torch.eye(2), torch.zeros(2))
    with pytest.raises(ValueError, match="A and b must have shapes"):
        mixture.tilt(torch.eye(3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\], got 1.5"):
        mixture.marginal(1.5)


@pytest.mark.parametrize("std", [1e-3, 1e-6, 1e-9])
def test_tilt_of_narrow_components(std):
    """In the limit weights are w exp r(m), and log Z = log Σ w exp r(m): no digits cancel."""
    means = torch.tensor([[3.0, -7.0], [-2.0, 4.0]], dtype=F64)
    A, b = (torch.tensor(v, dtype=F64) for v in ([[0.3, 0.1], [0.1, 0.2]], [0.5, -0.2]))
    law = GaussianMixture.isotropic(means, std)
    tilted, log_z = law.tilt(A, b)
    r = means @ b - 0.5 * ((means @ A) * means).sum(1)
    # to second order of std, about a mean: E exp(gᵀy - ½ yᵀA y) = 1 + ½ std² (|g|² - tr A)
    r = r + 0.5 * std**2 * ((b - means @ A).square().sum(1) - A.trace())
    assert float(log_z) == pytest.approx(float((r + math.log(0.5)).logsumexp(0)), abs=1e-10)
    torch.testing.assert_close(tilted.weights, r.softmax(0), rtol=0, atol=1e-10)
    moved = (tilted.means - means) / std**2
    digits = 1e-15 / std**2 * 10  # of a mean that moves by std²
    torch.testing.assert_close(moved, b - means @ A, rtol=1e-4, atol=digits)
