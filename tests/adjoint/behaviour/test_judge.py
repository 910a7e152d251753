"""An independent judge of one tilt: NumPy only, no gradient, no chain, no network.

The problem is the mixture of three Gaussians with a quadratic reward, written down here a second
time.  Its tilt is found (a) by weighting samples of the base by e^r and (b) by a random-walk
Metropolis run on p(x) e^{r(x)}, and compared with the certificate of a network that ``tilt`` has
trained for a few seconds.
"""

import math

import numpy as np
import pytest
import torch
from helpers.tilt_problems import PROBLEMS

from adjoint.certificate import certify
from adjoint.chain.kernels import make_kernel, measure_mmse
from adjoint.tilt import TiltConfig, tilt
from flows import grid as grids
from flows.field import Residual
from flows.networks.mlp import MLPVelocity

MEANS = np.array([[0.0, 2.0], [1.7, -1.0], [-1.7, -1.0]])
VARIANCES = np.array([0.2, 0.3, 0.4])
WEIGHTS = np.array([0.2, 0.3, 0.5])


def reward(x):
    return (
        0.5 * x[:, 0]
        - 0.3 * x[:, 1]
        - 0.5 * (0.3 * x[:, 0] ** 2 + 0.2 * x[:, 0] * x[:, 1] + 0.2 * x[:, 1] ** 2)
    )


def log_density(x):
    """Log of the untilted mixture's density at x (N, 2)."""
    squares = ((x[:, None] - MEANS) ** 2).sum(2)
    terms = np.log(WEIGHTS / (2 * math.pi * VARIANCES)) - squares / (2 * VARIANCES)
    return np.logaddexp.reduce(terms, axis=1)


def observables(x):
    """(N, 6): both coordinates, the reward, and which mode is the nearest."""
    nearest = ((x[:, None] - MEANS) ** 2).sum(2).argmin(1)
    return np.column_stack([x, reward(x), nearest[:, None] == np.arange(3)])


def by_importance(n=400_000, seed=0):
    """Expectations, their standard errors, and log Z with its own, from samples of the base."""
    rng = np.random.default_rng(seed)
    k = rng.choice(3, n, p=WEIGHTS)
    x = MEANS[k] + np.sqrt(VARIANCES[k])[:, None] * rng.standard_normal((n, 2))
    w = np.exp(reward(x))
    values = observables(x)
    mean = w @ values / w.sum()
    error = np.sqrt((w**2) @ (values - mean) ** 2) / w.sum()
    return mean, error, math.log(w.mean()), w.std() / w.mean() / math.sqrt(n)


def by_metropolis(chains=256, steps=6000, burn_in=500, seed=0):
    """Expectations and standard errors by Metropolis chains with short and long proposals.

    The long ones lead from mode to mode.  The chains start far apart and are independent, so the
    spread of their means gives the error, correlations in time included.
    """
    rng = np.random.default_rng(seed)
    x = 3 * rng.standard_normal((chains, 2))
    log_p = log_density(x) + reward(x)
    total = np.zeros((chains, 6))
    for step in range(burn_in + steps):
        proposal = x + (0.5, 2.5)[step % 2] * rng.standard_normal(x.shape)
        log_q = log_density(proposal) + reward(proposal)
        accept = np.log(rng.random(chains)) < log_q - log_p
        x[accept], log_p[accept] = proposal[accept], log_q[accept]
        if step >= burn_in:
            total += observables(x)
    means = total / steps
    return means.mean(0), means.std(0, ddof=1) / math.sqrt(chains)


@pytest.fixture(scope="module")
def markov_chain():
    return by_metropolis()


@pytest.fixture(scope="module")
def tilted():
    """A short training, and its certificate on a finer chain than it was trained on."""
    problem = PROBLEMS["three"]
    config = TiltConfig(
        iterations=300,
        lr=5e-3,
        ema_decay=0.98,
        steps=10,
        batch_size=256,
        replay_size=768,
        losses_per_rollout=3,
        certificate_samples=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Residual(problem.base, MLPVelocity(2, hidden=(64, 64), zero_init=True))
    found = tilt(problem.base, problem.reward, shape=(2,), config=config, model=model)
    generator = torch.Generator().manual_seed(7)
    grid = grids.uniform(40)
    x1 = problem.base.sample(20_000, generator=generator).float()
    mmse = measure_mmse(problem.base, grid, x1, generator=generator)
    kernel = make_kernel(
        "covariance_matched", grid, mmse=mmse, covariance=problem.base.covariance()
    )
    x0 = torch.randn(16_384, 2, generator=generator)
    return found, certify(
        found.field, problem.base, problem.reward, kernel, x0, generator=generator
    )


def agree(a, a_error, b, b_error):
    return np.all(np.abs(a - b) < 3 * np.hypot(a_error, b_error))


def test_the_problem_written_here_is_the_one_that_was_tilted():
    x = np.random.default_rng(0).standard_normal((50, 2)) * 2
    problem, points = PROBLEMS["three"], torch.from_numpy(x)
    np.testing.assert_allclose(log_density(x), problem.base.log_prob(points), rtol=1e-12)
    np.testing.assert_allclose(reward(x), problem.reward(points), rtol=1e-12)


@pytest.mark.slow
def test_certificate_agrees_with_importance_resampling_of_the_base(tilted):
    _, certificate = tilted
    mean, error, log_z, log_z_error = by_importance()
    values = torch.from_numpy(observables(certificate.samples.double().numpy()))
    found, found_error = (part.numpy() for part in certificate.weighted_mean(values))
    assert agree(found, found_error, mean, error)
    assert agree(certificate.log_z, certificate.log_z_stderr, log_z, log_z_error)
    assert np.all(found_error < 0.02)  # error bars that say something


@pytest.mark.slow
def test_certificate_agrees_with_a_long_markov_chain(tilted, markov_chain):
    _, certificate = tilted
    mean, error = markov_chain
    values = torch.from_numpy(observables(certificate.samples.double().numpy()))
    found, found_error = (part.numpy() for part in certificate.weighted_mean(values))
    assert agree(found, found_error, mean, error)
    assert np.all(error < 0.01)
    assert agree(mean, error, *by_importance()[:2])  # and the judges with each other


@pytest.mark.slow
def test_the_tilted_flow_itself_comes_close_without_weights(tilted, markov_chain):
    found, certificate = tilted
    exact, _ = markov_chain
    generator = torch.Generator().manual_seed(0)
    x = found.sample(8192, grid=40, method="ab2", generator=generator)
    after = observables(x.double().numpy()).mean(0)
    before = observables(found.base.sample(8192, generator=generator).numpy()).mean(0)
    assert np.all(np.abs(after - exact)[[0, 1, 2]] < 0.3 * np.abs(before - exact)[[0, 1, 2]])
    modes = [np.abs(p[3:] - exact[3:]).sum() / 2 for p in (before, after)]
    assert modes[1] < 0.2 * modes[0]
    assert certificate.ess > 0.85
