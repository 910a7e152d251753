"""Quadrature against closed forms, resampling against quadrature, distances against POT."""

import math

import numpy as np
import ot
import pytest
import torch

from applications.toy2d.distances import directions, mode_frequencies
from applications.toy2d.exact_tilt import (
    GridTilt,
    grid_tilt,
    mode_tv,
    resample_tilt,
    sliced_wasserstein,
    w2_ratio,
)
from applications.toy2d.rewards import make_reward
from applications.toy2d.targets import TARGETS

N = 100_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tilt_of(target: str, reward: str, resolution: int = 200) -> GridTilt:
    law = TARGETS[target]
    return grid_tilt(law.log_density, make_reward(reward, law), law.extent, resolution)


@pytest.mark.parametrize("target", ["ring", "grid", "two_gaussians"])
@pytest.mark.parametrize("name", ["linear", "quadratic"])
def test_grid_is_the_closed_form_tilt_of_a_mixture(target, name):
    mixture, reward = TARGETS[target].mixture, make_reward(name, TARGETS[target])
    exact, log_z = mixture.tilt(*reward.quadratic_form)
    tilt = grid_tilt(TARGETS[target].log_density, reward, extent=5.0, resolution=300)
    assert tilt.mass == pytest.approx(1, abs=1e-7)
    assert tilt.log_z == pytest.approx(log_z.item(), abs=1e-6)
    density = exact.log_prob(tilt.points).exp().reshape_as(tilt.density)
    torch.testing.assert_close(tilt.density, density, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(tilt.mean(), exact.mean(), atol=1e-6, rtol=0)
    second = tilt.mean(torch.einsum("ni,nj->nij", tilt.points, tilt.points))
    moment = exact.covariance() + torch.outer(exact.mean(), exact.mean())
    torch.testing.assert_close(second, moment, atol=1e-5, rtol=0)
    A, b = reward.quadratic_form
    reward_tilted = -0.5 * (A * moment).sum() + b @ exact.mean()
    assert tilt.reward_tilted == pytest.approx(reward_tilted.item(), abs=1e-5)


def test_grid_is_exact_for_the_checkerboard():
    """E exp(bᵀx) over a cell of side a around m is exp(bᵀm) Π 2 sinh(b_i a/2)/(b_i a)."""
    law, b, a = TARGETS["checkerboard"], torch.tensor([0.8, 0.5]).double(), 1.5
    z = (law.modes.double() @ b).exp().mean() * (2 * (b * a / 2).sinh() / (b * a)).prod()
    tilt = tilt_of("checkerboard", "linear", 400)
    assert tilt.mass == pytest.approx(1, abs=1e-12)
    h = 0.02
    midpoint_error = h**2 * b.square().sum().item() / 24
    assert tilt.log_z == pytest.approx(z.log().item(), abs=2 * midpoint_error)


def test_grid_ignores_the_reward_where_the_base_has_no_mass():
    law = TARGETS["checkerboard"]

    def reward(x, cond):
        return torch.where(law.log_density(x) > -torch.inf, 1.5, torch.nan)

    tilt = grid_tilt(law.log_density, reward, law.extent, 160)
    assert tilt.log_z == pytest.approx(1.5)
    assert tilt.reward_tilted == pytest.approx(1.5)
    torch.testing.assert_close(tilt.density, tilt.base)


def test_grid_does_not_need_a_normalised_density():
    law, reward = TARGETS["ring"], make_reward("ring", TARGETS["ring"])
    plain = grid_tilt(law.log_density, reward, 4.0, 100)
    scaled = grid_tilt(lambda x: law.log_density(x) + 3, reward, 4.0, 100)
    assert scaled.log_z == pytest.approx(plain.log_z, abs=1e-12)
    assert scaled.mass == pytest.approx(plain.mass * math.exp(3))
    torch.testing.assert_close(scaled.density, plain.density)
    torch.testing.assert_close(scaled.base, plain.base)


def test_grid_identities():
    tilt = tilt_of("pinwheel", "peaks")
    area = tilt.cell**2
    assert tilt.base.sum() * area == pytest.approx(1)
    assert tilt.density.sum() * area == pytest.approx(1)
    inside = tilt.base > 0
    p, q = tilt.base[inside], tilt.density[inside]
    assert tilt.kl == pytest.approx((q * (q / p).log()).sum().item() * area)
    assert tilt.reward_base < tilt.log_z < tilt.reward_tilted
    r = make_reward("peaks", TARGETS["pinwheel"])(tilt.points)
    assert tilt.reward_tilted == pytest.approx(tilt.mean(r).item())


@pytest.mark.slow
def test_grid_samples_follow_the_tilt():
    law, tilt = TARGETS["ring"], tilt_of("ring", "classifier")
    x = tilt.sample(N, seeded())
    assert x.dtype == torch.float32
    assert torch.equal(x, tilt.sample(N, seeded()))
    error = (x.double().mean(0) - tilt.mean()) / (x.double().var(0) / N).sqrt()
    assert error.abs().max() < 4
    f = tilt.mode_frequencies(law.modes)
    assert f.sum().item() == pytest.approx(1)
    z = (mode_frequencies(x, law.modes) - f) / (f * (1 - f) / N).sqrt()
    assert z.abs().max() < 4.5
    centres = set(np.round(tilt.axis.numpy(), 4).tolist())
    assert sum(round(v, 4) in centres for v in x[:500, 0].tolist()) < 50  # spread within the cells


def test_grid_mode_frequencies_are_the_weights_of_separate_modes():
    reward = make_reward("linear", TARGETS["ring"])
    exact, _ = TARGETS["ring"].mixture.tilt(*reward.quadratic_form)
    f = tilt_of("ring", "linear").mode_frequencies(TARGETS["ring"].modes)
    torch.testing.assert_close(f, exact.weights, atol=1e-3, rtol=0)


PROBLEMS = [
    ("two_gaussians", "quadratic"),
    ("moons", "ring"),
    ("checkerboard", "linear"),
    ("circles", "half_plane"),
    ("spirals", "peaks"),
    ("pinwheel", "classifier"),
]


@pytest.mark.parametrize(("target", "name"), PROBLEMS)
@pytest.mark.slow
def test_resampling_agrees_with_the_grid(target, name):
    law, reward = TARGETS[target], make_reward(name, TARGETS[target])
    tilt = grid_tilt(law.log_density, reward, law.extent, 160)
    estimate = resample_tilt(law.sample(N, seeded(3)), reward)
    assert abs(estimate.log_z - tilt.log_z) < 4 * estimate.log_z_stderr
    assert estimate.log_z_stderr < 0.01
    mean, stderr = estimate.mean()
    assert ((mean - tilt.mean()).abs() < 4 * stderr).all()
    assert estimate.reward_base == pytest.approx(tilt.reward_base, abs=0.05)
    assert estimate.reward_tilted == pytest.approx(tilt.reward_tilted, abs=0.05)
    f = estimate.mode_frequencies(law.modes)
    torch.testing.assert_close(f, tilt.mode_frequencies(law.modes), atol=0.01, rtol=0)
    # E_p[e^r]² / E_p[e^2r], both by quadrature
    twice = grid_tilt(law.log_density, lambda x, cond: 2 * reward(x, cond), law.extent, 160)
    assert estimate.ess == pytest.approx(math.exp(2 * tilt.log_z - twice.log_z), rel=0.05)
    chosen = estimate.sample(N, seeded(4)).double()
    assert ((chosen.mean(0) - tilt.mean()).abs() < 6 * stderr).all()


def test_standard_errors_of_resampling_are_calibrated():
    law, reward = TARGETS["two_gaussians"], make_reward("linear", TARGETS["two_gaussians"])
    exact, log_z = law.mixture.tilt(*reward.quadratic_form)
    runs = [resample_tilt(law.sample(2000, seeded(seed)), reward) for seed in range(200)]
    z = torch.tensor([(run.log_z - log_z.item()) / run.log_z_stderr for run in runs])
    means = torch.stack([(run.mean()[0] - exact.mean()) / run.mean()[1] for run in runs])
    assert z.std().item() == pytest.approx(1, abs=0.2)
    assert z.mean().abs() < 0.3
    assert means.std(0).tolist() == pytest.approx([1, 1], abs=0.2)


def test_errors_of_resampling_are_infinite_where_few_samples_carry_all_weight():
    x = torch.randn(1000, 2, generator=seeded())
    few, many = (resample_tilt(x, lambda x, cond, s=s: s * x[:, 0]) for s in (20.0, 1.0))
    assert few.ess * 1000 < 10 < many.ess * 1000
    assert few.log_z_stderr == few.mean()[1].min() == math.inf
    assert many.log_z_stderr < 0.1
    assert float(many.mean()[1].max()) < 0.2


def test_resampling_a_constant_reward_changes_nothing():
    x = torch.randn(1000, 3, 2, generator=seeded())  # and rows of any shape
    estimate = resample_tilt(x, lambda x, cond: torch.full_like(x[:, 0, 0], 700.0))
    assert estimate.log_z == pytest.approx(700)
    assert estimate.log_z_stderr == pytest.approx(0, abs=1e-12)
    assert estimate.ess == pytest.approx(1)
    torch.testing.assert_close(estimate.mean()[0], x.double().mean(0))
    assert estimate.mean(x[:, 0, 0])[0].shape == ()
    assert estimate.sample(7, seeded()).shape == (7, 3, 2)


@pytest.mark.parametrize(("n", "m", "dim"), [(400, 400, 2), (300, 451, 2), (100, 64, 7), (5, 1, 3)])
def test_sliced_wasserstein_agrees_with_pot(n, m, dim):
    x = torch.randn(n, dim, generator=seeded(0)).double()
    y = 0.5 + 2 * torch.rand(m, dim, generator=seeded(1)).double()
    theta = directions(dim, 50, generator=seeded(2))
    oracle = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), projections=theta.numpy())
    ours = sliced_wasserstein(x, y, projections=50, generator=seeded(2))
    assert ours == pytest.approx(float(oracle), rel=1e-10)
    swapped = sliced_wasserstein(y, x, projections=50, generator=seeded(2))
    assert ours == pytest.approx(swapped, rel=1e-10)


@pytest.mark.slow
def test_sliced_wasserstein_of_a_shift_in_closed_form():
    """W2 along θ is |θᵀδ|, and E (θᵀδ)² = |δ|²/d."""
    x, delta = torch.randn(100, 3, generator=seeded()), torch.tensor([0.3, -2.0, 1.0])
    distance = sliced_wasserstein(x, x + delta, projections=20_000, generator=seeded(1))
    assert distance == pytest.approx(delta.norm().item() / math.sqrt(3), rel=0.02)
    assert sliced_wasserstein(x, x[torch.randperm(100, generator=seeded())]) == 0


def test_w2_ratio_is_what_it_says():
    n, draw = 100, seeded(5)
    x = torch.rand(2 * n, 2, generator=draw).double()
    a, b = torch.randn(2, 3 * n + 7, 2, generator=draw).double().unbind()
    theta = directions(2, 30, generator=seeded(6)).numpy()

    def distance(p, q):
        return ot.sliced_wasserstein_distance(p.numpy(), q.numpy(), projections=theta)

    xs, blocks_a, blocks_b = x.split(n), a.split(n)[:3], b.split(n)[:3]
    top = [
        0.5 * (distance(xs[p % 2], blocks_a[p]) + distance(xs[p % 2], blocks_b[p]))
        for p in range(3)
    ]
    bottom = [distance(p, q) for p, q in zip(blocks_a, blocks_b, strict=True)]
    ratio = w2_ratio(x, a, b, size=n, projections=30, generator=seeded(6))
    assert ratio == pytest.approx(sum(top) / sum(bottom), rel=1e-9)


@pytest.mark.slow
def test_w2_ratio_has_its_floor_at_one():
    tilt, draw, n = tilt_of("two_gaussians", "quadratic"), seeded(), 1000
    base = TARGETS["two_gaussians"].sample(8 * n, draw)
    exact = [tilt.sample(8 * n, draw) for _ in range(3)]
    ratio = w2_ratio(*exact, size=n, projections=50, generator=draw)
    assert ratio == pytest.approx(1, abs=0.3)
    assert w2_ratio(base, *exact[1:], size=n, projections=50, generator=draw) > 5


def test_mode_tv_by_hand_and_against_the_grid():
    modes = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    x, y = modes[[0, 0, 1, 1]] + 0.1, modes[[0, 1, 1, 2, 2, 2, 2, 2]] - 0.1
    assert mode_tv(x, y, modes) == pytest.approx(0.5 * (0.375 + 0.25 + 0.625))
    assert mode_tv(x, x.flip(0), modes) == 0

    law, tilt = TARGETS["ring"], tilt_of("ring", "half_plane")
    floor = math.sqrt(len(law.modes) / (2 * math.pi * N))
    assert mode_tv(tilt.sample(N, seeded()), tilt, law.modes) < 3 * floor
    estimate = resample_tilt(law.sample(N, seeded()), make_reward("half_plane", law))
    assert mode_tv(tilt.sample(N, seeded()), estimate, law.modes) < 6 * floor
    assert mode_tv(law.sample(N, seeded()), tilt, law.modes) > 0.2


@pytest.mark.slow
def test_mode_tv_floor_is_the_one_documented():
    law = TARGETS["ring"]
    uniform = tilt_of("ring", "linear")
    exact = uniform.mode_frequencies(law.modes)
    n = 2000
    values = [mode_tv(uniform.sample(n, seeded(s)), uniform, law.modes) for s in range(60)]
    expected = (2 / math.pi * exact * (1 - exact) / n).sqrt().sum().item() / 2
    assert np.mean(values) == pytest.approx(expected, rel=0.15)
    assert expected < math.sqrt(len(exact) / (2 * math.pi * n))


def test_errors_name_what_was_expected():
    law = TARGETS["ring"]
    good = make_reward("linear", law)
    with pytest.raises(ValueError, match=r"extent must be positive, got -1"):
        grid_tilt(law.log_density, good, -1.0, 50)
    with pytest.raises(ValueError, match=r"resolution must be at least 2 cells per axis, got 1"):
        grid_tilt(law.log_density, good, 4.0, 1)
    with pytest.raises(ValueError, match=r"reward must be finite, got \d+ values of 2500"):
        grid_tilt(law.log_density, lambda x, cond: x[:, 0].log(), 4.0, 50)
    with pytest.raises(ValueError, match=r"reward must return shape \(2500,\).*got \(2500, 2\)"):
        grid_tilt(law.log_density, lambda x, cond: x, 4.0, 50)
    with pytest.raises(ValueError, match=r"log_density must be finite somewhere"):
        grid_tilt(lambda x: torch.full_like(x[:, 0], -torch.inf), good, 4.0, 50)
    with pytest.raises(ValueError, match=r"log_density must be finite or -inf"):
        grid_tilt(lambda x: x[:, 0].log(), good, 4.0, 50)
    with pytest.raises(ValueError, match=r"samples must hold at least 2 rows, got 1"):
        resample_tilt(torch.zeros(1, 2), good)
    with pytest.raises(ValueError, match=r"reward must be finite, got 3 values of 3"):
        resample_tilt(torch.zeros(3, 2), lambda x, cond: x[:, 0] / 0)
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"rows of one size, got 2 and 3"):
        sliced_wasserstein(x, torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"y must be finite"):
        sliced_wasserstein(x, x / 0)
    with pytest.raises(ValueError, match=r"projections must be a positive number, got 0"):
        sliced_wasserstein(x, x, projections=0)
    with pytest.raises(ValueError, match=r"one block of 4 rows, got 4, 3 and 4"):
        w2_ratio(x, x[:3], x)
