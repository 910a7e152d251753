"""The conditional covariance from Jacobians, and the chain that uses it, against closed forms."""

import math

import pytest
import torch
from helpers.tilt_problems import PROBLEMS, Problem

from adjoint.certificate import certify
from adjoint.chain.conditional_covariance import (
    FLOOR,
    MAX_DIM,
    conditional_covariance,
    jacobian,
)
from adjoint.chain.kernels import make_kernel, measure_mmse
from adjoint.chain.rollout import draw_noise, rollout
from flows import grid as grids
from flows.mixture import GaussianMixture

BASE = PROBLEMS["three"].base


def kernels(base, steps, samples=50_000):
    """moment_matched and covariance_matched on one grid."""
    grid = grids.uniform(steps)
    generator = torch.Generator().manual_seed(0)
    mmse = measure_mmse(base, grid, base.sample(samples, generator=generator), generator=generator)
    return (
        make_kernel("moment_matched", grid, mmse=mmse),
        make_kernel("covariance_matched", grid, mmse=mmse, covariance=base.covariance()),
    )


def states(base, t, n=64, seed=0):
    return base.marginal(float(t)).sample(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("t", [0.05, 0.3, 0.5, 0.8, 0.99])
def test_jacobian_and_spectrum_are_those_of_the_mixture(t):
    t = torch.tensor(t, dtype=torch.float64)
    x = states(BASE, t)
    v, jac = jacobian(BASE, x, t)
    torch.testing.assert_close(v, BASE(x, t), rtol=1e-12, atol=1e-12)
    for b in range(5):  # entry by entry, with rows ∂v_i
        explicit = torch.autograd.functional.jacobian(lambda y: BASE(y[None], t)[0], x[b])
        torch.testing.assert_close(jac[b], explicit, rtol=1e-10, atol=1e-10)
    found = conditional_covariance(jac, t)
    torch.testing.assert_close(found, BASE.posterior_covariance(x, t), rtol=1e-8, atol=1e-9)


def test_jacobian_rows_belong_to_outputs_shapes_and_conditions():
    """On a field whose Jacobian is not symmetric, with images as samples and a condition."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 6, generator=generator, dtype=torch.float64)

    def field(x, t, cond):
        return (cond["scale"] * (x.flatten(1) @ matrix.T)).reshape(x.shape)

    x = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)
    scale = torch.arange(1.0, 5.0, dtype=torch.float64)[:, None]
    v, jac = jacobian(field, x, torch.tensor(0.5), {"scale": scale})
    torch.testing.assert_close(v, field(x, None, {"scale": scale}))
    torch.testing.assert_close(jac, scale[:, :, None] * matrix)


def test_covariance_is_the_symmetric_part_lifted_to_the_floor():
    t = torch.tensor(0.5, dtype=torch.float64)
    jac = torch.tensor([[[1.0, 4.0], [0.0, -20.0]], [[1.0, 2.0], [0.0, 3.0]]], dtype=torch.float64)
    found = conditional_covariance(jac, t)
    plain = 0.5 * (torch.eye(2).double() + 0.25 * (jac + jac.mT))
    assert float(torch.linalg.eigvalsh(plain[0])[0]) < 0
    assert float(torch.linalg.eigvalsh(found[0])[0]) == pytest.approx(FLOOR * 0.25)
    moved = (found - plain)[0]
    torch.testing.assert_close(moved, moved[0, 0] * torch.eye(2).double(), atol=1e-14, rtol=0)
    torch.testing.assert_close(found[1], plain[1])


def test_large_samples_are_refused():
    field, t = (lambda x, t, cond=None: x), torch.tensor(0.5)
    assert jacobian(field, torch.zeros(1, MAX_DIM), t)[1].shape == (1, MAX_DIM, MAX_DIM)
    with pytest.raises(ValueError, match=rf"up to dimension {MAX_DIM}, got {MAX_DIM + 1}"):
        jacobian(field, torch.zeros(1, MAX_DIM + 1), t)


@pytest.mark.parametrize("k", [0, 1, 4, 9])
def test_noise_roots_are_square_roots_of_the_exact_transition_covariance(k):
    _, kernel = kernels(BASE, 10, samples=100)
    t, s = kernel.t[k], kernel.t[k + 1]
    x = states(BASE, t)
    root = kernel.state_noise.root(BASE, k, x)
    rho = t * (1 - s) / (s * (1 - t))
    g, q = s * (1 - rho**2), (1 - s) ** 2 * (1 - rho**2)
    exact = q * torch.eye(2, dtype=x.dtype) + g**2 * BASE.posterior_covariance(x, t)
    torch.testing.assert_close(root @ root.mT, exact, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_chain_of_a_gaussian_has_its_moments_at_every_time():
    covariance = torch.tensor([[0.8, 0.5], [0.5, 0.6]], dtype=torch.float64)
    mean = torch.tensor([0.5, -1.0], dtype=torch.float64)
    base = GaussianMixture(torch.ones(1, dtype=torch.float64), mean[None], covariance[None])
    _, kernel = kernels(base, 5)
    generator = torch.Generator().manual_seed(3)
    x0 = torch.randn(100_000, 2, generator=generator, dtype=torch.float64)
    noise = draw_noise(kernel, x0, generator=generator)
    for x, t in zip(rollout(base, base, kernel, x0, noise).xs, kernel.t, strict=True):
        exact = base.marginal(float(t))
        torch.testing.assert_close(x.mean(0), exact.mean(), rtol=0, atol=0.015)
        torch.testing.assert_close(torch.cov(x.T), exact.covariance(), rtol=0, atol=0.02)


def log_z_of_chain(kernel, problem, points=801, extent=7.0):
    """log E[e^r] at the end of a 1-D base chain, by propagating its density on a grid."""
    base = problem.base
    x = torch.linspace(-extent, extent, points, dtype=torch.float64)[:, None]
    h = float(x[1] - x[0])
    density = (-0.5 * x**2).exp() / math.sqrt(2 * math.pi)
    for k in range(kernel.steps):
        mean = kernel.mean_x[k] * x + kernel.mean_v[k] * base(x, kernel.t[k])
        if kernel.state_noise is None:
            std = kernel.std[k].expand(points, 1)
        else:
            std = kernel.state_noise.root(base, k, x)[:, 0]
        transition = torch.exp(-0.5 * ((x.T - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
        density = h * transition.T @ density
    assert h * float(density.sum()) == pytest.approx(1.0, abs=1e-3)
    return math.log(h * float((density[:, 0] * problem.reward(x).exp()).sum()))


@pytest.mark.slow
def test_bias_of_log_z_is_of_second_order_and_far_below_that_of_a_scalar_noise():
    problem = PROBLEMS["C"]
    exact = float(problem.exact()[1])
    pairs = [kernels(problem.base, steps, 400_000) for steps in (10, 20, 40)]
    scalar, full = ([log_z_of_chain(pair[i], problem) - exact for pair in pairs] for i in (0, 1))
    assert scalar == pytest.approx([0.0681, 0.0361, 0.0185], abs=1e-3)
    assert full == pytest.approx([0.0140, 0.0042, 0.0011], abs=3e-4)


def certificate(field, problem, kernel, n=4096, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(n, problem.dim, generator=generator, dtype=torch.float64)
    return certify(field, problem.base, problem.reward, kernel, x0, generator=generator)


def test_log_weights_of_the_base_are_its_rewards():
    problem = PROBLEMS["three"]
    for kernel in kernels(problem.base, 5):
        found = certificate(problem.base, problem, kernel, n=100)
        assert torch.equal(found.log_weights, problem.reward(found.samples))
        assert torch.equal(found.path_kls, torch.zeros(100, dtype=torch.float64))


def test_log_weights_are_the_ratio_of_the_gaussian_transitions():
    """log w and path KL by multivariate normal densities with the closed-form covariance."""
    problem, tilted = PROBLEMS["three"], PROBLEMS["three"].exact()[0]
    _, kernel = kernels(problem.base, 4)
    generator = torch.Generator().manual_seed(5)
    x0 = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    found = certify(tilted, problem.base, problem.reward, kernel, x0, generator=generator)
    generator.manual_seed(5)
    x0 = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    noise = draw_noise(kernel, x0, generator=generator)
    xs = rollout(tilted, problem.base, kernel, x0, noise).xs
    log_w, kl = problem.reward(xs[-1]), torch.zeros(50, dtype=torch.float64)
    for k in range(4):
        t, s, x = kernel.t[k], kernel.t[k + 1], xs[k]
        rho = t * (1 - s) / (s * (1 - t))
        g, q = s * (1 - rho**2), (1 - s) ** 2 * (1 - rho**2)
        eye = torch.eye(2, dtype=x.dtype)
        covariance = q * eye + g**2 * problem.base.posterior_covariance(x, t)
        of_base, of_tilted = (
            torch.distributions.MultivariateNormal(
                s * (x + (1 - t) * v) + (1 - s) * rho * (x - t * v), covariance
            )
            for v in (problem.base(x, t), tilted(x, t))
        )
        log_w = log_w + of_base.log_prob(xs[k + 1]) - of_tilted.log_prob(xs[k + 1])
        kl = kl + torch.distributions.kl_divergence(of_tilted, of_base)
    torch.testing.assert_close(found.log_weights, log_w, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.path_kls, kl, rtol=1e-8, atol=1e-9)


def test_log_weights_are_constant_at_the_exact_tilt_of_a_gaussian():
    """Exact at any K, where the scalar noise is exact for isotropic covariances only."""
    covariance = torch.tensor([[1.5, 0.5], [0.5, 0.3]], dtype=torch.float64)
    mean, b = torch.tensor([[0.5, -1.0]], dtype=torch.float64), torch.tensor([1.0, 2.0])
    base = GaussianMixture(torch.ones(1, dtype=torch.float64), mean, covariance[None])
    problem = Problem(base, torch.zeros(2, 2, dtype=torch.float64), b.double())
    tilted, log_z = problem.exact()
    scalar, full = kernels(base, 3)
    found = certificate(tilted, problem, full, n=200)
    exact = log_z.expand(200)
    torch.testing.assert_close(found.log_weights, exact, rtol=0, atol=1e-9)
    assert certificate(tilted, problem, scalar, n=200).log_weight_std > 0.3


@pytest.mark.parametrize("name", ["A", "square", "three"])
def test_log_weights_vary_less_at_the_exact_tilt_than_on_the_scalar_chain(name):
    problem = PROBLEMS[name]
    tilted, log_z = problem.exact()
    scalar, full = (certificate(tilted, problem, kernel) for kernel in kernels(problem.base, 10))
    assert full.log_weight_std < 0.85 * scalar.log_weight_std
    assert abs(full.log_z - float(log_z)) < 0.02 + 2 * full.log_z_stderr
