"""Peers of the fidelity benchmark: adjoint sampling is derived rightly, and gets as much work.

The derivation is tested in one dimension.  With ends of the exact tilt, the conditional mean of
the lean adjoint under the noising chain is known by quadrature,

    C_k(x) = A_k(x) E*[C_{k+1}(X_{k+1}) | X_k = x],    A_k = adjoint_x + adjoint_v ∂v_β/∂x,

since the adjoint is multiplied by a function of x_k in each step.  v_β - (1-t) C_k must approach v*
as the grid becomes finer.
"""

from dataclasses import replace

import pytest
import torch

from adjoint import lean_adjoint
from adjoint.arguments import check_arguments
from benchmarks.common.problems import make_problem
from benchmarks.fixed_points.problems import PROBLEMS, kernel_for
from benchmarks.tilt_fidelity import default_call, peers
from benchmarks.tilt_fidelity.peers import PEERS, AdjointSamplingLoss, noised
from flows import uniform, velocity_and_vjp

STATES = torch.linspace(-4, 4, 801, dtype=torch.float64)
CELL = float(STATES[1] - STATES[0])


def conditional_adjoints(problem, kernel):
    """E*[c_k | X_k = x] at the states, (K, N), by quadrature."""
    exact, x, grid = problem.exact(), STATES[:, None], kernel.t
    c, found = -(problem.b - problem.kappa * STATES), []
    for k in reversed(range(kernel.steps)):
        t, s = grid[k], grid[k + 1]
        mean, variance = t / s * STATES, (1 - t) ** 2 - (t / s * (1 - s)) ** 2
        log_p = exact.log_prob(x, s) - 0.5 * (x - mean).square() / variance  # of X_{k+1} given x
        slope = velocity_and_vjp(problem.base, x, kernel.adjoint_t[k], torch.ones_like(x))[1][:, 0]
        c = (kernel.adjoint_x[k] + kernel.adjoint_v[k] * slope) * (log_p.softmax(1) @ c)
        found.append(c)
    return torch.stack(found[::-1])


def error_of_the_reading(problem, kernel):
    """The relative velocity error of v_β - (1-t) C_k, the mean over five times."""
    adjoints, exact, x = conditional_adjoints(problem, kernel), problem.exact(), STATES[:, None]
    errors = []
    for time in (0.1, 0.3, 0.5, 0.7, 0.9):
        k = round(time * kernel.steps)
        t = kernel.t[k]
        base, best, p = problem.base(x, t)[:, 0], exact(x, t)[:, 0], exact.log_prob(x, t).exp()
        wrong = base - (1 - t) * adjoints[k] - best
        errors.append(float((p * wrong**2).sum() / (p * (base - best) ** 2).sum()))
    return sum(errors) / len(errors)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_exact_ends_give_the_optimal_velocity_as_the_grid_becomes_finer(name):
    problem = PROBLEMS[name]
    coarse, fine = (
        error_of_the_reading(problem, kernel_for(problem.base, "ancestral", steps))
        for steps in (40, 160)
    )
    assert fine < 0.025
    assert fine < 0.25 * coarse


@pytest.mark.slow
def test_adjoints_of_noised_ends_have_the_conditional_mean_of_the_quadrature():
    problem, g = PROBLEMS["B"], torch.Generator().manual_seed(0)
    kernel = kernel_for(problem.base, "ancestral", 20)
    ends = problem.exact().sample(100_000, generator=g)
    xs = noised(ends, kernel.t, g)
    terminal = -torch.full_like(ends, problem.b)
    c = lean_adjoint(problem.base, kernel, xs, terminal).values[..., 0]
    adjoints = conditional_adjoints(problem, kernel)
    for k in (1, 10, 18):
        x = xs[k, :, 0]
        place = ((x - STATES[0]) / CELL).clamp(0, len(STATES) - 2)
        low = place.floor().long()
        expected = torch.lerp(adjoints[k][low], adjoints[k][low + 1], place - low)
        for function in (torch.ones_like(x), x, (3 * x).cos()):
            difference = (c[k] - expected) * function
            error = difference.std() / len(x) ** 0.5
            assert abs(float(difference.mean())) < 4.5 * float(error), k


def test_noised_states_are_the_noising_chain():
    ends = torch.full((100_000, 1), 1.5, dtype=torch.float64)
    grid = uniform(4)
    xs = noised(ends, grid, torch.Generator().manual_seed(0))
    assert xs.shape == (5, 100_000, 1)
    assert torch.equal(xs[-1], ends)
    for k, t in enumerate(grid[:-1].tolist()):
        assert float(xs[k].mean()) == pytest.approx(1.5 * t, abs=0.015)
        assert float(xs[k].std()) == pytest.approx(1 - t, rel=0.01)
    for k, (t, s) in enumerate(zip(grid[:-2].tolist(), grid[1:-1].tolist(), strict=True)):
        joint = torch.cov(torch.stack([xs[k, :, 0], xs[k + 1, :, 0]]))[0, 1]
        assert float(joint) == pytest.approx(t / s * (1 - s) ** 2, abs=0.01)


def test_adjoint_sampling_reuses_ends():
    problem = make_problem("mixture-2d")
    count = default_call.count_evaluations(problem.base)
    arguments = check_arguments(
        problem.base,
        problem.reward,
        shape=(2,),
        config=peers.SAMPLING,
        model=None,
        cond_sampler=None,
        callbacks=(),
        checkpoint=None,
        resume=False,
        device=None,
        dtype=torch.float32,
    )
    kernel = kernel_for(make_problem("mixture-2d").base.double(), "ancestral", 4)
    loss, g = AdjointSamplingLoss(arguments, kernel), torch.Generator().manual_seed(0)
    before = count()
    for _ in range(2 * peers.REUSE):
        value, _ = loss(problem.base, g)
        assert bool(value.isfinite())
    assert len(loss.ends) == 2
    # Two rollouts, and in each loss products of the base, the base at t = 0, and the model.
    states = 2 * 4 + 2 * peers.REUSE * (4 + 1 + 4)
    assert count() - before == peers.SAMPLING.batch_size * states
    loss.ends = loss.ends * peers.CAPACITY
    loss(problem.base, g)
    assert len(loss.ends) == peers.CAPACITY


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_peers_take_as_many_evaluations_as_they_are_given(name, monkeypatch):
    given = 1_500_000
    few = replace(peers.SAMPLING, base_samples=1024, certificate_samples=256)
    monkeypatch.setattr(peers, "SAMPLING", few)
    monkeypatch.setattr(
        default_call, "comparison", lambda _, result: {"iterations": result.config.iterations}
    )
    row = default_call.measure("narrow_two/linear", name, 0, given)
    assert row["failure"] == ""
    assert row["iterations"] > 10
    assert row["evaluations"] == pytest.approx(given, rel=0.02)
