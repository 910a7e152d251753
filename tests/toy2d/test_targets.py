"""Every target's samples are judged by its density, densities by independent integrals."""

import math
import time

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from applications.toy2d.targets import TARGETS, Target, find_target, nearest

NAMES = (
    "ring",
    "grid",
    "moons",
    "checkerboard",
    "pinwheel",
    "swiss_roll",
    "spirals",
    "circles",
    "two_gaussians",
)
N = 100_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid(resolution: int, extent: float = 4.0) -> torch.Tensor:
    axis = (torch.arange(resolution, dtype=torch.float64) + 0.5) * 2 * extent / resolution - extent
    return torch.cartesian_prod(axis, axis)


def test_names_are_the_ones_promised():
    assert set(TARGETS) == set(NAMES)
    assert all(target.name == name for name, target in TARGETS.items())


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_reproducible_scaled_and_fast(name):
    target = TARGETS[name]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        x = target.sample(N, seeded())
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1
    assert x.shape == (N, 2)
    assert x.dtype == torch.float32
    assert torch.equal(x, target.sample(N, seeded()))
    assert not torch.equal(x, target.sample(N, seeded(1)))
    assert (x.abs() < 3).all(1).float().mean() > 0.99
    assert x.abs().amax(0).min() > 1.8  # and it fills the window
    assert x.abs().max() < target.extent


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_samples_follow_the_density(name):
    """Chi-square of a 20×20 histogram against the density integrated over each of its cells."""
    target = TARGETS[name]
    resolution, block = 160, 8  # cells of side 0.05, on which the checkerboard's edges are lines
    p = torch.cat([target.log_density(x) for x in grid(resolution, target.extent).split(16384)])
    p = p.exp() * (2 * target.extent / resolution) ** 2
    assert p.sum().item() == pytest.approx(1, abs=1e-6)

    bins = resolution // block
    expected = N * p.reshape(bins, block, bins, block).sum((1, 3))
    edges = np.linspace(-target.extent, target.extent, bins + 1)
    x = target.sample(N, seeded(2)).numpy()
    observed, _, _ = np.histogram2d(x[:, 0], x[:, 1], (edges, edges))
    observed, expected = observed.flatten(), expected.flatten().numpy()
    rare = expected < 10
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum() + 1e-9)
    statistic = ((observed - expected) ** 2 / np.maximum(expected, 1)).sum()
    assert stats.chi2.sf(statistic, len(expected) - 1) > 1e-3


def line_integral(curve, point, std, power=1.0):
    """p(x) = ∫ N(x; c(u^power), σ²I) du by adaptive quadrature of scipy."""

    def density(u):
        distance = np.square(np.asarray(curve(u**power)) - point).sum()
        return math.exp(-distance / (2 * std**2)) / (2 * math.pi * std**2)

    return integrate.quad(density, 0, 1, limit=500, points=np.linspace(0, 1, 60)[1:-1])[0]


def moon(s):
    return 1.7 * math.cos(math.pi * s) - 0.85, 1.7 * math.sin(math.pi * s) - 0.425


def roll(s):
    angle = 1.5 * math.pi * (1 + 2 * s)
    return 0.19 * angle * math.cos(angle), 0.19 * angle * math.sin(angle)


def spiral(s):
    angle = 3 * math.pi * s
    return 0.28 * angle * math.cos(angle), 0.28 * angle * math.sin(angle)


def circle(radius):
    return lambda s: (radius * math.cos(2 * math.pi * s), radius * math.sin(2 * math.pi * s))


def mirrored(curve):
    return lambda s: tuple(-c for c in curve(s))


CURVES = {
    "moons": ((moon, mirrored(moon)), 0.16, 1.0),
    "swiss_roll": ((roll,), 0.12, 1.0),
    "spirals": ((spiral, mirrored(spiral)), 0.11, 0.5),
    "circles": ((circle(1.2), circle(2.5)), 0.15, 1.0),
}


@pytest.mark.parametrize("name", CURVES)
def test_curve_density_is_the_line_integral(name):
    arms, std, power = CURVES[name]
    x = TARGETS[name].sample(6, seeded()).double()
    value = TARGETS[name].log_density(x).exp()
    for point, p in zip(x.numpy(), value.tolist(), strict=True):
        exact = np.mean([line_integral(arm, point, std, power) for arm in arms])
        assert p == pytest.approx(exact, rel=3e-6)


@pytest.mark.parametrize("name", ["ring", "grid", "two_gaussians"])
def test_mixtures_carry_their_closed_form(name):
    target = TARGETS[name]
    x = target.sample(N, seeded()).double()
    assert torch.equal(target.log_density(x), target.mixture.log_prob(x))
    error = (x.mean(0) - target.mixture.mean()) / (x.var(0) / N).sqrt()
    assert error.abs().max() < 4
    torch.testing.assert_close(x.T.cov(), target.mixture.covariance(), atol=0.05, rtol=0)


def test_checkerboard_is_uniform_on_half_of_the_board():
    x = torch.tensor([[-2.0, -2.0], [-0.7, -2.0], [0.7, 0.7], [3.1, 3.1], [0.7, -0.7]])
    log_p = TARGETS["checkerboard"].log_density(x)
    assert log_p.isfinite().tolist() == [True, False, True, False, False]
    assert log_p[0].item() == pytest.approx(-math.log(18))


@pytest.mark.parametrize("name", NAMES)
def test_density_has_finite_gradients(name):
    x = torch.tensor([[0.0, 0.0], [2.4, 0.1], [-9.0, 7.0]], requires_grad=True)
    log_p = TARGETS[name].log_density(x)
    if log_p.requires_grad:  # the checkerboard's is flat
        (gradient,) = torch.autograd.grad(log_p.sum(), x)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_modes_and_classes_partition_the_law(name):
    target = TARGETS[name]
    x, label = target.labelled(N, seeded())
    frequency = nearest(x, target.modes).bincount(minlength=len(target.modes)) / N
    assert frequency.min() > 0.03
    assert 2 <= target.classes <= 4
    share = label.bincount(minlength=target.classes) / N
    assert len(share) == target.classes
    assert share.min() > 0.15


def test_classes_mean_what_they_say():
    x, circle_index = TARGETS["circles"].labelled(N, seeded())
    assert ((x.norm(dim=1) > 1.85).long() == circle_index).float().mean() > 0.999
    x, quarter = TARGETS["ring"].labelled(N, seeded())
    angle = torch.atan2(x[:, 1], x[:, 0]) + math.pi / 8
    assert ((angle % (2 * math.pi) / (math.pi / 2)).long() == quarter).float().mean() > 0.999


def test_nearest_by_hand():
    modes = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    assert nearest(torch.tensor([[1.4, 5.0], [1.6, -5.0]]), modes).tolist() == [0, 1]


def test_errors_name_what_was_expected():
    with pytest.raises(ValueError, match=r"unknown target 'moon'.*moons.*two_gaussians"):
        find_target("moon")
    assert isinstance(find_target("moons"), Target)
    with pytest.raises(ValueError, match="n must be a positive number of samples, got 0"):
        TARGETS["moons"].sample(0)
