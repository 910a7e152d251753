"""Fixed points: pins, the Gaussian case, and the regression they claim to solve, by simulation."""

import itertools
import json

import numpy as np
import pytest
import torch

from adjoint.certificate import path_log_ratio
from adjoint.chain.adjoints import lean_adjoint
from adjoint.chain.conditional_covariance import ConditionalNoise
from adjoint.chain.rollout import draw_noise, rollout
from benchmarks.common.records import RESULTS
from benchmarks.fixed_points.__main__ import Args, main, measure, scheme_error
from benchmarks.fixed_points.evaluation import base_chain, mode_weight, velocity_error
from benchmarks.fixed_points.log_variance import log_variance_optimum
from benchmarks.fixed_points.problems import PROBLEMS, Problem, base_step, kernel_for, mixture
from benchmarks.fixed_points.regression import fixed_point
from flows.grid import uniform

GAUSSIAN = Problem(mixture([0.5], [0.49]), 1.0)
STATES = GAUSSIAN.states
INNER = np.abs(STATES) < 6  # beyond, functions are continued by straight lines


pytestmark = pytest.mark.usefixtures("one_thread")


# Found independently, with the same definition, when the schemes were designed.
@pytest.mark.parametrize(
    ("scheme", "problem", "known"),
    [
        ("euler_published", "C", 0.326),
        ("ancestral_pair", "B", 0.334),
        ("moment_matched", "A", 0.016),
        ("moment_matched_weighted", "A", 0.019),
        ("moment_matched_weighted", "B", 0.003),
    ],
)
@pytest.mark.slow
def test_errors_in_ten_steps_are_the_known_ones(scheme, problem, known):
    assert scheme_error(PROBLEMS[problem], scheme, 10) == pytest.approx(known, abs=6e-4)


def test_tilts_of_the_problems_are_the_known_ones():
    known = {
        "A": (1.8173, 1.4701, 0.6387),
        "B": (1.3138, 1.2159, 0.5203),
        "C": (0.7862, 0.5927, -0.7788),
    }
    for name, moments in known.items():
        problem = PROBLEMS[name]
        exact = problem.exact()
        x = torch.from_numpy(STATES)[:, None]
        reward = problem.b * x[:, 0] - 0.5 * problem.kappa * x[:, 0] ** 2
        mass = (problem.base.log_prob(x) + reward).exp() * (STATES[1] - STATES[0])
        found = (exact.mean(), exact.covariance(), mass.sum().log())
        assert [round(float(f), 4) for f in found] == list(moments)


@pytest.mark.parametrize("steps", [3, 7])
@pytest.mark.parametrize("scheme", ["ancestral", "moment_matched", "moment_matched_weighted"])
@pytest.mark.slow
def test_a_gaussian_base_is_exact_at_any_number_of_steps(scheme, steps):
    kernel = kernel_for(GAUSSIAN.base, scheme.removesuffix("_weighted"), steps)
    v, v_base = fixed_point(GAUSSIAN, kernel, weighted=scheme.endswith("_weighted"))
    exact, x = GAUSSIAN.exact(), torch.from_numpy(STATES)[:, None]
    for k in range(1, steps):  # at t = 0 the rule is evaluated at a small time by design
        np.testing.assert_allclose(v[k], exact(x, kernel.t[k])[:, 0], rtol=0, atol=1e-9)
    assert velocity_error(GAUSSIAN, kernel, v, v_base) < 0.07 / steps


@pytest.mark.slow
def test_the_pairs_are_not_exact_on_a_gaussian():
    assert scheme_error(GAUSSIAN, "ancestral_pair", 5) > 0.1
    assert scheme_error(GAUSSIAN, "euler_published", 5) > 0.1


def test_the_base_has_error_one_and_the_exact_velocity_none():
    problem = PROBLEMS["B"]
    kernel = kernel_for(problem.base, "ancestral", 10)
    x = torch.from_numpy(STATES)[:, None]
    base, exact = (
        np.stack([field(x, t)[:, 0].numpy() for t in uniform(10)[:-1]])
        for field in (problem.base, problem.exact())
    )
    assert velocity_error(problem, kernel, base, base) == pytest.approx(1.0)
    assert velocity_error(problem, kernel, exact, base) == pytest.approx(0.0, abs=1e-20)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "name", ["euler_published", "euler_consistent", "ancestral_pair", "moment_matched"]
)
@pytest.mark.slow
def test_the_regression_on_simulated_trajectories_is_solved(name, weighted):
    """The residual of the loss, on the chain of v_θ, has mean zero given the state."""
    problem, steps, n = PROBLEMS["C"], 6, 50_000
    kernel = kernel_for(problem.base, name, steps)
    v, _ = fixed_point(problem, kernel, weighted=weighted)
    rows = {float(t): row for t, row in zip(kernel.t[:-1], v, strict=True)}

    def field(x, t, cond=None):
        return torch.from_numpy(np.interp(x[:, 0].numpy(), STATES, rows[float(t)]))[:, None]

    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    noise = draw_noise(kernel, x0, generator=generator)
    trajectory = rollout(field, problem.base, kernel, x0, noise)
    xs = trajectory.xs
    adjoint = lean_adjoint(problem.base, kernel, xs, problem.kappa * xs[-1] - problem.b)
    reward = problem.b * xs[-1, :, 0] - 0.5 * problem.kappa * xs[-1, :, 0] ** 2
    log_w = reward + path_log_ratio(trajectory, adjoint.v_base, kernel)[0]
    w = torch.softmax(log_w, 0) * n if weighted else torch.ones(n, dtype=torch.float64)
    for k in range(steps):
        lam = adjoint.values[k + 1 if kernel.residual_at_next else k]
        control = field(xs[k], kernel.t[k]) - adjoint.v_base[k]
        residual = (kernel.residual_v[k] * control + kernel.residual_a[k] * lam)[:, 0] * w
        for test in (torch.ones(n), xs[k, :, 0], torch.sin(2 * xs[k, :, 0])):
            moment = residual * test
            stderr = moment.std() / n**0.5
            assert moment.mean().abs() < 4 * stderr + 1e-4, (k, float(moment.mean() / stderr))


def test_rows_are_written_and_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PROBLEMS, "G", GAUSSIAN)
    out = tmp_path / "results" / "rows.json"
    main(Args(problems=("G",), steps=(3,), schemes=("ancestral_weighted",), output=out))
    (row,) = json.loads(out.read_text())
    assert row.pop("velocity_error") < 0.02
    identity = {"problem": "G", "scheme": "ancestral_weighted", "steps": 3}
    assert identity.items() < row.items()
    assert "ancestral_weighted" in capsys.readouterr().out


def test_full_covariance_is_nearly_exact_with_weights_and_needs_the_pull_of_its_noise(monkeypatch):
    """B at K = 10: .0002; without the derivative of the noise .006, worse than a scalar noise."""
    assert scheme_error(PROBLEMS["B"], "covariance_matched_weighted", 10) < 5e-4
    monkeypatch.setattr(
        ConditionalNoise, "pull", lambda self, base, k, x, *rest: torch.zeros_like(x)
    )
    assert scheme_error(PROBLEMS["B"], "covariance_matched_weighted", 10) > 3e-3


@pytest.mark.parametrize("name", ["euler_consistent", "ancestral_pair", "moment_matched"])
def test_on_a_gaussian_the_log_variance_optimum_is_the_exact_tilt_of_the_chain(name):
    """E[x_K | x_k] = a_k x_k + …, so the best shift is b a_{k+1} std² at every state."""
    kernel = kernel_for(GAUSSIAN.base, name, 5)
    v, v_base = log_variance_optimum(GAUSSIAN, kernel)
    gain = 1.0  # ∂ E[x_K | x_{k+1}] / ∂ x_{k+1}
    for k in reversed(range(5)):
        _, mean, std = base_step(GAUSSIAN, kernel, k)
        expected = GAUSSIAN.b * gain * std**2 / float(kernel.mean_v[k])
        np.testing.assert_allclose((v - v_base)[k, INNER], expected[INNER], rtol=0, atol=1e-6)
        gain *= (mean[-1] - mean[0]) / (STATES[-1] - STATES[0])


def test_on_a_gaussian_the_consistent_regression_has_the_log_variance_optimum():
    for name in ("euler_consistent", "ancestral_pair"):
        kernel = kernel_for(GAUSSIAN.base, name, 5)
        best, _ = log_variance_optimum(GAUSSIAN, kernel)
        found = fixed_point(GAUSSIAN, kernel)[0]
        np.testing.assert_allclose(found[:, INNER], best[:, INNER], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["moment_matched", "covariance_matched"])
@pytest.mark.slow
def test_no_other_shifts_cost_less_than_those_of_the_dynamic_program(name):
    """Brute force on B in two steps: the last shift at every state, the first at some."""
    problem, states = PROBLEMS["B"], PROBLEMS["B"].states
    kernel = kernel_for(problem.base, name, 2)
    v, v_base = log_variance_optimum(problem, kernel)
    nodes = np.linspace(-8, 8, 321)
    weights = np.exp(-0.5 * nodes**2)
    weights /= weights.sum()
    shifts = np.linspace(-1.5, 1.5, 3001)
    (_, mean0, std0), (_, mean1, std1) = (base_step(problem, kernel, k) for k in range(2))
    # The last expectation in closed form: the reward of B is linear.
    costs = shifts[:, None] ** 2 / (2 * std1**2) - problem.b * (mean1 + shifts[:, None])
    second, to_go = shifts[costs.argmin(0)], costs.min(0)
    found = (v - v_base)[1] * float(kernel.mean_v[1])
    assert np.abs(found - second)[INNER].max() < 6e-4
    for i in (300, 360, 400):
        ends = (mean0[i] + shifts)[:, None] + std0[i] * nodes
        cost = shifts**2 / (2 * std0[i] ** 2) + np.interp(ends, states, to_go) @ weights
        assert (v - v_base)[0, i] * float(kernel.mean_v[0]) == pytest.approx(
            shifts[cost.argmin()], abs=3e-3
        )


@pytest.mark.parametrize(
    ("scheme", "right"),
    [
        ("moment_matched", 0.725),
        ("moment_matched_log_variance", 0.8567),
        ("covariance_matched_log_variance", 0.8766),
    ],
)
@pytest.mark.slow
def test_mode_weights_of_narrow_modes_apart_are_the_known_ones(scheme, right):
    """Of the exact .8808.  The optima were found independently before (.857 and .8765)."""
    row = measure("D", scheme, 20)
    assert row["exact_mode_weight"] == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-6)
    assert row["mode_weight"] == pytest.approx(right, abs=1e-3)


@pytest.mark.slow
def test_the_log_variance_optimum_tends_to_the_tilt_and_own_time_matching_does_not():
    weights = [
        measure("D", "moment_matched_log_variance", k)["mode_weight"] for k in (5, 10, 20, 40)
    ]
    gaps = [1 / (1 + np.exp(-2)) - w for w in weights]
    assert all(0 < b < 0.65 * a for a, b in itertools.pairwise(gaps))
    assert measure("D", "moment_matched", 40)["mode_weight"] < 0.76


@pytest.mark.slow
def test_the_mode_weight_is_exact_for_the_exact_velocity_and_the_base():
    problem = PROBLEMS["D"]
    kernel = kernel_for(problem.base, "ancestral", 100)
    x = torch.from_numpy(problem.states)[:, None]
    base, exact = (
        np.stack([field(x, t)[:, 0].numpy() for t in kernel.t[:-1]])
        for field in (problem.base, problem.exact())
    )
    assert mode_weight(problem, kernel, base, base) == pytest.approx(0.5, abs=1e-9)
    right = problem.exact_mode_weight()
    assert mode_weight(problem, kernel, exact, base) == pytest.approx(right, abs=1e-3)


@pytest.mark.parametrize("name", ["ancestral_pair", "moment_matched", "covariance_matched"])
def test_the_base_chain_under_the_tilt_is_that_of_simulated_trajectories(name):
    problem, n = PROBLEMS["A"], 200_000
    kernel = kernel_for(problem.base, name, 6)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    noise = draw_noise(kernel, x0, generator=generator)
    ends = rollout(problem.base, problem.base, kernel, x0, noise).xs[-1, :, 0]
    w = problem.reward(ends).exp()
    log_z, weight = base_chain(problem, kernel)
    assert float(w.mean().log()) == pytest.approx(log_z, abs=0.01)
    right = (ends > problem.between).double()
    assert float((w * right).sum() / w.sum()) == pytest.approx(weight, abs=0.005)


def test_the_record_has_every_problem_scheme_and_number_of_steps():
    rows = json.loads((RESULTS / "fixed_points.json").read_text(encoding="utf-8"))
    found = [(row["problem"], row["scheme"], row["steps"]) for row in rows]
    assert found == [
        (name, scheme, steps)
        for name, problem in PROBLEMS.items()
        for scheme in Args().schemes
        for steps in problem.steps
    ]
    best = {
        (row["scheme"], row["steps"]): row["mode_weight"] for row in rows if row["problem"] == "D"
    }
    for kernel in ("moment_matched", "covariance_matched"):
        ours = [best[f"{kernel}_log_variance", steps] for steps in (10, 20, 40, 80)]
        assert ours == sorted(ours)
