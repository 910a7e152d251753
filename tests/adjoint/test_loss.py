"""The loss against its formula, and its options."""

import pytest
import torch

from adjoint.chain.adjoints import Adjoint
from adjoint.chain.kernels import make_kernel
from adjoint.loss import adjoint_matching_loss, importance_weights, select_steps
from flows import grid as grids

K, B, D = 6, 5, 3


def random_adjoint():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(K + 1, B, D, generator=generator, dtype=torch.float64)
    v_base = torch.randn(K, B, D, generator=generator, dtype=torch.float64)
    v = torch.randn(K, B, D, generator=generator, dtype=torch.float64)
    return Adjoint(values, v_base), v


def test_published_loss_is_its_formula():
    adjoint, v = random_adjoint()
    loss, _ = adjoint_matching_loss(v, adjoint, make_kernel("euler_published", grids.uniform(K)))
    by_hand, h = 0.0, 1 / K
    for i in range(K):
        t = i * h
        sigma = (2 * (1 - t + h) / (t + h)) ** 0.5
        term = 2 / sigma * (v[i] - adjoint.v_base[i]) + sigma * adjoint.values[i]
        by_hand += term.square().sum(1).mean()
    assert float(loss) == pytest.approx(float(by_hand), rel=1e-13)


def test_consistent_loss_is_its_formula():
    adjoint, v = random_adjoint()
    kernel = make_kernel("ancestral_pair", grids.uniform(K))
    loss, _ = adjoint_matching_loss(v, adjoint, kernel)
    by_hand = 0.0
    for k in range(K - 1):  # the last step is noiseless
        d = kernel.mean_v[k] * (v[k] - adjoint.v_base[k])
        by_hand += (
            (d / kernel.std[k] + kernel.std[k] * adjoint.values[k + 1]).square().sum(1).mean()
        )
    assert float(loss) == pytest.approx(float(by_hand), rel=1e-13)


@pytest.mark.parametrize("name", ["ancestral", "euler_published"])
def test_minimum_is_the_target_velocity_and_gradient_points_there(name):
    adjoint, v = random_adjoint()
    kernel = make_kernel(name, grids.uniform(K))
    v = v.requires_grad_(True)
    loss, _ = adjoint_matching_loss(v, adjoint, kernel)
    (gradient,) = torch.autograd.grad(loss, v)
    shape = (-1, 1, 1)
    residual_v, residual_a = kernel.residual_v.reshape(shape), kernel.residual_a.reshape(shape)
    target = adjoint.v_base - residual_a / residual_v * adjoint.values[:-1]
    torch.testing.assert_close(
        gradient, 2 * residual_v**2 * (v - target) / B, rtol=1e-11, atol=1e-13
    )
    if name == "ancestral":
        t = kernel.t[:-1].reshape(shape)
        torch.testing.assert_close(target, adjoint.v_base - (1 - t) * adjoint.values[:-1])


def test_subset_clip_and_weights():
    adjoint, v = random_adjoint()
    kernel = make_kernel("ancestral", grids.uniform(K))
    steps = torch.tensor([1, 4])
    shape = (-1, 1, 1)
    residual = kernel.residual_v.reshape(shape) * (v - adjoint.v_base)
    residual = residual + kernel.residual_a.reshape(shape) * adjoint.values[:-1]
    terms = residual.square().sum(2)
    loss, metrics = adjoint_matching_loss(v[steps], adjoint, kernel, steps=steps)
    assert float(loss) == pytest.approx(float(terms[steps].sum(0).mean()), rel=1e-13)
    cap = float(terms.median())
    loss, metrics = adjoint_matching_loss(v, adjoint, kernel, clip=cap)
    assert float(loss) == pytest.approx(float(terms.clamp_max(cap).sum(0).mean()), rel=1e-13)
    assert float(metrics["term_quantile"]) == pytest.approx(
        float(torch.quantile(terms, 0.9)), rel=1e-5
    )
    weights = torch.arange(1.0, B + 1, dtype=torch.float64)
    loss, _ = adjoint_matching_loss(v, adjoint, kernel, weights=weights)
    assert float(loss) == pytest.approx(float((weights * terms.sum(0)).mean()), rel=1e-13)


def test_step_selection_keeps_the_late_and_samples_the_early():
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(20)
    for _ in range(600):
        chosen = select_steps(20, late_fraction=0.25, early_fraction=0.4, generator=generator)
        assert len(chosen) == 5 + 6
        assert bool((chosen.diff() > 0).all())
        counts[chosen] += 1
    assert bool((counts[15:] == 600).all())
    assert bool(((counts[:15] / 600 - 0.4).abs() < 0.1).all())
    with pytest.raises(ValueError, match="select none"):
        select_steps(20, late_fraction=0.0, early_fraction=0.0)
    with pytest.raises(ValueError, match="late_fraction must lie"):
        select_steps(20, late_fraction=1.5)


def test_importance_weights_are_softmax_times_batch_and_capped():
    log_w = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    expected = 3 * log_w.exp() / log_w.exp().sum()
    torch.testing.assert_close(importance_weights(log_w), expected)
    assert float(importance_weights(torch.tensor([0.0] * 99 + [50.0])).max()) == 10.0
