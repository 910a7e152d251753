"""Fixed points: pins, the Gaussian case, and the regression they claim to solve, by simulation."""

import json

import numpy as np
import pytest
import torch

from adjoint.certificate import path_log_ratio
from adjoint.chain.adjoints import lean_adjoint
from adjoint.chain.conditional_covariance import ConditionalNoise
from adjoint.chain.rollout import draw_noise, rollout
from benchmarks import fixed_points
from benchmarks.fixed_points import (
    PROBLEMS,
    STATES,
    Args,
    Problem,
    fixed_point,
    kernel_for,
    main,
    mixture,
    scheme_error,
    velocity_error,
)
from flows.grid import uniform

GAUSSIAN = Problem(mixture([0.5], [0.49]), 1.0)


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
    for name, problem in PROBLEMS.items():
        exact = problem.exact()
        x = torch.from_numpy(STATES)[:, None]
        reward = problem.b * x[:, 0] - 0.5 * problem.kappa * x[:, 0] ** 2
        mass = (problem.base.log_prob(x) + reward).exp() * (STATES[1] - STATES[0])
        found = (exact.mean(), exact.covariance(), mass.sum().log())
        assert [round(float(f), 4) for f in found] == list(known[name])


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
    monkeypatch.setattr(fixed_points, "PROBLEMS", {"G": GAUSSIAN})
    out = tmp_path / "results" / "rows.json"
    main(Args(steps=(3,), schemes=("ancestral_weighted",), output=out))
    (row,) = json.loads(out.read_text())
    assert row.pop("velocity_error") < 0.02
    assert row == {"problem": "G", "scheme": "ancestral_weighted", "steps": 3}
    assert "ancestral_weighted" in capsys.readouterr().out


def test_full_covariance_is_nearly_exact_with_weights_and_needs_the_pull_of_its_noise(monkeypatch):
    """B at K = 10: .0002; without the derivative of the noise .006, worse than a scalar noise."""
    assert scheme_error(PROBLEMS["B"], "covariance_matched_weighted", 10) < 5e-4
    monkeypatch.setattr(
        ConditionalNoise, "pull", lambda self, base, k, x, *rest: torch.zeros_like(x)
    )
    assert scheme_error(PROBLEMS["B"], "covariance_matched_weighted", 10) > 3e-3
