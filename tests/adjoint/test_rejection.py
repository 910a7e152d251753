"""Exact samples by rejection: against closed forms, quadrature of the ceiling, and enumeration."""

import dataclasses
import math
import re
import sys
import warnings

import pytest
import torch
from helpers.certificates import certificate, kernel_for
from helpers.linear_tilt import BASE, SLOPES, Slope
from helpers.tilt_problems import LAMBDA, PROBLEMS, S2, M, gaussian, linear
from hypothesis import given
from hypothesis import strategies as st

from adjoint.certificate import log_mean_exp
from adjoint.config import TiltConfig
from adjoint.exact_samples import flow_proposal, sample_exact
from adjoint.rejection import RELIABLE, acceptance, log_ceiling, sample_by_rejection
from adjoint.rewards.reward import as_reward
from adjoint.tilt import tilt
from flows.mixture import GaussianMixture

LIKE = torch.zeros(1, dtype=torch.float64)


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


# --- the ceiling ---------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-8, 8), min_size=1, max_size=30),
    st.floats(0, 0.99),
    st.floats(-1000, 1000),
)
def test_the_mass_above_the_ceiling_is_the_cut(heights, cut, shift):
    log_w = torch.tensor(heights, dtype=torch.float64) + shift
    ratio = (log_w - log_ceiling(log_w, cut)).exp()
    assert float((ratio - 1).clamp_min(0).sum() / ratio.sum()) == pytest.approx(cut, abs=1e-9)
    kept = ratio.clamp_max(1).mean()
    assert acceptance(log_w, cut) == pytest.approx(float(kept), rel=1e-12)


def test_the_ceiling_of_no_cut_is_the_largest_weight():
    log_w = torch.tensor([0.3, 2.5, -1.0])
    assert log_ceiling(log_w, 0.0) == pytest.approx(2.5)
    equal = torch.full((5,), 7.0)
    assert acceptance(equal, 0.0) == pytest.approx(1.0)


@pytest.mark.parametrize("cut", [-0.1, 1.0, math.nan])
def test_a_cut_out_of_range_is_refused(cut):
    with pytest.raises(ValueError, match=r"cut must lie in \[0, 1\), got"):
        log_ceiling(torch.zeros(3), cut)


# --- the samples ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_samples_of_an_untilted_model_follow_the_exact_tilt():
    """By their quantiles; from proposals whose law is far off; no sample twice."""
    problem = PROBLEMS["C"]
    tilted, _ = problem.exact()
    pilot = certificate(
        problem.base, problem.base, problem.reward, "covariance_matched", 100, n=20_000
    )
    kernel, n = kernel_for(problem.base, "covariance_matched", 100), 5000
    drawn = sample_exact(
        problem.base,
        problem.base,
        problem.reward,
        kernel,
        n,
        like=LIKE,
        seen=pilot.log_weights,
        generator=seeded(),
    )
    assert drawn.shape == (n, 1)
    assert len(drawn.unique()) == n
    exact = tilted.sample(200_000, generator=seeded(0)).flatten()
    untilted = []
    for q in (0.1, 0.3, 0.5, 0.7, 0.9):
        error = math.sqrt(q * (1 - q) / n)
        below = (drawn <= exact.quantile(q)).double().mean()
        assert abs(float(below) - q) < 3.5 * error + 0.001
        untilted.append(abs(float((pilot.samples <= exact.quantile(q)).double().mean()) - q))
    assert max(untilted) > 0.1


@pytest.mark.slow
def test_a_large_cut_samples_the_law_that_was_promised():
    """p_L ∝ p min(w, L), and no farther from the exact tilt than the cut."""
    base, n, cut = gaussian(), 20_000, 0.3
    weights = certificate(base, base, linear, "moment_matched", 10, n=100_000)
    drawn = sample_exact(
        base,
        base,
        linear,
        kernel_for(base, "moment_matched", 10),
        n,
        like=LIKE,
        seen=weights.log_weights,
        cut=cut,
        generator=seeded(),
    )
    capped = (weights.log_weights - log_ceiling(weights.log_weights, cut)).exp().clamp_max(1)
    for threshold in (0.5, 1.0, 1.5):
        below = (weights.samples[:, 0] <= threshold).double()
        promised, exact = (capped @ below) / capped.sum(), weights.weights @ below
        found = (drawn <= threshold).double().mean()
        error = math.sqrt(0.25 * (1 / n + 1 / 100_000))
        assert abs(float(found - promised)) < 3.5 * error
        assert abs(float(promised - exact)) <= cut
    assert abs(float(promised - exact)) > 0.05


def test_all_trajectories_of_the_optimum_are_accepted():
    base, optimum = gaussian(), gaussian(M + LAMBDA * S2)
    found = certificate(optimum, base, linear, "moment_matched", 10)
    assert acceptance(found.log_weights, 0.001) > 0.98
    assert acceptance(certificate(base, base, linear, "moment_matched", 10).log_weights, 0.01) < 0.4


@pytest.fixture(scope="module")
def short():
    """A tilt that was hardly trained."""
    config = TiltConfig(iterations=5, steps=10, batch_size=64, certificate_samples=8192, seed=3)
    return tilt(BASE, Slope(), shape=(2,), config=config)


@pytest.mark.slow
def test_a_tilt_draws_exact_samples_however_short_its_training(short):
    exact, n = M + S2 * SLOPES, 20_000
    x = short.sample_exact(n, generator=seeded()).double()
    assert x.shape == (n, 2)
    error = (S2 / n) ** 0.5
    assert float((x.mean(0) - exact).abs().max()) < 4 * error + 0.001
    assert float((short.certificate.samples.double().mean(0) - exact).abs().max()) > 20 * error
    torch.testing.assert_close(x.var(0), torch.full_like(exact, S2), rtol=0.04, atol=0)
    again = short.sample_exact(50, generator=seeded())
    assert torch.equal(again, short.sample_exact(50, generator=seeded()))


@pytest.mark.slow
def test_exact_samples_do_not_depend_on_the_parts(short):
    whole = short.sample_exact(300, generator=seeded())
    config = dataclasses.replace(short.config, micro_batch=100, reward_batch=64)
    parts = dataclasses.replace(short, config=config).sample_exact(300, generator=seeded())
    torch.testing.assert_close(parts, whole)


@pytest.mark.slow
def test_without_a_certificate_the_new_trajectories_are_enough(short):
    bare = dataclasses.replace(short, certificate=None)
    x = bare.sample_exact(5000, generator=seeded()).double()
    assert float((x.mean(0) - (M + S2 * SLOPES)).abs().max()) < 4 * (S2 / 5000) ** 0.5 + 0.001


# --- conditions ----------------------------------------------------------------------------------


def shifted(x, t, cond=None):
    """The flow of N(c, S2): that of N(M, S2), moved by t (c - M)."""
    offset = cond["c"] - M
    return gaussian()(x - torch.as_tensor(t) * offset, t) + offset


@pytest.mark.slow
def test_under_one_condition_the_samples_are_of_its_tilt():
    """N(c, S2) tilted by λ x is N(c + λ S2, S2), at one condition."""
    kernel, n = kernel_for(gaussian(), "moment_matched", 10), 4000
    for c in (-1.0, 2.0):
        cond = {"c": torch.tensor([[c]], dtype=torch.float64)}
        x = sample_exact(
            shifted, shifted, linear, kernel, n, like=LIKE, cond=cond, generator=seeded()
        )
        assert float((x.mean() - (c + LAMBDA * S2)).abs()) < 4 * (S2 / n) ** 0.5 + 0.002
    x = sample_exact(
        gaussian(2.3, 0.7),
        shifted,
        linear,
        kernel,
        300,
        like=LIKE,
        distribution="flow",
        cut=0.01,
        cond={"c": torch.full((1, 1), 2.0, dtype=torch.float64)},
        generator=seeded(),
    )
    assert float((x.mean() - (2 + LAMBDA * S2)).abs()) < 4 * (S2 / 300) ** 0.5 + 0.01
    cond = {"c": torch.zeros(3, 1, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"cond must be one condition, .* got .*\{'c': 3\}"):
        sample_exact(shifted, shifted, linear, kernel, 10, like=LIKE, cond=cond)


@pytest.mark.slow
def test_the_certificate_of_a_tilt_says_nothing_of_one_condition(short):
    """Its weights are of all conditions: here of one far away, with a log Z lower by six."""
    kernel = kernel_for(gaussian(), "moment_matched", 10)
    far = certificate(gaussian(-3.0), gaussian(-3.0), linear, "moment_matched", 10)
    found = dataclasses.replace(
        short,
        field=shifted,
        base=shifted,
        reward=as_reward(linear),
        kernel=kernel,
        certificate=far,
        shape=(1,),
        dtype=torch.float64,
    )
    n, cond = 4000, {"c": torch.full((1, 1), 3.0, dtype=torch.float64)}
    x = found.sample_exact(n, cond=cond, generator=seeded())
    assert float((x.mean() - (3 + LAMBDA * S2)).abs()) < 4 * (S2 / n) ** 0.5 + 0.002


# --- what is refused, what is warned of ----------------------------------------------------------


def draw(n=10, reward=linear, **options):
    base = gaussian()
    kernel = kernel_for(base, "moment_matched", 4)
    options = {"generator": seeded(), **options}
    return sample_exact(base, base, reward, kernel, n, like=LIKE, **options)


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        draw(0)


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"n": 2.5}, TypeError, "n must be an integer, got 2.5"),
        ({"cut": 1.0}, ValueError, r"cut must lie in \[0, 1\), got 1.0"),
        ({"cond": torch.zeros(1)}, TypeError, "cond must map names to tensors, got Tensor"),
        ({"generator": 0}, TypeError, "generator must be a torch.Generator, got 0"),
    ],
)
def test_wrong_arguments_are_named(wrong, error, match):
    with pytest.raises(error, match=match):
        draw(**wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "error", "match"),
    [(-1, ValueError, "n must be at least 1, got -1"), ("3", TypeError, "n must be an integer")],
)
def test_samples_by_the_ode_ask_for_the_same(short, n, error, match):
    with pytest.raises(error, match=match):
        short.sample(n)


def test_weights_that_are_too_uneven_are_refused():
    with pytest.raises(
        ValueError, match=r"too uneven: 4\d\d\d\d trajectories count as \d+\.\d, so"
    ):
        draw(reward=lambda x, cond: 40 * x[:, 0])


def test_a_step_that_few_trajectories_reach_is_no_tilt_to_sample():
    """Nearly all its mass is where one of six thousand comes: no ceiling would be safe."""
    base = gaussian(0.0, 1.0)
    kernel = kernel_for(base, "ancestral", 20)

    def step(x, cond):
        return 14 * torch.sigmoid(50 * (x[:, 0] - 3.6))

    with pytest.raises(ValueError, match="the tilt's weights are too uneven"):
        sample_exact(base, base, step, kernel, 10_000, like=LIKE, generator=seeded(6))


def test_known_weights_that_are_nan_are_named():
    with pytest.raises(ValueError, match="log-weights are NaN or infinite"):
        draw(seen=torch.tensor([0.0, math.nan]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rewards_that_are_no_numbers_are_named(bad):
    with pytest.raises(ValueError, match="log-weights are NaN or infinite: look at the reward"):
        draw(reward=lambda x, cond: x[:, 0].abs() * bad)


@pytest.mark.parametrize(("std", "warned"), [(0.5, False), (2.0, True)])
def test_weights_that_do_not_show_their_tail_are_warned_of(std, warned):
    """Lognormal ones; the few trajectories of five samples could not tell."""
    seen = std * torch.randn(4096, generator=seeded(), dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draw(5, reward=lambda x, cond: 0 * x[:, 0], seen=seen)
    assert bool(caught) == warned
    assert all("of the tilt's mass lies above the ceiling" in str(w.message) for w in caught)


# --- the ceiling learns ---------------------------------------------------------------------------


@pytest.mark.slow
def test_the_ceiling_rises_with_what_is_seen():
    """Weights that say nothing of the tilt, all far too low, leave its samples exact."""
    base, n = gaussian(), 4000
    low = torch.full((200,), -6.0, dtype=torch.float64)
    kernel = kernel_for(base, "moment_matched", 10)
    x = sample_exact(
        base, base, linear, kernel, n, like=LIKE, seen=low, batch_size=500, generator=seeded()
    )
    assert len(x) == n
    error = (S2 / n) ** 0.5
    assert float((x.mean() - (M + LAMBDA * S2)).abs()) < 4 * error + 0.002
    assert float(x.var()) == pytest.approx(S2, rel=0.1)


@pytest.mark.slow
def test_few_samples_need_no_more_trajectories_than_the_ceiling_does(short):
    counted = []

    def counting(x, cond):
        counted.append(len(x))
        return short.reward(x, cond)

    drawn = dataclasses.replace(short, certificate=None, reward=as_reward(counting))
    sums = []
    for cut in (0.01, 0.001):
        assert drawn.sample_exact(3, cut=cut, generator=seeded()).shape == (3, 2)
        sums.append(sum(counted) * short.certificate.ess)
        counted.clear()
    assert 0.6 * RELIABLE < sums[0] < 3 * RELIABLE
    assert 0.6 / 0.001 < sums[1] < 2 / 0.001
    dataclasses.replace(drawn, certificate=short.certificate).sample_exact(3, generator=seeded())
    assert sum(counted) == RELIABLE


def test_a_ceiling_that_rises_thins_the_samples_accepted_before():
    """A first batch of weight 1, all accepted; then one proposal in ten has weight 10."""
    batches = []

    def propose(n):
        weights = torch.ones(n, dtype=torch.float64)
        if batches:
            weights[torch.randperm(n, generator=seeded())[: n // 10]] = 10.0
        batches.append(n)
        return torch.full((n, 1), float(len(batches)), dtype=torch.float64), weights.log()

    x = sample_by_rejection(
        propose,
        4000,
        like=LIKE,
        distribution="the tilt",
        seen=torch.zeros(1000, dtype=torch.float64),
        cut=0.0,
        batch_size=2000,
        generator=seeded(),
    )
    assert batches[0] == 2000
    assert float((x == 1).sum()) == pytest.approx(200, abs=4 * math.sqrt(2000 * 0.1 * 0.9))


# --- how many trajectories, and how long ----------------------------------------------------------


def uneven(std, n=4096):
    """Lognormal weights of which few count."""
    return std * torch.randn(n, generator=seeded(), dtype=torch.float64)


def test_too_many_trajectories_are_refused_before_the_first():
    asked = []

    def propose(n):
        asked.append(n)
        return torch.zeros(n, 1, dtype=torch.float64), torch.randn(n, generator=generator)

    seen, generator = uneven(1.0), seeded(2)
    rate = acceptance(seen, 0.001)
    options = {"like": LIKE, "distribution": "the tilt", "seen": seen, "generator": seeded()}
    expected = f"{1_000_000 / rate:,.0f}"
    with pytest.raises(ValueError, match=f"1,000,000 samples of the tilt .* about {expected} traj"):
        sample_by_rejection(propose, 1_000_000, **options)
    with pytest.raises(ValueError, match=f"accept {rate:.2%} of them, and max_trajectories is 9:"):
        sample_by_rejection(propose, 1000, max_trajectories=9, **options)
    assert asked == []
    assert len(sample_by_rejection(propose, 1000, max_trajectories=200_000, **options)) == 1000
    assert 0.3 < sum(asked) * rate / 1000 < 3
    with pytest.raises(ValueError, match="max_trajectories must be at least 1, got 0"):
        sample_by_rejection(propose, 1000, max_trajectories=0, **options)


@pytest.mark.slow
def test_a_tilt_knows_from_its_certificate_that_too_many_are_asked_for(short):
    def never(x, cond):
        raise AssertionError("a trajectory was made")

    asked = dataclasses.replace(short, reward=as_reward(never))
    with pytest.raises(ValueError, match=r"20,000,000 samples of the tilt of the base's chain"):
        asked.sample_exact(20_000_000)
    with pytest.raises(ValueError, match="and max_trajectories is 50:"):
        asked.sample_exact(1000, max_trajectories=50)


def test_too_many_trajectories_are_refused_once_the_weights_tell():
    with pytest.raises(
        ValueError, match=r"50,000 samples of the tilt of the base's chain would take about [\d,]+"
    ):
        draw(50_000, reward=lambda x, cond: 3 * x[:, 0], max_trajectories=20_000)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_with_the_expected_time_is_shown_on_a_terminal(monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    draw()
    err = capsys.readouterr().err
    assert (
        bool(re.search(r"samples of the tilt of the base's chain: .*10/10 \[.*<", err)) == terminal
    )
    draw(progress=not terminal)
    assert bool(capsys.readouterr().err) != terminal


# --- which distribution ---------------------------------------------------------------------------


def two_modes(right, dtype=torch.float64):
    means = torch.tensor([[-1.0], [1.0]], dtype=dtype)
    return GaussianMixture.isotropic(means, 0.1, torch.tensor([1 - right, right], dtype=dtype))


@pytest.mark.slow
def test_the_tilt_of_the_flow_is_drawn_where_that_of_the_chain_is_another():
    """A mode of one in a hundred, lifted to a half; ten steps of the chain give it less."""
    base, slope = two_modes(0.01), 0.5 * math.log(99)
    exact, log_z = base.tilt(torch.zeros(1, 1), torch.tensor([slope]))
    model, n = two_modes(0.3), 2000

    def reward(x, cond):
        return slope * x[:, 0]

    propose = flow_proposal(model, base, reward, LIKE, generator=seeded())
    _, log_w = propose(4000)
    found, error, _ = log_mean_exp(log_w)
    assert error < 0.02
    assert abs(found - float(log_z)) < 3 * error + 0.002
    right = {}
    for distribution, proposed in (("flow", model), ("chain", base)):
        kernel = kernel_for(base, "moment_matched", 10)
        x = sample_exact(
            proposed,
            base,
            reward,
            kernel,
            n,
            like=LIKE,
            distribution=distribution,
            generator=seeded(),
        )
        right[distribution] = float((x > 0).double().mean())
        assert len(x.unique()) == n
    assert abs(right["flow"] - float(exact.weights[1])) < 3.5 * math.sqrt(0.25 / n)
    assert right["flow"] - right["chain"] > 0.05


@pytest.mark.slow
def test_a_tilt_draws_from_the_tilt_of_its_own_ode(short):
    exact, n = M + S2 * SLOPES, 300
    x = short.sample_exact(n, distribution="flow", cut=0.01, generator=seeded()).double()
    assert float((x.mean(0) - exact).abs().max()) < 4 * (S2 / n) ** 0.5 + 0.01
    torch.testing.assert_close(x.var(0), torch.full_like(exact, S2), rtol=0.25, atol=0)


def test_an_unknown_distribution_and_likelihoods_in_many_dimensions_are_refused():
    with pytest.raises(ValueError, match="distribution must be 'chain' or 'flow', got 'ode'"):
        draw(distribution="ode")
    base = gaussian()
    with pytest.raises(ValueError, match="must be 'chain' above 256 dimensions, got 'flow' in 257"):
        sample_exact(base, base, linear, None, 5, like=torch.zeros(257), distribution="flow")
