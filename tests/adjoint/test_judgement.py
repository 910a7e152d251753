"""The judgement of a tilt: each rule by weights whose truth is known, then problems end to end."""

import copy
import math
import warnings

import pytest
import torch
from helpers.linear_tilt import Shift, run, with_options
from helpers.tilt_problems import LAMBDA, PROBLEMS, S2, M, gaussian, linear
from scipy.stats import genpareto

from adjoint.arguments import check_arguments
from adjoint.certificate import Certificate
from adjoint.certify_tilt import certify_tilt, wide_noise
from adjoint.config import TiltConfig
from adjoint.judgement import (
    DO_NOT_TRUST,
    GOOD,
    USE_WEIGHTS,
    BaseSamples,
    judgement_of,
    unvisited_share,
    weighted_mean,
)
from adjoint.pareto import pareto_shape, tail_shape
from adjoint.preparation import prepare_tilt
from flows.mixture import GaussianMixture

N = 4096


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(n=N, seed=0):
    return torch.randn(n, generator=seeded(seed), dtype=torch.float64)


def certificate(log_w, rewards=None, groups=1):
    rewards = log_w if rewards is None else rewards
    return Certificate(rewards[:, None], rewards, log_w, torch.zeros_like(log_w), groups)


def base(rewards):
    return [BaseSamples(rewards, rewards)]


def agreeing(found):
    """Base samples that say what the certificate says."""
    return [BaseSamples(found.rewards, found.log_weights)]


def texts(found):
    return " / ".join(finding.text for finding in found.findings)


# --- the tail of the weights ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.3, 0.7, 1.2])
def test_the_shape_is_that_of_a_generalised_pareto_distribution(shape):
    """And as near to it as scipy's maximum of the likelihood, on the same excesses."""
    found, fitted = [], []
    for seed in range(10):
        x = genpareto.rvs(shape, scale=3.0, size=1000, random_state=seed)
        found.append(pareto_shape(torch.from_numpy(x)))
        fitted.append(genpareto.fit(x, floc=0)[0])
    assert sum(found) / 10 == pytest.approx(shape, abs=0.05)
    assert sum(found) / 10 == pytest.approx(sum(fitted) / 10, abs=0.03)


@pytest.mark.parametrize("shape", [0.3, 0.5, 1.0])
def test_the_tail_of_weights_that_are_a_power_of_a_uniform_number(shape):
    """P(w > x) = x^(-1/k) for w = u^(-k): the excesses over any threshold have the shape k."""
    u = torch.rand(100_000, generator=seeded(), dtype=torch.float64)
    assert tail_shape(-shape * u.log() + 50) == pytest.approx(shape, abs=0.08)


def test_the_shape_is_drawn_toward_a_half_as_by_ten_excesses(monkeypatch):
    x = torch.rand(40, generator=seeded(), dtype=torch.float64)
    drawn = pareto_shape(x)
    monkeypatch.setattr("adjoint.pareto.PRIOR_SIZE", 0)
    assert drawn == pytest.approx((40 * pareto_shape(x) + 10 * 0.5) / 50)


def test_weights_that_are_equal_have_no_tail():
    assert tail_shape(torch.zeros(1000)) == -math.inf


def test_rounding_is_no_tail():
    generator = torch.Generator().manual_seed(0)
    heavy = torch.randn(4000, generator=generator).abs().pow(8)
    rounded = 0.745 + 1e-4 * heavy / heavy.max()
    assert tail_shape(rounded) == -math.inf
    assert tail_shape(1e4 * (rounded.double() - 0.745)) > 0.2
    assert tail_shape(torch.arange(20.0)) == -math.inf  # too few


def test_a_heavy_tail_is_not_trusted():
    u = torch.rand(N, generator=seeded(), dtype=torch.float64)
    for shape, trusted in ((0.3, True), (1.0, False)):
        found = judgement_of(certificate(-shape * u.log()), base(0 * u))
        assert ("have a tail of shape" not in texts(found)) == trusted
        assert trusted or found.level == DO_NOT_TRUST


# --- spread, and rare heavy weights ---------------------------------------------------------------


@pytest.mark.parametrize(("std", "level"), [(0.0, GOOD), (0.3, GOOD), (0.8, USE_WEIGHTS)])
def test_gaussian_log_weights_are_judged_by_their_total_variation(std, level):
    """Between N(0, s²) and its tilt by e^x it is 2 Φ(s/2) - 1."""
    log_w = std * noise()
    made = certificate(log_w)
    found = judgement_of(made, agreeing(made))
    exact = math.erf(std / 2 / math.sqrt(2))
    assert found.total_variation == pytest.approx(exact, abs=0.02)
    assert found.level == level
    assert "heavy" not in texts(found)


@pytest.mark.parametrize(
    ("model", "tilt", "level"),
    [(0.45, 0.5, GOOD), (0.05, 0.5, USE_WEIGHTS), (0.005, 0.4, DO_NOT_TRUST)],
)
def test_a_mode_that_is_hardly_visited_is_told_by_the_effective_sample_size(model, tilt, level):
    log_w = torch.full((N,), math.log((1 - tilt) / (1 - model)), dtype=torch.float64)
    log_w[: round(model * N)] = math.log(tilt / model)
    made = certificate(log_w)
    found = judgement_of(made, agreeing(made))
    assert found.level == level
    heavy = [f.level for f in found.findings if "a few samples are heavy" in f.text]
    assert heavy == ([] if level == GOOD else [level])


def test_fewer_than_ten_effective_samples_say_nothing():
    found = judgement_of(certificate(8 * noise()), base(torch.zeros(N)))
    assert found.level == DO_NOT_TRUST
    assert "fewer than 10 effective samples" in texts(found)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_not_trusted(bad):
    log_w = 0.1 * noise()
    log_w[:3] = bad
    found = judgement_of(certificate(log_w), base(0.1 * noise(seed=1)))
    assert found.level == DO_NOT_TRUST
    assert texts(found).startswith("3 of 4096 log-weights are NaN or infinite")
    assert "nan" not in texts(found)


def test_a_weight_of_zero_is_no_fault():
    log_w = 0.1 * noise()
    log_w[:3] = -math.inf
    made = certificate(log_w, noise())
    assert judgement_of(made, agreeing(made)).level == GOOD


def test_groups_are_judged_within():
    """log Z differs from condition to condition by more than all else."""
    log_w = 0.2 * noise() + 3 * noise(64, 1).repeat_interleave(64)
    found = judgement_of(certificate(log_w, groups=64), base(noise()))
    assert found.total_variation == pytest.approx(math.erf(0.1 / math.sqrt(2)), abs=0.02)
    assert found.tail_shape == pytest.approx(tail_shape(0.2 * noise()), abs=0.03)
    assert "std(log w)" not in texts(found)


# --- the base's ODE and the tilted flow's ---------------------------------------------------------


@pytest.mark.parametrize(("gap", "apart"), [(0.05, False), (0.3, True)])
def test_two_estimates_of_log_z_that_differ(gap, apart):
    found = judgement_of(certificate(0.1 * noise() + gap), base(0.1 * noise(seed=1)))
    assert found.log_z_gap == pytest.approx(gap, abs=0.01)
    assert found.log_z_gap_stderr == pytest.approx(0.1 * math.sqrt(2 / N), rel=0.1)
    assert ("the base's ODE gives log Z" in texts(found)) == apart
    assert not apart or found.level == DO_NOT_TRUST


def modes(right, n=N):
    """Rewards ± 1 of two modes."""
    return torch.where(torch.arange(n) < round(right * n), 1.0, -1.0).double()


@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize(("right", "level"), [(0.87, GOOD), (0.7, USE_WEIGHTS)])
def test_ode_samples_of_the_tilted_flow_are_held_against_the_weights(right, level, groups):
    """The weights give the right mode .88; the chain without them .85."""
    order = torch.randperm(N, generator=seeded())
    rewards = modes(0.85)[order]
    log_w = torch.where(rewards > 0, math.log(0.88 / 0.85), math.log(0.12 / 0.15))
    ode = modes(right, 1024)[torch.randperm(1024, generator=seeded(1))]
    made = certificate(log_w, rewards, groups)
    found = judgement_of(made, agreeing(made), rewards_ode=ode)
    assert found.level == level
    assert ("`sample` does not draw from the tilt" in texts(found)) == (level == USE_WEIGHTS)


def test_a_mode_that_only_the_base_has_seen():
    """One sample in a thousand, with half the weight, at a reward that the certificate lacks."""
    rewards = torch.zeros(8192, dtype=torch.float64)
    rewards[:8] = math.log(1023)
    assert unvisited_share(base(rewards)[0], torch.zeros(9)) == pytest.approx(0.5, abs=1e-3)
    found = judgement_of(certificate(0.1 * noise(), torch.zeros(N)), base(rewards))
    assert "50% of the tilt, by ODE samples of the base" in texts(found)
    assert found.level == DO_NOT_TRUST
    few = judgement_of(certificate(0.1 * noise(16), torch.zeros(16)), base(rewards))
    assert "50%" not in texts(few)  # sixteen samples could miss it


def test_a_mode_of_which_the_chain_has_too_little():
    log_w = 0.1 * noise()
    for right, level in ((0.48, GOOD), (0.3, DO_NOT_TRUST)):
        rewards = modes(right)[torch.randperm(N, generator=seeded())]
        made = certificate(log_w, rewards)
        wide = BaseSamples(modes(0.5), torch.zeros(N))
        found = judgement_of(made, [*agreeing(made), wide])
        assert found.level == level
        assert ("chain and ODE of the base differ" in texts(found)) == (level != GOOD)


def test_the_error_of_a_weighted_mean_is_how_it_scatters():
    means, errors = [], []
    for seed in range(200):
        x = noise(400, seed)
        mean, error, deviation = weighted_mean(x.reshape(4, 100), 0.5 * x.reshape(4, 100))
        means.append(mean)
        errors.append(error)
    assert sum(errors) / 200 == pytest.approx(float(torch.tensor(means).std()), rel=0.15)
    assert deviation == pytest.approx(1.0, abs=0.1)  # N(1/2, 1)
    assert weighted_mean(x[None, :9], 0 * x[None, :9])[1] == math.inf


@pytest.mark.slow
@pytest.mark.parametrize("dim", [1, 2, 64])
def test_wide_noise_has_the_ratio_of_the_densities_and_sees_the_tail(dim):
    x0 = torch.randn(100_000, dim, generator=seeded(), dtype=torch.float64)
    wide, log_ratio = wide_noise(x0)
    scale = float(wide[0, 0] / x0[0, 0])
    assert scale == pytest.approx(math.sqrt(1 + math.sqrt(2 / dim)))
    normal, wider = torch.distributions.Normal(0, 1), torch.distributions.Normal(0, scale)
    expected = (normal.log_prob(wide) - wider.log_prob(wide)).sum(1)
    torch.testing.assert_close(log_ratio, expected, rtol=0, atol=1e-4)
    assert float(log_ratio.exp().mean()) == pytest.approx(1, abs=0.02)
    beyond = wide[:, 0] > 3.72
    assert float((log_ratio.exp() * beyond).mean()) == pytest.approx(1e-4, rel=0.35)
    assert beyond.sum() > 2 * 1e-4 * len(x0)


# --- end to end -----------------------------------------------------------------------------------


def two_modes(right):
    return GaussianMixture.isotropic(
        torch.tensor([[-1.0], [1.0]]), 0.1, torch.tensor([1 - right, right])
    )


def certified(base, reward, field, *, seed=0, **options):
    """A tilt whose training ended at ``field``, and the warnings of its certification."""
    arguments = check_arguments(
        base,
        reward,
        shape=(base.dim,),
        config=TiltConfig(seed=seed, steps=20, kernel="moment_matched", **options),
        model=None,
        cond_sampler=None,
        callbacks=(),
        checkpoint=None,
        resume=False,
        device=None,
        dtype=torch.float32,
    )
    preparation = prepare_tilt(arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return certify_tilt(arguments, preparation, field), [str(w.message) for w in caught]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_narrow_modes_that_the_flow_draws_with_wrong_weights_are_warned_of(seed):
    """The right mode has .881 under the tilt, and .70 by the tilted flow's ODE."""
    found, caught = certified(two_modes(0.5), lambda x, cond: x[:, 0], two_modes(0.70), seed=seed)
    assert found.judgement.level != GOOD
    assert "`sample` does not draw from the tilt" in str(found)
    assert caught == [str(found.judgement)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("visited", [True, False])
@pytest.mark.parametrize("rare", [1e-3, 1e-4])
def test_a_rare_mode_that_the_reward_lifts_to_a_half_is_warned_of(rare, visited, seed):
    """The model has little of it or nothing; and of 8192 ODE samples of the base some or none."""
    slope = 0.5 * math.log(1 / rare - 1)
    model = two_modes(rare) if visited else GaussianMixture.isotropic(torch.tensor([[-1.0]]), 0.1)
    found, caught = certified(two_modes(rare), lambda x, cond: slope * x[:, 0], model, seed=seed)
    assert found.judgement.level == DO_NOT_TRUST
    assert len(caught) == 1


EASY = {name: (p.base, p.reward, p.exact()[0]) for name, p in PROBLEMS.items() if name != "C"}
EASY["gaussian"] = (gaussian(), linear, gaussian(M + LAMBDA * S2))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("problem", EASY)
def test_the_exact_tilt_of_an_easy_problem_is_good(problem, seed):
    base, reward, exact = (
        copy.deepcopy(part).float() if isinstance(part, torch.nn.Module) else part
        for part in EASY[problem]
    )
    found, caught = certified(base, reward, exact, seed=seed)
    assert found.judgement.level == GOOD, str(found)
    assert caught == []


@pytest.mark.slow
def test_the_table_says_whose_log_z_is_whose_and_how_far_apart():
    found = run(with_options(certificate_samples=512), model=Shift())
    text = str(found)
    chain, flow = found.certificate, found.log_z_ode
    assert f"{chain.log_z:.4f}" in next(x for x in text.splitlines() if "log_z (chain)" in x)
    line = next(x for x in text.splitlines() if "log_z (flow, by ODE)" in x)
    assert f"{flow:.4f}" in line
    assert f"± {found.log_z_ode_stderr:.4f}" in line
    gap = chain.log_z - flow
    errors = gap / math.hypot(chain.log_z_stderr, found.log_z_ode_stderr)
    line = next(x for x in text.splitlines() if "chain - flow" in x)
    assert f"{gap:.4f}" in line
    assert f"{errors:.1f} joint standard errors" in line
    assert text.splitlines()[-1] == "judgement: good"
