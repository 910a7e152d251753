"""Adjoints against autograd through the unrolled chain and against closed forms."""

import itertools

import pytest
import torch
from helpers.tilt_problems import LAMBDA, PROBLEMS, S2, M, gaussian

from adjoint.chain.adjoints import full_adjoint, lean_adjoint, scalar_adjoint
from adjoint.chain.kernels import KERNELS, make_kernel, measure_mmse
from adjoint.chain.rollout import draw_noise, rollout
from adjoint.evaluator import velocity_along
from adjoint.rewards.reward import Reward
from flows import grid as grids

PROBLEM = PROBLEMS["three"]


def kernel_for(name, steps=6):
    grid = grids.shifted(steps, 1.5)
    mmse = covariance = None
    if name == "covariance_matched":
        covariance = PROBLEM.base.covariance()
    if "mmse" in KERNELS[name].needs:
        x1 = PROBLEM.base.sample(2000, generator=torch.Generator().manual_seed(1))
        mmse = measure_mmse(PROBLEM.base, grid, x1, generator=torch.Generator().manual_seed(2))
    return make_kernel(name, grid, mmse=mmse, covariance=covariance)


def curved(x, cond=None):
    return torch.sin(2 * x[:, 0]) + 0.3 * x[:, 0] * x[:, 1] ** 2


def trajectory_of(kernel, field=PROBLEM.base, batch=4):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(batch, 2, generator=generator, dtype=torch.float64)
    noise = draw_noise(kernel, x0, generator=generator)
    return rollout(field, PROBLEM.base, kernel, x0, noise)


def unrolled(kernel, x, first, noise, field=PROBLEM.base):
    """End of the chain from state ``first`` on, with gradient."""
    for k in range(first, kernel.steps):
        follow = PROBLEM.base if kernel.noiseless_last and k == kernel.steps - 1 else field
        mean = kernel.mean_x[k] * x + kernel.mean_v[k] * follow(x, kernel.t[k])
        kick = kernel.std[k] * noise[k]
        if (
            of_state := kernel.state_noise
        ) is not None:  # from the mixture's closed form, not from J
            conditional = of_state.start_covariance.expand(len(x), 2, 2)
            if k > 0:
                conditional = PROBLEM.base.posterior_covariance(x, kernel.t[k])
            full = of_state.bridge[k] * torch.eye(2).double() + of_state.gain[k] * conditional
            kick = (torch.linalg.cholesky(full) @ noise[k][:, :, None])[:, :, 0]
        x = mean + kick
    return x


OWN_JACOBIAN = [n for n in KERNELS if n != "euler_published"]
SCALAR = [n for n in KERNELS if n not in ("euler_published", "covariance_matched")]


@pytest.mark.parametrize("name", OWN_JACOBIAN)
def test_lean_adjoint_is_autograd_through_the_unrolled_chain(name):
    kernel = kernel_for(name)
    trajectory = trajectory_of(kernel)
    _, gradient, _ = Reward(curved).value_and_gradient(trajectory.xs[-1])
    noise = trajectory.noise
    adjoint = lean_adjoint(PROBLEM.base, kernel, trajectory.xs, -gradient, noise=noise)
    for k in range(kernel.steps + 1):
        if k < kernel.steps and kernel.adjoint_t[k] != kernel.t[k]:
            continue  # t = 0 of the left-point rule, evaluated at a small time by design
        x = trajectory.xs[k].clone().requires_grad_(True)
        cost = -curved(unrolled(kernel, x, k, trajectory.noise)).sum()
        (a,) = torch.autograd.grad(cost, x)
        torch.testing.assert_close(
            adjoint.values[k] * kernel.adjoint_scale[k], a, rtol=1e-10, atol=1e-12
        )


def test_published_adjoint_is_its_formula_with_an_explicit_jacobian():
    kernel = kernel_for("euler_published")
    xs = trajectory_of(kernel).xs
    terminal = torch.randn(4, 2, dtype=torch.float64)
    values = lean_adjoint(PROBLEM.base, kernel, xs, terminal).values
    a = terminal
    for k in reversed(range(kernel.steps)):
        t, s = kernel.t[k], kernel.t[k + 1]
        rows = []
        for b in range(4):

            def drift(x, t=t, s=s):
                return 2 * PROBLEM.base(x[None], s)[0] - x / s

            jacobian = torch.autograd.functional.jacobian(drift, xs[k, b])
            rows.append(a[b] + (s - t) * jacobian.T @ a[b])
        a = torch.stack(rows)
        torch.testing.assert_close(values[k], a, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", KERNELS)
def test_base_velocities_are_those_at_the_states(name):
    kernel = kernel_for(name)
    trajectory = trajectory_of(kernel)
    xs, ones = trajectory.xs, torch.ones(4, 2, dtype=torch.float64)
    v_base = lean_adjoint(PROBLEM.base, kernel, xs, ones, noise=trajectory.noise).v_base
    for k in range(kernel.steps):
        torch.testing.assert_close(v_base[k], PROBLEM.base(xs[k], kernel.t[k]), rtol=0, atol=1e-13)


def euler_adjoint_error(steps: int) -> float:
    """Error at t = 1/2 of the Euler adjoint of a linear reward on N(m, s²), MATH: -t s²/(...)."""
    kernel = make_kernel("euler_consistent", grids.uniform(steps))
    xs = torch.zeros(steps + 1, 1, 1, dtype=torch.float64)
    a = lean_adjoint(gaussian(), kernel, xs, torch.tensor([[-LAMBDA]], dtype=torch.float64)).values
    exact = -LAMBDA * 0.5 * S2 / (0.25 * S2 + 0.25)
    return float(a[steps // 2]) - exact


@pytest.mark.slow
def test_euler_adjoint_converges_at_first_order_and_extrapolates_to_the_closed_form():
    errors = [euler_adjoint_error(steps) for steps in (200, 400, 800, 1600)]
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert ratios == pytest.approx([2.0] * 3, abs=0.03)
    table = errors  # Richardson: eliminate h, h², h³
    for order in (1, 2, 3):
        table = [(2**order * b - a) / (2**order - 1) for a, b in itertools.pairwise(table)]
    assert abs(table[0]) < 1e-6


def test_scalar_adjoint_holds_c_constant():
    terminal = torch.randn(4, 2, dtype=torch.float64)
    for name in ("euler_published", "moment_matched"):
        kernel = kernel_for(name)
        xs = trajectory_of(kernel).xs
        values = scalar_adjoint(PROBLEM.base, kernel, xs, terminal).values
        if name == "euler_published":  # λ is a = t c
            assert not values[0].any()
            values = values[1:] / kernel.t[1:].reshape(-1, 1, 1)
        torch.testing.assert_close(values, terminal.expand_as(values), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", SCALAR)
def test_full_adjoint_is_autograd_of_the_whole_cost(name):
    kernel = kernel_for(name)
    tilted = PROBLEM.exact()[0]
    trajectory = trajectory_of(kernel, tilted)
    _, gradient, _ = Reward(curved).value_and_gradient(trajectory.xs[-1])
    values = full_adjoint(tilted, PROBLEM.base, kernel, trajectory, -gradient).values

    def cost(x, first):
        total = 0.0
        for k in range(first, kernel.steps):
            last = kernel.noiseless_last and k == kernel.steps - 1
            v_base = PROBLEM.base(x, kernel.t[k])
            v = v_base if last else tilted(x, kernel.t[k])
            if not last:
                total = (
                    total + 0.5 * (kernel.mean_v[k] / kernel.std[k] * (v - v_base)).square().sum()
                )
            x = kernel.mean_x[k] * x + kernel.mean_v[k] * v + kernel.std[k] * trajectory.noise[k]
        return total - curved(x).sum()

    for k in range(kernel.steps):
        x = trajectory.xs[k].clone().requires_grad_(True)
        (a,) = torch.autograd.grad(cost(x, k), x)
        torch.testing.assert_close(values[k] * kernel.adjoint_scale[k], a, rtol=1e-9, atol=1e-11)


def test_full_covariance_needs_the_noise():
    kernel = kernel_for("covariance_matched")
    xs = trajectory_of(kernel).xs
    with pytest.raises(ValueError, match="noise of the trajectory is needed"):
        lean_adjoint(PROBLEM.base, kernel, xs, xs[-1])


@pytest.mark.parametrize("name", ["euler_published", "covariance_matched"])
def test_full_adjoint_refuses_chains_it_does_not_fit(name):
    kernel = kernel_for(name)
    trajectory = trajectory_of(kernel)
    with pytest.raises(ValueError, match="not defined"):
        full_adjoint(PROBLEM.base, PROBLEM.base, kernel, trajectory, trajectory.xs[-1])


def test_mean_of_the_adjoint_is_the_gradient_of_the_value_function():
    """E_{p*}[c_t | X_t = x] (1-t) = v_β - v*, here without any spread of c."""
    base, tilted = gaussian(), gaussian(M + LAMBDA * S2)
    kernel = make_kernel("ancestral", grids.uniform(10))
    xs = trajectory_of(make_kernel("ancestral", grids.uniform(10))).xs[:, :, :1]
    terminal = torch.full((4, 1), -LAMBDA, dtype=torch.float64)
    c = lean_adjoint(base, kernel, xs, terminal).values
    for k in range(1, 10):
        t = kernel.t[k]
        target = base(xs[k], t) - (1 - t) * c[k]
        torch.testing.assert_close(target, tilted(xs[k], t), rtol=0, atol=1e-12)


def test_velocity_along_repeats_times_and_conditions():
    seen = {}

    def field(x, t, cond=None):
        seen.update(t=t, c=cond["c"])
        return x * t[:, None] + cond["c"]

    xs, c = torch.randn(3, 4, 2), torch.randn(4, 2)
    t = torch.tensor([0.1, 0.2, 0.7])
    found = velocity_along(field, xs, t, {"c": c})
    torch.testing.assert_close(found, xs * t[:, None, None] + c)
    assert seen["t"].shape == (12,)


def test_running_costs_do_not_depend_on_the_variable_of_the_kernel():
    """a_k = c_k · scale: one running cost, the same adjoint a in both variables."""
    pair, own = kernel_for("ancestral_pair"), kernel_for("ancestral")
    xs = trajectory_of(pair).xs
    terminal = torch.randn(4, 2, dtype=torch.float64)
    running = torch.randn(pair.steps, 4, 2, dtype=torch.float64)
    a = lean_adjoint(PROBLEM.base, pair, xs, terminal, running=running).values
    c = lean_adjoint(PROBLEM.base, own, xs, terminal, running=running).values
    scale = own.adjoint_scale.reshape(-1, 1, 1)
    torch.testing.assert_close((c * scale)[1:], a[1:], rtol=1e-11, atol=1e-12)
