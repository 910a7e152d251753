"""The relative entropy to the base: closed forms, exact divergences, and margins of closeness."""

import copy
import json
import math
from functools import partial

import pytest
import torch
from helpers import frontier_batches
from torch.distributions import MultivariateNormal, kl_divergence

from applications.toy2d.digits import unet_flow
from benchmarks.digits_frontier.alternatives import RewardGuidance
from benchmarks.digits_frontier.distributions import SampleSet
from benchmarks.digits_frontier.kl import best_of_kl, ode_kl, tilt_kl
from benchmarks.digits_frontier.margins import margin, root
from benchmarks.digits_frontier.metrics import mean, stderr
from benchmarks.digits_frontier.rows import Point, line, make_rows
from flows.mixture import GaussianMixture
from flows.sampling import log_likelihood


def gaussian(mean, covariance):
    S = torch.tensor(covariance, dtype=torch.float64)
    m = torch.tensor([mean], dtype=torch.float64)
    return GaussianMixture(torch.ones(1, dtype=torch.float64), m, S[None])


def distribution(field):
    return MultivariateNormal(field.means[0], field.covariances[0])


def drawn_from(field, n):
    z = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return SampleSet(field.means[0] + z @ torch.linalg.cholesky(field.covariances[0]).T, None)


COVARIANCE = [[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 0.7]]
BASE = gaussian([1.0, -1.0, 0.5], COVARIANCE)
SHIFTED = gaussian([1.6, -1.0, 0.1], COVARIANCE)
SCALED = gaussian([1.0, -0.6, 0.5], [[1.2, 0.2, 0.1], [0.2, 1.5, 0.0], [0.1, 0.0, 0.5]])


@pytest.mark.parametrize("field", [SHIFTED, SCALED])
@pytest.mark.parametrize("probes", [1, 2])
@pytest.mark.slow
def test_it_is_the_one_between_gaussians(field, probes):
    found = ode_kl(field, BASE, drawn_from(field, 4100), batch=256, steps=20, probes=probes, seed=0)
    assert found.shape == (16,)
    expected = float(kl_divergence(distribution(field), distribution(BASE)))
    assert mean(found) == pytest.approx(expected, abs=3 * stderr(found))
    assert stderr(found) < 0.15 * expected


@pytest.mark.slow
def test_without_correlations_it_is_right_for_every_sample():
    """The Jacobian is diagonal, so that random signs give its trace exactly."""
    base = gaussian([1.0, -1.0, 0.5], [[2.0, 0, 0], [0, 1.0, 0], [0, 0, 0.5]])
    field = gaussian([0.5, -1.0, 0.7], [[1.0, 0, 0], [0, 1.5, 0], [0, 0, 0.4]])
    drawn = drawn_from(field, 6)
    found = ode_kl(field, base, drawn, batch=1, steps=50, probes=1, seed=0)
    expected = distribution(field).log_prob(drawn.samples) - distribution(base).log_prob(
        drawn.samples
    )
    torch.testing.assert_close(found, expected, atol=3e-3, rtol=0)


def a_flow(labelled, scale):
    """A small UNet flow of digits that is far from its Gaussian by about ``scale``."""
    images = torch.randn(80, 64, generator=torch.Generator().manual_seed(0))
    flow = unet_flow.make_flow(images, widths=(4,), labelled=labelled)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        for parameter in flow.correction.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return unet_flow.guided(flow, 1.5) if labelled else flow


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.slow
def test_random_signs_agree_with_the_exact_divergence(labelled):
    base, field = a_flow(labelled, 0.0), a_flow(labelled, 0.1)
    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(24) % 10 if labelled else None
    found = ode_kl(field, base, SampleSet(x, labels), batch=2, steps=3, probes=16, seed=0)
    options = {"grid": 3, "method": "midpoint"}
    options["cond"] = {"label": labels} if labelled else None
    exact = log_likelihood(field, x, **options)[0] - log_likelihood(base, x, **options)[0]
    exact = exact.double().reshape(12, 2).mean(1)
    difference = found - exact
    assert mean(difference) == pytest.approx(0, abs=3.5 * stderr(difference))
    assert float(difference.std()) < 0.3 * float(exact.std())


def test_a_copy_of_the_base_has_none():
    base = a_flow(False, 0.1)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    found = ode_kl(
        copy.deepcopy(base), base, SampleSet(x, None), batch=4, steps=3, probes=1, seed=0
    )
    assert found.tolist() == [0, 0]


def test_guidance_has_the_derivative_of_its_velocity_and_samples_without_one():
    def reward(x, cond):
        return torch.sin(x).sum(1)

    guidance = RewardGuidance(BASE, reward, 0.7)
    x = drawn_from(BASE, 1).samples
    t, h = torch.tensor(0.6, dtype=torch.float64), 1e-5
    plain = guidance(x, t)
    assert not plain.requires_grad
    followed = guidance(x.clone().requires_grad_(True), t)
    assert torch.equal(plain, followed.detach())
    found = torch.autograd.functional.jacobian(lambda x: guidance(x[None], t)[0], x[0])
    steps = h * torch.eye(3, dtype=torch.float64)
    expected = (guidance(x + steps, t) - guidance(x - steps, t)).T / (2 * h)
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("n", [2, 5, 32])
def test_the_best_of_n_has_the_entropy_of_its_rank(n):
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = n * u ** (n - 1)
    assert best_of_kl(n) == pytest.approx(
        float(torch.special.xlogy(density, density).mean()), abs=1e-5
    )


def test_the_exact_tilt_of_a_gaussian_with_its_standard_error():
    """By r = b x the Gaussian N(0, 1) moves to N(b, 1), at the distance b²/2."""
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(200):
        x = torch.randn(2, 2000, generator=g, dtype=torch.float64)
        found.append(tilt_kl([0.4 * x[0] + 5, -0.8 * x[1]], 16))
    means = torch.tensor([mean(kl) for kl in found])
    assert float(means.mean()) == pytest.approx((0.08 + 0.32) / 2, abs=0.003)
    stated = torch.tensor([stderr(kl) for kl in found]).square().mean().sqrt()
    assert float(stated) == pytest.approx(float(means.std()), rel=0.15)
    w = torch.softmax(0.4 * x[0], 0) * 2000
    alone = tilt_kl([0.4 * x[0]], 16)
    assert mean(alone) == pytest.approx(float(torch.special.xlogy(w, w).mean()))


batches = partial(frontier_batches.batches, metric="kl")


def test_closeness_is_held_against_the_straight_line_of_the_root():
    curve = [batches(0, 0), batches(2, 4), batches(6, 16)]
    found = margin(batches(1, 0.25), curve, "kl")
    assert (found.difference, found.stderr) == (pytest.approx(0.75), 0)
    assert margin(batches(4, 9.5), curve, "kl").difference == pytest.approx(-0.5)
    below = margin(batches(0.5, -0.05, 0.1), curve, "kl")
    assert below.difference == pytest.approx(0.3)
    assert margin(batches(7, 1), curve, "kl") is None


def test_where_the_root_is_uncertain_the_chord_goes_on_to_the_next_setting():
    unclear = [batches(1, 0.01, 1.0), batches(1, -0.5), batches(1, math.nan), batches(1, math.inf)]
    assert [root(point["kl"]) for point in unclear] == [None] * 4
    curve = [batches(0, 0), *unclear, batches(4, 4)]
    assert margin(batches(1, 0), curve, "kl").difference == pytest.approx(0.25)


def test_the_standard_error_of_closeness_is_that_of_its_repetitions():
    g = torch.Generator().manual_seed(0)

    def noisy(reward, kl, size):
        r, d = size * torch.randn(2, 32, generator=g, dtype=torch.float64)
        return {"reward": reward + 2 * r, "kl": kl + 0.7 * r + d}

    found = [
        margin(noisy(3, 3.0, 0.5), [noisy(0, 1.0, 0.3), noisy(6, 9.0, 0.8)], "kl")
        for _ in range(400)
    ]
    differences = torch.tensor([m.difference for m in found])
    stated = torch.tensor([m.stderr for m in found]).square().mean().sqrt()
    assert float(differences.mean()) == pytest.approx(1, abs=0.05)
    assert float(stated) == pytest.approx(float(differences.std()), rel=0.12)


def test_rows_say_who_is_as_close():
    def point(method, strength, reward, kl):
        values = {"classes": 5.0, "distance": 5.0, "coverage": 5.0, "nearest": 1.0, "certain": 1.0}
        values |= {"reward": reward, "kl": kl}
        metrics = {name: torch.full((4,), v, dtype=torch.float64) for name, v in values.items()}
        return Point("ink", method, strength, metrics, torch.zeros(1, 64), {})

    points = [
        point("base", 0, 0.0, 0.0),
        point("best_of_n", 2, 2.0, 4.0),
        point("guidance", 1, 2.0, 0.5),
        point("backprop_all", 1, 2.0, math.nan),
        point("exact", 1, 1.0, 0.5),
    ]
    rows = make_rows(points)
    assert "kl" not in rows[3]
    assert "kl_stderr" not in rows[3]
    exact = rows[4]
    assert exact["kl"] == 0.5
    assert exact["closeness_over_best_of_n"] == pytest.approx(0.5)
    assert exact["closeness_over_guidance"] == pytest.approx(0.125 - 0.5)
    found = [exact[f"as_close_{m}"] for m in ("best_of_n", "guidance", "backprop_all")]
    assert found == [1, 0, -1]
    assert exact["at_least_guidance"] == 1  # closeness is no part of what decides there
    assert "closeness +0.500" in line(exact)
    assert all("nan" not in json.dumps(row).lower() for row in rows)
