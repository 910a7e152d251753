"""The certificate against exact tilts."""

import math

import pytest
import torch
from helpers.certificates import certificate, kernel_for
from helpers.tilt_problems import LAMBDA, PROBLEMS, S2, M, gaussian, linear

from adjoint.certificate import Certificate, certify
from adjoint.chain.kernels import KERNELS


def test_log_weights_are_constant_at_the_optimum_of_a_linear_reward():
    base, tilted = gaussian(), gaussian(M + LAMBDA * S2)
    right = certificate(tilted, base, linear, "moment_matched", 10)
    wrong = certificate(base, base, linear, "moment_matched", 10)
    assert right.log_weight_std < 0.01
    assert right.ess > 0.999
    assert wrong.log_weight_std > 0.6


@pytest.mark.slow
def test_log_weights_become_constant_as_the_grid_is_refined():
    problem = PROBLEMS["C"]
    tilted, _ = problem.exact()
    stds = [
        certificate(tilted, problem.base, problem.reward, "moment_matched", steps).log_weight_std
        for steps in (10, 40, 160)
    ]
    assert stds[0] > 1.5 * stds[1] > 2.25 * stds[2]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.slow
def test_log_z_agrees_with_the_exact_one(problem):
    """Within two standard errors at the optimum, three from the base (ten comparisons)."""
    problem = PROBLEMS[problem]
    tilted, log_z = problem.exact()
    for field, errors in ((tilted, 2.0), (problem.base, 3.0)):
        found = certificate(
            field, problem.base, problem.reward, "covariance_matched", 100, n=20_000, seed=0
        )
        assert abs(found.log_z - float(log_z)) < errors * found.log_z_stderr


@pytest.mark.parametrize("problem", ["A", "C", "square"])
@pytest.mark.slow
def test_weighted_means_are_right_from_the_untilted_model(problem):
    problem = PROBLEMS[problem]
    tilted, _ = problem.exact()
    found = certificate(
        problem.base, problem.base, problem.reward, "covariance_matched", 100, n=20_000
    )
    mean, error = found.weighted_mean(found.samples)
    exact = tilted.mean()
    assert bool(((mean - exact).abs() < 3 * error).all())
    assert bool(((found.samples.mean(0) - exact).abs() > 5 * error).any())  # and it matters
    reward, error = found.weighted_mean(found.rewards)
    draws = problem.reward(tilted.sample(200_000, generator=torch.Generator().manual_seed(0)))
    assert abs(float(reward) - float(draws.mean())) < 3 * float(error) + 0.01


@pytest.mark.parametrize("slope", [20.0, 60.0])
def test_error_bars_are_infinite_where_a_sample_or_two_carry_all_the_weight(slope):
    """Their spread would be small, and the mean is far from the exact one."""
    base = gaussian()
    found = certificate(base, base, lambda x, cond: slope * x[:, 0], "moment_matched", 20)
    assert found.ess * 4096 < 5
    mean, error = found.weighted_mean(found.samples)
    spread = (found.weights[:, None] * (found.samples - mean)).square().sum(0).sqrt()
    assert float((M + slope * S2 - mean) / spread) > 50
    assert torch.equal(error, torch.full_like(mean, math.inf))
    assert found.weighted_mean(found.rewards)[1] == math.inf
    assert found.summary()["log_z_stderr"] == math.inf


@pytest.mark.parametrize(("n", "given"), [(1, False), (9, False), (11, True)])
def test_error_bars_of_few_samples(n, given):
    """Of as few as are not enough there are none, even where all have the same weight."""
    x = torch.linspace(-1, 1, n, dtype=torch.float64)
    few = Certificate(x[:, None], x, torch.zeros_like(x), torch.zeros_like(x))
    assert math.isfinite(few.log_z_stderr) == given
    assert math.isfinite(few.weighted_mean(x)[1]) == given
    if given:
        expected = float(x.std(correction=0)) / math.sqrt(n)
        assert float(few.weighted_mean(x)[1]) == pytest.approx(expected)


@pytest.mark.slow
def test_resampled_samples_follow_the_exact_tilt():
    """From the untilted model: each sample n w times up to one, and the law by its quantiles."""
    problem = PROBLEMS["C"]
    tilted, _ = problem.exact()
    found = certificate(
        problem.base, problem.base, problem.reward, "covariance_matched", 100, n=20_000
    )
    n = 5000
    drawn = found.resample(n, generator=torch.Generator().manual_seed(1))
    assert drawn.shape == (n, 1)
    place = {float(x): i for i, x in enumerate(found.samples)}
    counts = torch.zeros(len(found.samples), dtype=torch.float64)
    for x in drawn:
        counts[place[float(x)]] += 1
    assert float((counts - n * found.weights).abs().max()) < 1
    assert not torch.equal(drawn, drawn.sort(0).values)
    exact = tilted.sample(200_000, generator=torch.Generator().manual_seed(0)).flatten()
    for q in (0.1, 0.3, 0.5, 0.7, 0.9):
        below = (drawn <= exact.quantile(q)).double().mean()
        error = math.sqrt(q * (1 - q) * (1 / n + 1 / (found.ess * 20_000)))
        assert abs(float(below) - q) < 4 * error
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        found.resample(0)


def test_groups_are_judged_within():
    """Against the certificate of each: two tilts whose log Z differ by six."""
    runs = [certificate(gaussian(m), gaussian(m), linear, "moment_matched", 10) for m in (-3, 3)]
    names = ("samples", "rewards", "log_weights", "path_kls")
    both = Certificate(*(torch.cat([getattr(run, n) for run in runs]) for n in names), groups=2)
    assert both.log_z == pytest.approx((runs[0].log_z + runs[1].log_z) / 2)
    assert abs(both.log_z - (LAMBDA**2 * S2 / 2)) < 3 * both.log_z_stderr + 0.005
    variance = (runs[0].log_weight_std ** 2 + runs[1].log_weight_std ** 2) / 2
    assert both.log_weight_std == pytest.approx(variance**0.5)
    assert float(both.log_weights.std()) > 4 * both.log_weight_std
    halves = torch.cat([run.weights for run in runs]) / 2
    torch.testing.assert_close(both.weights, halves)
    assert both.ess == pytest.approx(1 / float(len(halves) * halves.square().sum()))
    errors = [run.log_z_stderr for run in runs]
    assert both.log_z_stderr == pytest.approx(math.hypot(*errors) / 2)
    mean, error = both.weighted_mean(both.samples)
    assert abs(float(mean) - LAMBDA * S2) < 3 * float(error)
    assert abs(float(both.resample(4000).mean()) - LAMBDA * S2) < 0.2


def test_the_mean_over_conditions_has_the_error_of_as_many_conditions():
    """x ~ N(c, 0.1²) and c ~ N(0, 1): known by 64 conditions, however many x each of them has."""
    found = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        c = torch.randn(64, generator=generator).repeat_interleave(64)
        x = c + 0.1 * torch.randn(4096, generator=generator)
        log_w = 0.5 * torch.randn(4096, generator=generator)
        found.append(Certificate(x[:, None], x, log_w, x, groups=64).weighted_mean(x))
    means, errors = (torch.tensor(values) for values in zip(*found, strict=True))
    assert float(means.std()) == pytest.approx(1 / 8, rel=0.3)
    assert float(errors.mean()) == pytest.approx(1 / 8, rel=0.1)


def test_one_condition_of_few_effective_samples_does_not_hide_the_error_of_the_others():
    generator = torch.Generator().manual_seed(0)
    log_w = 1.0 * torch.randn(256 * 64, generator=generator)
    found = Certificate(log_w[:, None], log_w, log_w, log_w, groups=256)
    assert min(1 / float(g.softmax(0).square().sum()) for g in found.grouped) < 10
    assert 0.3 < 16 * 8 * found.log_z_stderr < 2.0


def test_groups_that_do_not_divide_the_starts_are_refused():
    base = gaussian()
    kernel = kernel_for(base, "moment_matched", 4)
    with pytest.raises(ValueError, match="groups must divide the 10 starts, got 3"):
        certify(base, base, linear, kernel, torch.zeros(10, 1), groups=3)


def test_what_is_no_value_of_each_sample_has_no_mean():
    x = torch.zeros(20, 2)
    found = Certificate(x, x[:, 0], x[:, 0], x[:, 0])
    with pytest.raises(ValueError, match=r"leading size 20 of the samples, got shape \(3,\)"):
        found.weighted_mean(torch.zeros(3))
    with pytest.raises(TypeError, match="values must be a tensor, got ndarray"):
        found.weighted_mean(x.numpy())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_samples_are_not_drawn_by_weights_that_are_none(bad):
    x = torch.arange(6.0)
    log_w = torch.tensor([0.0, 0.0, bad, 0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="log-weights are NaN or infinite"):
        Certificate(x[:, None], x, log_w, x).resample(5)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.slow
def test_mean_weight_is_the_partition_function_of_the_chain_for_any_model(name):
    """E[w] does not depend on the model: base and tilted velocity give one log Z on one chain."""
    problem = PROBLEMS["C"]
    tilted, _ = problem.exact()
    a = certificate(problem.base, problem.base, problem.reward, name, 10, n=40_000, seed=1)
    b = certificate(tilted, problem.base, problem.reward, name, 10, n=40_000, seed=2)
    spread = math.hypot(a.log_z_stderr, b.log_z_stderr)
    assert abs(a.log_z - b.log_z) < 3.5 * spread


def test_path_kl_is_that_of_two_gaussian_chains():
    """KL of two chains with a constant drift difference: Σ‖d‖²/(2 std²), by hand."""
    base = gaussian()
    kernel = kernel_for(base, "euler_consistent", 10)

    def shifted(x, t, cond=None):
        return base(x, t) + 0.3

    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(64, 1, generator=generator, dtype=torch.float64)
    found = certify(shifted, base, linear, kernel, x0, generator=generator)
    d = 0.3 * kernel.mean_v[:-1]
    by_hand = (d**2 / (2 * kernel.std[:-1] ** 2)).sum()
    assert found.path_kl == pytest.approx(float(by_hand), rel=1e-12)


def test_batches_and_conditions_travel_together():
    base = gaussian()
    kernel = kernel_for(base, "ancestral", 4)
    x0 = torch.randn(10, 1, dtype=torch.float64)
    shift = torch.arange(10.0, dtype=torch.float64)[:, None]

    def reward(x, cond):
        return cond["shift"][:, 0] + 0 * x[:, 0]

    found = certify(base, base, reward, kernel, x0, cond={"shift": shift}, batch_size=3)
    torch.testing.assert_close(found.rewards, shift[:, 0])
    assert found.samples.shape == (10, 1)
