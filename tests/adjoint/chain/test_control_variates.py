"""Control variates: mean zero for any model, and how much noise they leave at the optimum."""

import pytest
import torch
from helpers.tilt_problems import PROBLEMS

from adjoint.certificate import path_log_ratio
from adjoint.chain.adjoints import lean_adjoint
from adjoint.chain.control_variates import control_variates
from adjoint.chain.kernels import KERNELS, make_kernel, measure_mmse
from adjoint.chain.rollout import draw_noise, rollout
from adjoint.evaluator import Evaluator
from adjoint.loss import adjoint_matching_loss
from flows import grid as grids
from flows.field import batch_time

F64 = torch.float64
PROBLEM = PROBLEMS["three"]
TILTED = PROBLEM.exact()[0]


def kernel_of(name, steps):
    grid = grids.uniform(steps)
    generator = torch.Generator().manual_seed(1)
    x1 = PROBLEM.base.sample(4096, generator=generator).double()
    mmse = covariance = None
    if "mmse" in KERNELS[name].needs:
        mmse = measure_mmse(PROBLEM.base, grid, x1, generator=generator)
    if name == "covariance_matched":
        covariance = torch.cov(x1.T)
    return make_kernel(name, grid, mmse=mmse, covariance=covariance)


def curved(x, cond=None):
    return torch.sin(2 * x[:, 0]) + 0.3 * x[:, 0] * x[:, 1]


def slope_of(reward):
    def terminal(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return -torch.autograd.grad(reward(x).sum(), x)[0]

    return terminal


def crooked(x, t, cond=None):
    """A model that is the tilt of nothing, and whose change from the base is curved."""
    return PROBLEM.base(x, t) + 0.4 * torch.sin(3 * x) + 0.2 * batch_time(t, x) * x.square()


def adjoints(field, kernel, reward, x0, noise):
    """Trajectory, variates, adjoint, and its known noise as the loss takes it."""
    base, terminal = PROBLEM.base, slope_of(reward)
    trajectory = rollout(field, base, kernel, x0, noise)
    end = terminal(trajectory.xs[-1])
    c = control_variates(field, base, kernel, trajectory, end, terminal)
    adjoint = lean_adjoint(base, kernel, trajectory.xs, end, noise=noise)
    nothing = torch.zeros_like(end)
    known = lean_adjoint(
        base, kernel, trajectory.xs, nothing, noise=noise, control_variates=c
    ).values
    if kernel.residual_at_next:
        known = torch.cat([known[:1], known[1:] + c])
    return trajectory, c, adjoint, known


def start(n, steps, kernel, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(n, 2, generator=generator, dtype=F64)
    return x0, draw_noise(kernel, x0, generator=generator)


@pytest.mark.parametrize("name", KERNELS)
def test_they_change_their_sign_with_the_noise_of_their_step(name):
    """So that given the state before, their mean is zero, whatever the model."""
    steps = 6
    kernel = kernel_of(name, steps)
    x0, noise = start(5, steps, kernel)
    _, c, _, _ = adjoints(crooked, kernel, curved, x0, noise)
    for k in range(steps):
        flipped = noise.clone()
        flipped[k] *= -1
        other = adjoints(crooked, kernel, curved, x0, flipped)[1]
        torch.testing.assert_close(other[k], -c[k], rtol=1e-9, atol=1e-12)
        quiet = kernel.noiseless_last and k == steps - 1
        assert (float(c[k].abs().max()) == 0) == quiet


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_the_mean_of_the_adjoint_at_a_state_stays(name):
    kernel = kernel_of(name, 6)
    x0, noise = start(20_000, 6, kernel)
    x0 = x0[:1].expand(20_000, 2).contiguous()
    difference = adjoints(crooked, kernel, curved, x0, noise)[3][int(kernel.residual_at_next)]
    error = difference.std(0) / len(difference) ** 0.5
    assert float(error.min()) > 0
    assert bool((difference.mean(0).abs() < 4 * error).all())


def test_weighted_they_would_have_a_mean():
    """Why only the adjoint is weighted: at the optimum too, for a coarse grid."""
    n = 20_000
    kernel = kernel_of("moment_matched", 6)
    x0, noise = start(n, 6, kernel)
    x0 = x0[:1].expand(n, 2).contiguous()
    trajectory, _, adjoint, known = adjoints(TILTED, kernel, PROBLEM.reward, x0, noise)
    log_ratio, _ = path_log_ratio(trajectory, adjoint.v_base, kernel)
    weights = torch.softmax(PROBLEM.reward(trajectory.xs[-1]) + log_ratio, 0) * n
    error = known[0].std(0) / n**0.5
    assert bool((known[0].mean(0).abs() < 4 * error).all())
    weighted = weights[:, None] * known[0]
    assert bool((weighted.mean(0).abs() > 8 * weighted.std(0) / n**0.5).any())


def noise_at_the_optimum(name, steps, *, n=2000):
    """Adjoint-matching loss of the exact velocity with variates over that without: noise only."""
    kernel = kernel_of(name, steps)
    x0, noise = start(n, steps, kernel)
    trajectory, _, adjoint, known = adjoints(TILTED, kernel, PROBLEM.reward, x0, noise)
    v = trajectory.v
    less = adjoint_matching_loss(v, adjoint, kernel, control_variate=known)[0]
    return float(less / adjoint_matching_loss(v, adjoint, kernel)[0])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.slow
def test_at_the_optimum_little_noise_is_left_and_less_on_a_finer_grid(name):
    coarse, fine = (noise_at_the_optimum(name, steps) for steps in (20, 80))
    assert coarse < 0.5
    assert fine < 0.7 * coarse  # not in proportion: the first steps renew most of the noise


@pytest.mark.parametrize("name", ["moment_matched", "euler_published"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_of_the_loss_is_that_of_the_weighted_residual_less_the_noise(name, weighted):
    kernel = kernel_of(name, 4)
    x0, noise = start(3, 4, kernel)
    trajectory, _, adjoint, known = adjoints(crooked, kernel, curved, x0, noise)
    weights = torch.tensor([0.2, 1.0, 1.8], dtype=F64) if weighted else None
    v = trajectory.v.clone().requires_grad_(True)
    steps = torch.tensor([0, 2])
    loss, _ = adjoint_matching_loss(
        v[steps], adjoint, kernel, steps=steps, weights=weights, control_variate=known
    )
    (found,) = torch.autograd.grad(loss, v)
    r, a = (c[steps].reshape(-1, 1, 1) for c in (kernel.residual_v, kernel.residual_a))
    index = steps + int(kernel.residual_at_next)
    residual = r * (v - adjoint.v_base)[steps] + a * adjoint.values[index]
    w = 1 if weights is None else weights[:, None]
    expected = 2 * r * (w * residual - a * known[index]) / 3
    torch.testing.assert_close(found[steps], expected.detach())
    if not weighted:
        square = (residual - a * known[index]).square().sum((0, 2)).mean()
        torch.testing.assert_close(loss, square)


def test_the_base_with_a_linear_reward_has_none():
    """Before training only the last step could have some, and there ∇r does not change."""
    kernel = kernel_of("moment_matched", 5)
    x0, noise = start(4, 5, kernel)
    linear = lambda x, cond=None: x.sum(1)  # noqa: E731
    c = adjoints(PROBLEM.base, kernel, linear, x0, noise)[1]
    torch.testing.assert_close(c, torch.zeros_like(c), rtol=0, atol=1e-12)


def test_mirrored_states_are_exact_under_autocast():
    kernel = kernel_of("covariance_matched", 4)
    x0, noise = (z.float() for z in start(50, 4, kernel))
    flipped = noise.clone()
    flipped[-1] *= -1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one, other = (adjoints(PROBLEM.base, kernel, curved, x0, n)[1] for n in (noise, flipped))
    torch.testing.assert_close(one[-1], -other[-1], rtol=1e-4, atol=1e-5)


def test_micro_batches_do_not_change_them():
    kernel = kernel_of("moment_matched", 5)
    x0, noise = start(7, 5, kernel)
    trajectory = rollout(crooked, PROBLEM.base, kernel, x0, noise)
    terminal = slope_of(curved)
    found = [
        control_variates(
            *(Evaluator(crooked, size), Evaluator(PROBLEM.base, size)),
            *(kernel, trajectory, terminal(trajectory.xs[-1]), terminal),
        )
        for size in (0, 3)
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
