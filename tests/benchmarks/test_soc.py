"""Control problems: their reference solutions against independent ones, and that training works."""

import json
import math

import numpy as np
import pytest
import torch

from adjoint.chain.adjoints import lean_adjoint
from adjoint.chain.rollout import draw_noise, rollout
from benchmarks.soc.__main__ import Args, ControlLoss, control_error, euler_maruyama, main, solve
from benchmarks.soc.problems import (
    PROBLEMS,
    double_well,
    linear_ou,
    log_psi_gradient,
    quadratic_ou,
    riccati,
)
from flows.grid import uniform

pytestmark = pytest.mark.usefixtures("one_thread")


def scalar_riccati(a: float, p: float, q: float, t: float) -> float:
    """Closed form: dF/dt = 2(F - F₊)(F - F₋), so (F - F₊)/(F - F₋) is an exponential of time."""
    root = math.sqrt(a**2 + 2 * p)
    high, low = (a + root) / 2, (a - root) / 2
    ratio = (q - high) / (q - low) * math.exp(2 * (high - low) * (t - 1))
    return (high - low * ratio) / (1 - ratio)


@pytest.mark.parametrize(("a", "p", "q"), [(0.2, 0.2, 0.1), (1.0, 1.0, 0.5), (-1.0, 0.3, 2.0)])
def test_riccati_is_the_closed_form_of_a_scalar_problem(a, p, q):
    eye = torch.eye(2)
    F = riccati(a * eye, p * eye, q * eye)
    for t in (0.0, 0.35, 0.8, 1.0):
        expected = scalar_riccati(a, p, q, t) * eye.double()
        torch.testing.assert_close(F(t), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_riccati_of_matrices_is_the_limit_of_dynamic_programming():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3, 3, generator=generator).double()
    P, Q = torch.diag(torch.tensor([1.0, 0.2, 0.5])).double(), torch.eye(3).double()
    steps, S = 20_000, Q
    h, eye = 1 / steps, torch.eye(3).double()
    for _ in range(steps):  # minimise h‖u‖²/2 + (x + h(Ax + u))ᵀ S (x + h(Ax + u)) over u
        M = eye + h * A
        gain = torch.linalg.solve(eye + 2 * h * S, 2 * S @ M)
        closed = M - h * gain
        S = h * P + 0.5 * h * gain.T @ gain + closed.T @ S @ closed
    torch.testing.assert_close(riccati(A, P, Q)(0.0), S, rtol=2e-3, atol=2e-3)


def test_finite_differences_solve_the_quadratic_case():
    """On b = ax, g = qx² the control of the equation for ψ is that of the Riccati equation."""
    x, u = log_psi_gradient(lambda x: -0.5 * x, lambda x: 0.7 * x**2, half_width=6.0)
    inside = np.abs(x) < 2
    for t in (0.0, 0.5, 0.9, 1.0):
        expected = -2 * scalar_riccati(-0.5, 0.0, 0.7, t) * x
        np.testing.assert_allclose(u[round(1000 * t)][inside], expected[inside], atol=1e-3)


@pytest.mark.parametrize(("dimension", "kappa", "nu"), [(0, 5.0, 3.0), (9, 1.0, 1.0)])
@pytest.mark.slow
def test_well_control_is_the_gradient_of_a_simulated_log_psi(dimension, kappa, nu):
    """Feynman-Kac: ψ(x, t) = E[e^{-g(X_1)} | X_t = x], differentiated along the paths."""
    problem, n, steps, t = double_well(), 20_000, 300, 0.9
    h = (1 - t) / steps
    generator = torch.Generator().manual_seed(0)
    for start in (-1.15, 0.3, 0.9):
        x = torch.full((n,), start, dtype=torch.float64)
        slope = torch.ones_like(x)
        for _ in range(steps):
            noise = torch.randn(n, generator=generator, dtype=torch.float64)
            slope = slope * (1 - 4 * kappa * h * (3 * x**2 - 1))
            x = x - 4 * kappa * h * x * (x**2 - 1) + math.sqrt(h) * noise
        weight = torch.exp(-nu * (x**2 - 1) ** 2)
        terms = -4 * nu * x * (x**2 - 1) * slope * weight / weight.mean()
        state = torch.full((1, 10), start)
        found = problem.control(state, t)[0, dimension].item()
        stderr = float(terms.std() / n**0.5)
        assert found == pytest.approx(float(terms.mean()), abs=4 * stderr + 0.01)


def test_well_drift_is_minus_the_gradient_of_its_potential():
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    kappa = torch.tensor([5.0] * 3 + [1.0] * 7)
    (slope,) = torch.autograd.grad((kappa * (x**2 - 1) ** 2).sum(), x)
    torch.testing.assert_close(double_well().drift(x.detach(), torch.tensor(0.0)), -slope)


def test_well_control_at_the_ends_of_time_and_of_the_table():
    problem = double_well()
    x = torch.linspace(-1.5, 1.5, 7)[:, None].expand(-1, 10)
    nu = torch.tensor([3.0] * 3 + [1.0] * 7)
    torch.testing.assert_close(
        problem.control(x, 1.0), -4 * nu * x * (x**2 - 1), rtol=1e-3, atol=1e-3
    )
    assert problem.control(torch.full((2, 10), 9.0), 0.5).isfinite().all()


def test_lean_adjoint_of_the_linear_problem_is_exact_and_deterministic():
    problem = linear_ou()
    b = problem.drift(torch.eye(10, dtype=torch.float64), torch.tensor(0.0)).T  # the matrix of b
    x = torch.zeros(1, 10, dtype=torch.float64)
    slope = -problem.control(x, 1.0)[0]  # ∇g
    errors = []
    for steps in (50, 100):
        kernel = euler_maruyama(uniform(steps))
        xs = torch.randn(steps + 1, 3, 10, dtype=torch.float64)  # any states do
        values = lean_adjoint(problem.drift, kernel, xs, slope.expand(3, -1)).values
        power = torch.linalg.matrix_power(torch.eye(10).double() + b / steps, steps).T
        torch.testing.assert_close(values[0], (power @ slope).expand(3, -1), rtol=0, atol=1e-12)
        errors.append((values[0, 0] + problem.control(x, 0.0)[0]).norm())
    assert errors[1] / slope.norm() < 0.01
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.1)  # first order, to -u*(t=0)


def test_running_cost_enters_the_adjoint_as_the_gradient_of_the_cost_along_the_chain():
    problem = quadratic_ou("ou", 0.5, 0.8, 0.4, dim=3)
    kernel = euler_maruyama(torch.tensor([0.0, 0.3, 0.55, 0.8, 1.0], dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    noise = draw_noise(kernel, x0, generator=generator)
    xs = rollout(problem.drift, problem.drift, kernel, x0, noise).xs
    start = x0.clone().requires_grad_(True)
    x, cost = start, 0.0
    for k in range(kernel.steps):
        h = kernel.mean_v[k]
        cost = cost + h * problem.running(x, None).sum()
        x = x + h * problem.drift(x, kernel.t[k]) + h.sqrt() * noise[k]
    (expected,) = torch.autograd.grad(cost + problem.terminal(x, None).sum(), start)
    running = kernel.mean_v.reshape(-1, 1, 1) * 2 * 0.8 * xs[:-1]
    values = lean_adjoint(problem.drift, kernel, xs, 0.8 * xs[-1], running=running).values
    torch.testing.assert_close(values[0], expected, rtol=1e-6, atol=1e-8)


class Perturbed(torch.nn.Module):
    """b + factor u* + shift + scale x, with shift = scale = 0 to differentiate in."""

    def __init__(self, problem, factor: float) -> None:
        super().__init__()
        self.problem, self.factor = problem, factor
        self.directions = torch.nn.Parameter(torch.zeros(2, problem.dim))

    def forward(self, x, t, cond=None):
        parts = zip(x.split(len(x) // max(1, len(t.unique()))), t.unique(), strict=True)
        u = torch.cat([self.problem.control(part, float(time)) for part, time in parts])
        return (
            self.problem.drift(x, t) + self.factor * u + self.directions[0] + self.directions[1] * x
        )


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.slow
def test_the_loss_is_stationary_at_the_reference_control(name):
    """Up to noise and O(h), in the directions of a constant and of a linear feedback."""
    problem = PROBLEMS[name]()
    kernel = euler_maruyama(1 - (1 - uniform(100)) ** 1.5)
    noisy = name == "double_well"  # adjoints of paths that leave the saddle late are large
    loss = ControlLoss(problem, kernel, batch_size=8000 if noisy else 2000, fraction=1.0)
    norms = []
    for factor in (1.0, 0.0):
        module = Perturbed(problem, factor)
        value, _ = loss(module, torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad(value, module.directions)
        norms.append(float(gradient.norm()))
    assert norms[0] < (0.5 if noisy else 0.1) * norms[1]


def test_control_error_of_the_optimum_and_of_no_control():
    problem = linear_ou()
    kernel = euler_maruyama(uniform(10))

    def optimal(x, t, cond=None):
        return problem.drift(x, t) + problem.control(x, float(t))

    assert control_error(problem, kernel, optimal, n=8)[0] == pytest.approx(0.0, abs=1e-10)
    error, size = control_error(problem, kernel, problem.drift, n=8)
    assert error == pytest.approx(size)
    x = torch.zeros(1, 10)
    exact = sum(0.1 * problem.control(x, k / 10).square().sum().item() for k in range(10))
    assert size == pytest.approx(exact, rel=1e-5)


@pytest.mark.slow
def test_a_short_training_solves_the_linear_problem(tmp_path, capsys):
    out = tmp_path / "results" / "soc.json"
    main(Args(problems=("ou_linear",), steps=20, iterations=120, batch_size=64, output=out))
    (row,) = json.loads(out.read_text())
    assert list(row) == [
        "problem",
        "dim",
        "steps",
        "iterations",
        "control_error",
        "control_error_relative",
        "control_error_start",
        "seconds",
    ]
    assert row["control_error"] < 0.02 * row["control_error_start"]
    assert row["control_error_relative"] < 0.02
    assert "ou_linear" in capsys.readouterr().out


def test_unknown_problem_is_refused():
    with pytest.raises(ValueError, match="problem must be one of ou_quadratic_easy"):
        solve("ou", Args())
