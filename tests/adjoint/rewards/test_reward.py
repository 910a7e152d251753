"""Rewards: gradients, transformations, and clear refusals."""

import pytest
import torch

from adjoint.rewards.check import check_reward
from adjoint.rewards.reward import Reward, as_reward, cap_norm


def quartic(x, cond=None):
    return -(x**4).sum(1)


def test_gradient_by_autograd_and_given_agree():
    x = torch.randn(7, 3, dtype=torch.float64)
    value, gradient, _ = Reward(quartic, scale=0.5).value_and_gradient(x)
    given = Reward(quartic, gradient=lambda x, c: -4 * x**3, scale=0.5)
    torch.testing.assert_close(given.value_and_gradient(x)[:2], (value, gradient))
    torch.testing.assert_close(gradient, -2 * x**3)
    torch.testing.assert_close(value, 0.5 * quartic(x))
    assert not gradient.requires_grad


def test_given_gradient_serves_a_reward_that_is_not_differentiable():
    reward = Reward(lambda x, c: (x[:, 0] > 0).double(), gradient=lambda x, c: torch.ones_like(x))
    value, gradient, _ = reward.value_and_gradient(
        torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    )
    assert value.tolist() == [1.0, 0.0]
    assert gradient.tolist() == [[1.0], [1.0]]


@pytest.mark.slow
def test_gradient_inside_transforms():
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    reward = Reward(quartic, scale=0.5)
    alone = [reward.value_and_gradient(rows)[:2] for rows in x]
    expected = [torch.stack(rows) for rows in zip(*alone, strict=True)]
    mapped = torch.vmap(reward.value_and_gradient)(x)[:2]
    compiled = torch.compile(reward.value_and_gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(mapped, tuple(expected))
    torch.testing.assert_close(compiled(x[0])[:2], reward.value_and_gradient(x[0])[:2])


def test_norm_cap_shrinks_only_steep_samples_and_keeps_directions():
    x = torch.tensor([[0.1, 0.0], [3.0, 4.0]], dtype=torch.float64)
    _, free, _ = Reward(quartic).value_and_gradient(x)
    _, capped, _ = Reward(quartic, max_norm=2.0).value_and_gradient(x)
    torch.testing.assert_close(capped[0], free[0])
    assert float(capped[1].norm()) == pytest.approx(2.0)
    torch.testing.assert_close(capped[1] / 2.0, free[1] / free[1].norm())


@pytest.mark.slow
def test_smoothing_is_the_gaussian_average_and_its_gradient_its_own():
    reward = Reward(lambda x, c: x[:, 0] ** 2, smoothing=0.5, probes=20_000)
    x = torch.tensor([[0.7]], dtype=torch.float64)
    value, gradient, _ = reward.value_and_gradient(x)
    assert float(value) == pytest.approx(0.49 + 0.25, rel=0.02)  # E(x + sξ)² = x² + s²
    assert float(gradient) == pytest.approx(1.4, rel=1e-9)  # antithetic: odd terms cancel exactly
    again, _, _ = reward.value_and_gradient(x)
    assert float(again) == float(value)


def test_scaled_rewards_compose():
    x = torch.randn(4, 2)
    torch.testing.assert_close(Reward(quartic, scale=2.0).scaled(0.25)(x), 0.5 * quartic(x))
    assert as_reward(reward := Reward(quartic)) is reward


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (
            lambda x, c: x,
            ValueError,
            r"shape \(6, 2\).*expected one value per sample, shape \(6,\)",
        ),
        (lambda x, c: x.sum(), ValueError, r"returned shape \(\)"),
        (lambda x, c: x.sum(1).detach(), ValueError, "not differentiable"),
        (lambda x, c: x.argmax(1), TypeError, "floating-point"),
        (lambda x, c: 1.0, TypeError, "float"),
        (lambda x, c: x.sum(1).log(), ValueError, "not finite"),
        (lambda x, c: x.norm(dim=1) * torch.nan, ValueError, "not finite"),
    ],
)
def test_bad_rewards_are_refused(value, error, match):
    with pytest.raises(error, match=match):
        check_reward(Reward(value), -torch.ones(6, 2))


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="two arguments"):
        Reward(lambda x: x.sum(1))
    with pytest.raises(TypeError, match="callable"):
        Reward(3.0)
    with pytest.raises(ValueError, match="max_norm"):
        Reward(quartic, max_norm=0.0)
    with pytest.raises(ValueError, match="smoothing"):
        Reward(quartic, smoothing=-1.0)
    with pytest.raises(ValueError, match="gradient returned shape"):
        Reward(quartic, gradient=lambda x, c: x[:, :1]).value_and_gradient(torch.ones(2, 2))


def test_scaling_keeps_subclasses():
    class Constant(Reward):
        def value_and_gradient(self, x, cond=None, *, create_graph=False):
            return torch.zeros(len(x)), torch.full_like(x, 7.0)

    scaled = Constant(quartic).scaled(2.0)
    assert type(scaled) is Constant
    assert scaled.scale == 2.0
    assert float(scaled.value_and_gradient(torch.ones(1, 1))[1]) == 7.0


def test_a_module_with_one_argument_is_refused_by_its_forward():
    class One(torch.nn.Module):
        def forward(self, x):
            return x.sum(1)

    with pytest.raises(TypeError, match="two arguments"):
        Reward(One())


LABELS = {"label": torch.arange(3.0)}


@pytest.mark.parametrize(
    ("value", "cond", "match"),
    [
        (lambda x, c: x[:, 0] * c["lable"], LABELS, r"'lable'; cond names \['label'\]"),
        (lambda x, c: x[:, 0] * c["label"], {}, r"'label'; cond names \[\]"),
        (lambda x, c: x[:, 0] * c["label"], None, r"cond names \[\].*cond_sampler="),
        (lambda x, c: x[:, 0] * c.get("label"), None, "'get'"),
    ],
)
def test_a_condition_that_does_not_serve_the_reward_is_named(value, cond, match):
    for reward in (Reward(value, name="fit"), Reward(quartic, gradient=value, name="fit")):
        with pytest.raises(ValueError, match=f"reward 'fit' needs a condition.*{match}"):
            reward.value_and_gradient(torch.ones(3, 1), cond)


def test_a_condition_of_another_batch_is_refused():
    with pytest.raises(ValueError, match=r"cond\['label'\] must have the leading size 3"):
        Reward(quartic)(torch.ones(3, 1), {"label": torch.zeros(2)})


def test_errors_that_have_nothing_to_do_with_conditions_pass():
    def wrong_type(x, cond):
        return x.sum(1) + "1"

    with pytest.raises(TypeError, match="str"):
        Reward(wrong_type)(torch.ones(3, 1))
    with pytest.raises(TypeError, match="str"):
        Reward(wrong_type)(torch.ones(3, 1), LABELS)
    value = Reward(lambda x, c: x[:, 0] * c["label"])(torch.ones(3, 1), LABELS)
    assert value.tolist() == [0.0, 1.0, 2.0]


def test_a_reward_in_another_dtype_or_on_another_device_is_refused():
    layer = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"torch.float64 on cpu.*dtype and device"):
        check_reward(Reward(lambda x, c: layer(x)[:, 0]), torch.ones(3, 2, dtype=torch.float64))
    elsewhere = Reward(lambda x, c: torch.empty(3, device="meta"))
    with pytest.raises(ValueError, match="on meta for x on cpu"):
        elsewhere(torch.ones(3, 2))


def test_capped_is_the_cap_of_the_constructor():
    x = torch.tensor([[0.1, 0.0], [3.0, 4.0]], dtype=torch.float64)
    _, expected, _ = Reward(quartic, max_norm=2.0).value_and_gradient(x)
    for reward in (Reward(quartic), Reward(quartic, max_norm=9.0)):
        assert torch.equal(reward.capped(2.0).value_and_gradient(x)[1], expected)
    _, free, _ = Reward(quartic, max_norm=2.0).capped(None).value_and_gradient(x)
    torch.testing.assert_close(free, -4 * x**3)
    with pytest.raises(ValueError, match="max_norm"):
        Reward(quartic).capped(-1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cap_of_a_gradient_whose_square_overflows(dtype):
    big = 0.1 * torch.finfo(dtype).max
    rows = [[big, 0.0], [0.3 * big, 0.4 * big], [0.0, 0.0], [0.3, 0.4]]
    gradient = torch.tensor(rows, dtype=dtype)
    expected = torch.tensor([[2.0, 0.0], [1.2, 1.6], [0.0, 0.0], [0.3, 0.4]], dtype=dtype)
    torch.testing.assert_close(cap_norm(gradient, 2.0), expected)


def test_the_cap_leaves_gradients_below_it_as_they_are():
    gradient = torch.randn(500, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cap_norm(gradient, 100.0), gradient)
