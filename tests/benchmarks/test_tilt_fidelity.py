"""The metrics of the fidelity benchmark are exact, and the exact tilt scores as exact."""

import json
import re
import statistics
from pathlib import Path

import pytest
import torch

from benchmarks.common.problems import grid_velocity, make_problem, names
from benchmarks.tilt_fidelity import FidelityConfig, flow_samples, measure, pending, velocity_error


def test_grid_velocity_is_the_closed_form_where_there_is_one():
    from applications.toy2d.exact_tilt import grid_tilt
    from applications.toy2d.rewards import make_reward
    from applications.toy2d.targets import find_target

    target = find_target("grid")
    reward = make_reward("quadratic", target)
    closed, log_z = target.mixture.tilt(*reward.quadratic_form)
    tilt = grid_tilt(target.mixture.log_prob, reward, 5.0, 100)
    assert tilt.log_z == pytest.approx(float(log_z), abs=1e-6)
    x = closed.marginal(0.7).sample(500, generator=torch.Generator().manual_seed(0))
    found = grid_velocity(tilt)(x.float(), torch.tensor(0.7))
    torch.testing.assert_close(found.double(), closed(x, 0.7), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["ring/peaks", "mixture-8d"])
@pytest.mark.slow
def test_the_exact_tilt_has_no_error_and_the_base_has_error_one(name):
    problem = make_problem(name)
    assert velocity_error(problem, problem.velocity, n=256) == 0.0
    assert velocity_error(problem, problem.base, n=256) == pytest.approx(1.0)


def test_samples_of_the_exact_velocity_have_the_exact_frequencies():
    problem = make_problem("mixture-2d")
    x = flow_samples(problem.velocity, 2, 20_000)
    nearest = torch.cdist(x, problem.modes).argmin(1)
    found = nearest.bincount(minlength=len(problem.modes)) / len(x)
    torch.testing.assert_close(found.double(), problem.frequencies, rtol=0, atol=0.012)


@pytest.mark.slow
def test_a_row_is_flat_and_is_not_run_twice(tmp_path):
    config = FidelityConfig(
        problems=("two_gaussians/linear",),
        kernels=("moment_matched", "euler_published"),
        steps=(5,),
        iterations=2,
        batch_size=16,
    )
    row = measure("two_gaussians/linear", "moment_matched", 5, config)
    assert all(isinstance(value, str | int | float) for value in row.values())
    assert 0.5 < row["velocity_error"] < 1.1
    assert pending(config, [row]) == [("two_gaussians/linear", "euler_published", 5)]
    everything = pending(FidelityConfig(kernels=("covariance_matched_refined",), steps=(10,)), [])
    assert [name for name, _, _ in everything] == [n for n in names() if n != "mixture-32d"]
    assert len(names()) >= 15


METRICS = ("velocity_error", "mode_tv", "w2_ratio", "log_weight_std", "ess")
ROW = re.compile(r"^\| `(\w+)` \| (\d+) \| (?:(\d+) × (\d+) \| [^|]+ \| )?(\d[^|]* / .*) \|$", re.M)


def test_the_readme_quotes_the_record():
    root = Path(__file__).parents[2]
    record = json.loads((root / "benchmarks" / "results" / "tilt_fidelity.json").read_text())
    quoted = ROW.findall((root / "README.md").read_text(encoding="utf-8"))
    assert len(quoted) == 18 + 6
    for kernel, steps, iterations, batch, numbers in quoted:
        wanted = (kernel, int(steps), int(iterations or 700), int(batch or 128))
        names = ("kernel", "steps", "iterations", "batch_size")
        rows = [row for row in record if tuple(row[name] for name in names) == wanted]
        for metric, cell in zip(METRICS, numbers.split(" | "), strict=False):
            values = [row[metric] for row in rows]
            found = statistics.median(values), (min if metric == "ess" else max)(values)
            digits = 3 if metric in METRICS[:2] else 2
            assert cell == " / ".join(f"{value:.{digits}f}" for value in found), (wanted, metric)
