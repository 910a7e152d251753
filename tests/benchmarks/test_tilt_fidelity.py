"""The metrics of the fidelity benchmark are exact, and the exact tilt scores as exact."""

import json
import re
import statistics
import warnings
from pathlib import Path

import pytest
import torch

from adjoint import TiltConfig, tilt
from benchmarks.common.problems import grid_velocity, hard_names, make_problem, names
from benchmarks.tilt_fidelity import default_call
from benchmarks.tilt_fidelity.config import FidelityConfig
from benchmarks.tilt_fidelity.kernels import measure, pending
from benchmarks.tilt_fidelity.metrics import flow_samples, mode_tv, velocity_error
from benchmarks.tilt_fidelity.peers import PEERS
from benchmarks.tilt_fidelity.table import AIMS, table
from flows import MLPVelocity, Residual, frozen


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


def test_a_hundred_steps_sample_narrow_modes_with_their_weights():
    for name in ("narrow_two/linear", "narrower_two/linear", "rare_1e-3/linear"):
        problem = make_problem(name)
        assert mode_tv(problem, flow_samples(problem.velocity, 1, 20_000, 100)) < 0.01


def tiny(problem, method, seed, evaluations):
    """A tilt in two updates."""
    options = TiltConfig(
        iterations=2, batch_size=8, steps=4, base_samples=64, certificate_samples=64, seed=seed
    )
    return tilt(problem.base, problem.reward, shape=(problem.dim,), config=options)


@pytest.mark.slow
def test_a_row_of_the_default_call_is_flat(monkeypatch):
    monkeypatch.setattr(default_call, "run", tiny)
    monkeypatch.setattr(default_call, "SAMPLES", 10_000)
    monkeypatch.setattr(default_call, "ENTRIES", 10_000)
    row = default_call.measure("narrow_two/linear", "default", 3)
    assert all(isinstance(value, str | int | float) for value in row.values())
    assert row["failure"] == ""
    assert (row["dim"], row["seed"], row["iterations"]) == (1, 3, 2)
    assert row["mode_tv"] == pytest.approx(0.381, abs=0.05)  # the base has one half on each side
    assert 0.5 < row["velocity_error"] < 1.1
    assert row["log_z_exact"] == make_problem("narrow_two/linear").log_z
    for estimate, error in (("log_z", "log_z_error"), ("log_z_ode", "log_z_ode_error")):
        assert 0 < abs(row[estimate] - row["log_z_exact"]) / row[error] < 0.5
    assert row["evaluations"] > 64 * 100  # base samples by ODE, and more


def test_states_are_counted_in_copies_and_inside_models():
    base = make_problem("mixture-2d").base
    count = default_call.count_evaluations(base)
    t = torch.tensor(0.5)
    base(torch.zeros(3, 2), t)
    assert count() == 3
    model = Residual(frozen(base), MLPVelocity(2))
    model(torch.zeros(5, 2), t)
    assert count() == 8
    model(torch.zeros(4, 6, 2), torch.rand(4, 1))
    assert count() == 32


def test_a_call_that_stops_is_a_row_that_says_why(monkeypatch):
    def run(problem, method, seed, evaluations):
        warnings.warn("far reward", stacklevel=1)
        raise ValueError("too far")

    monkeypatch.setattr(default_call, "run", run)
    row = default_call.measure("narrow_two/linear", "default", 0)
    assert row["failure"] == "ValueError: too far"
    assert row["warnings"] == 1
    assert "narrow_two/linear, seed 0: ValueError: too far" in table([row])
    assert "0 of 1 problems meet every aim" in table([row])


def test_the_default_call_is_given_nothing_but_the_seed(monkeypatch):
    given = {}
    monkeypatch.setattr(default_call, "tilt", lambda *args, **options: given.update(options))
    default_call.run(make_problem("narrow_two/linear"), "default", 5, 0)
    assert given == {"shape": (1,), "config": TiltConfig(seed=5)}


def serially(run, jobs, *, workers, name):
    """Run jobs here, with rows of a measurement that only notes its arguments."""
    for problem, method, seed, evaluations in jobs:
        given = {"problem": problem, "method": method, "seed": seed, "dim": 1}
        yield given | {"evaluations": evaluations or 1000 + seed}


def test_peers_get_the_evaluations_of_the_call_and_nothing_runs_twice(monkeypatch, tmp_path):
    monkeypatch.setattr(default_call, "completed", serially)
    options = {"default": True, "problems": ("ring/linear",), "output": tmp_path / "rows.json"}
    first = default_call.measure_default(FidelityConfig(**options, seeds=(0, 1)))
    assert [(row["method"], row["seed"]) for row in first] == [("default", 0), ("default", 1)]
    second = default_call.measure_default(FidelityConfig(**options, seeds=(1, 2), peers=True))
    assert len(second) == 3 + 2 * len(PEERS)
    assert second == json.loads((tmp_path / "rows.json").read_text())
    assert all(row["evaluations"] == 1000 + row["seed"] for row in second)


def test_jobs_of_the_default_call():
    everything = default_call.jobs(FidelityConfig(default=True))
    assert len(everything) == 3 * len({*names(), *hard_names()}) == 75
    with_peers = default_call.jobs(FidelityConfig(random=7, count=3, peers=True))
    assert with_peers[:3] == [(f"random-7-{i}", "default", 0) for i in range(3)]
    assert len(with_peers) == 3 * (1 + len(PEERS))


def test_rows_of_problems_at_random_are_written_only_where_asked(tmp_path):
    folder = FidelityConfig().output.parent
    assert FidelityConfig().record == folder / "tilt_fidelity.json"
    assert FidelityConfig(default=True).record == folder / "tilt_default.json"
    assert FidelityConfig(random=1).record is None
    assert FidelityConfig(random=1, output=tmp_path / "rows.json").record == tmp_path / "rows.json"
    for options in ({"random": 1, "default": True}, {"random": 1, "problems": ("ring/linear",)}):
        with pytest.raises(ValueError, match="draws its own problems"):
            FidelityConfig(**options)
    with pytest.raises(ValueError, match="peers must be False"):
        FidelityConfig(peers=True)


def test_the_table_marks_what_misses_the_aims():
    good = {name: 0.3 * aim for name, aim in AIMS.items()} | {"log_weight_std": 0.1, "ess": 0.9}
    named = {"problem": "ring/linear", "method": "default", "dim": 2, "failure": ""}
    rows = [good | named | {"seed": seed} for seed in range(2)]
    assert "*" not in table(rows)
    assert "1 of 1 problems meet every aim" in table(rows)
    assert "0.006 / 0.006" in table(rows)
    assert "median velocity error 0.015 (aim" in table(rows)
    assert "median velocity error 0.025*" in table([rows[0] | {"velocity_error": 0.025}])
    for name, aim in AIMS.items():
        for value in (1.1 * aim, None):
            bad = [rows[0], rows[1] | {name: value}]
            lines = table(bad).splitlines()
            assert lines[1].count("*") == 1, name
            assert lines[2].startswith("median / worst")
            assert "0 of 1 problems meet every aim" in lines[3]


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
