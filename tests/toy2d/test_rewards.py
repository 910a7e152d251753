"""Rewards are judged by their formulas, their gradients by differences, their strength by ESS."""

import dataclasses
import functools
import math

import pytest
import torch

from applications.toy2d.rewards import REWARDS, ToyReward, classifier, make_reward
from applications.toy2d.targets import TARGETS

NAMES = ("linear", "quadratic", "ring", "half_plane", "peaks", "classifier")


@functools.cache
def reward_of(name: str, target: str) -> ToyReward:
    return make_reward(name, TARGETS[target])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_names_are_the_ones_promised():
    assert tuple(REWARDS) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.slow
def test_tilt_is_visible_but_not_absurd(name, target):
    reward = reward_of(name, target)
    assert reward.name == name
    r = reward(TARGETS[target].sample(50_000, seeded())).double()
    w = r.softmax(0)
    assert 0.05 < 1 / (len(r) * w.square().sum()) < 0.7


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_gradient_is_right_and_finite_everywhere(name):
    reward = reward_of(name, "moons")
    x = 2 * torch.randn(20, 2, generator=seeded(), dtype=torch.float64)
    assert torch.autograd.gradcheck(reward, (x.requires_grad_(),))

    axis = torch.linspace(-30, 30, 61)
    special = torch.tensor([[0.9, 0.4], [1e4, -1e4], [0.0, 0.0]])
    wide = torch.cat((torch.cartesian_prod(axis, axis), special)).requires_grad_()
    value = reward(wide)
    assert value.shape == (len(wide),)
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    (gradient,) = torch.autograd.grad(value.sum(), wide)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_evaluates_on_a_fine_grid_in_either_dtype(name):
    axis = torch.linspace(-4, 4, 400, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    value = reward_of(name, "ring")(x, None)
    assert value.shape == (160_000,)
    assert value.dtype == torch.float64
    single = reward_of(name, "ring")(x.float()).double()
    torch.testing.assert_close(value, single, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_only_linear_and_quadratic_claim_a_quadratic_form(name):
    reward = reward_of(name, "ring")
    if name not in ("linear", "quadratic"):
        assert reward.quadratic_form is None
        return
    A, b = reward.quadratic_form
    x = torch.randn(100, 2, generator=seeded(), dtype=torch.float64)
    exact = -0.5 * torch.einsum("ni,ij,nj->n", x, A, x) + x @ b
    torch.testing.assert_close(reward(x), exact, atol=1e-12, rtol=0)


def test_quadratic_is_a_well_around_its_centre():
    A, b = reward_of("quadratic", "ring").quadratic_form
    assert torch.linalg.eigvalsh(A).min() > 0
    centre = torch.linalg.solve(A, b)
    torch.testing.assert_close(centre, torch.tensor([1.0, -0.5], dtype=torch.float64))


def test_ring_is_largest_on_its_circle():
    reward = reward_of("ring", "ring")
    angle = torch.linspace(0, 6, 50, dtype=torch.float64)
    direction = torch.stack((angle.cos(), angle.sin()), 1)
    centre = torch.tensor([0.9, 0.4], dtype=torch.float64)
    on, width = reward(centre + 1.5 * direction), reward(centre + 1.95 * direction)
    assert on.abs().max() < 1e-9
    torch.testing.assert_close(width, torch.full_like(width, -0.5), atol=1e-5, rtol=0)


def test_half_plane_is_a_step_of_height_three():
    reward = reward_of("half_plane", "ring")
    normal = torch.tensor([[0.8, 0.6]], dtype=torch.float64)
    values = [reward((0.5 + s) * normal).item() for s in (-9.0, -0.2, 0.0, 0.2, 9.0)]
    assert values[0] == pytest.approx(0, abs=1e-9)
    assert values[1] + values[3] == pytest.approx(3)
    assert values[2] == pytest.approx(1.5)
    assert values[4] == pytest.approx(3)


def test_peaks_stand_on_centres_of_the_target():
    modes = TARGETS["grid"].modes  # 2 apart: the neighbours' tails are exp(-4/0.72) or less
    values = reward_of("peaks", "grid")(modes)
    torch.testing.assert_close(values[[0, 3, 6]], torch.tensor([3.0, 2.5, 2.0]), atol=0.03, rtol=0)
    assert values[[1, 2, 4, 5, 7, 8]].max() < 0.04


def test_two_modes_have_two_peaks():
    target = TARGETS["two_gaussians"]
    values = reward_of("peaks", "two_gaussians")(target.modes)
    torch.testing.assert_close(values, torch.tensor([3.0, 2.5]), atol=0.01, rtol=0)
    beside = target.modes[:1] + torch.tensor([[-0.36, 0.48]])  # one width of 0.6 away
    one_width_off = reward_of("peaks", "two_gaussians")(beside).item()
    assert one_width_off == pytest.approx(3 * math.exp(-0.5), abs=0.01)


@pytest.mark.parametrize("name", ["moons", "circles", "checkerboard"])
@pytest.mark.slow
def test_classifier_knows_its_classes(name):
    target = TARGETS[name]
    probability = reward_of("classifier", name)(target.sample(10_000, seeded(9))).exp()
    _, label = target.labelled(10_000, seeded(9))
    wrong = (probability > 0.5) != (label == 0)
    assert wrong.float().mean() < 0.03


@pytest.mark.slow
def test_classifier_is_a_normalised_log_probability():
    x = TARGETS["grid"].sample(1000, seeded())
    total = sum(classifier(TARGETS["grid"], label=k)(x).exp() for k in range(3))
    torch.testing.assert_close(total, torch.ones(1000))


@pytest.mark.slow
def test_classifier_is_deterministic_and_leaves_the_global_generator_alone():
    x = TARGETS["moons"].sample(1000, seeded())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = classifier(TARGETS["moons"])(x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    with torch.no_grad():  # the caller's mode does not matter
        assert torch.equal(first, classifier(TARGETS["moons"])(x))
    assert not torch.equal(first, classifier(TARGETS["moons"], seed=1)(x))


def test_errors_name_what_was_expected():
    with pytest.raises(ValueError, match=r"unknown reward 'peak'.*linear.*classifier"):
        make_reward("peak", TARGETS["ring"])
    with pytest.raises(ValueError, match=r"x must have shape \(B, 2\), got \(5, 3\)"):
        reward_of("linear", "ring")(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"label must be one of 0 … 1, got 2"):
        classifier(TARGETS["moons"], label=2)
    with pytest.raises(ValueError, match="peaks needs a target with modes, 'ring' has none"):
        make_reward("peaks", dataclasses.replace(TARGETS["ring"], modes=None))
