"""The learning benchmark: every run is told apart, and its rows are those of the evaluations."""

import csv
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("ogbench")

from benchmarks.rl import __main__ as rl
from benchmarks.rl import cost, figure, runs
from benchmarks.rl.experiments import experiments

torch.set_num_threads(1)
COLUMNS = "task agent seed step phase success episodes hours device preset"


def test_no_two_experiments_share_a_row_or_a_folder():
    found = experiments()
    compared = [e for e in found if e.suite == "agents"]  # have a record of their own
    for some in (compared, [e for e in found if e not in compared]):
        assert len({(e.task, e.agent, e.preset) for e in some}) == len(some)
    assert len({e.folder for e in found}) == len(found)
    assert {e.suite for e in found} == {*runs.BenchmarkConfig().suites, "agents"}


def test_options_of_an_experiment_reach_the_agent(tmp_path):
    config = runs.BenchmarkConfig(folder=tmp_path)
    for experiment in experiments():
        options = runs.train_config(config, experiment, [1]).options
        for name, value in experiment.options.items():
            assert getattr(options, name) == value


@pytest.mark.slow
def test_rows_are_flat_and_kept(tmp_path, monkeypatch):
    tiny = replace(
        experiments()[0], offline=4, transitions=4000, eval_every=2, episodes=1, agent="bc"
    )
    monkeypatch.setattr(runs, "experiments", lambda: [tiny])
    config = runs.BenchmarkConfig(
        suites=("pointmaze",),
        seeds=(3,),
        workers=1,
        folder=tmp_path,
        output=tmp_path / "rl.json",
    )
    runs.make_data(config, tiny)
    rows = runs.run(config, tiny, [3])
    assert [row["step"] for row in rows] == [2, 4]
    assert all(" ".join(row) == COLUMNS for row in rows)
    folder = tmp_path / tiny.folder / "seed3"
    with (folder / "evaluation.csv").open(newline="") as file:
        assert [float(r["success"]) for r in csv.DictReader(file)] == [r["success"] for r in rows]
    (tmp_path / "rl.json").write_text(json.dumps(rows))
    before = (folder / "checkpoint.pt").stat().st_mtime_ns
    rl.main(config)  # nothing is left to run
    assert json.loads((tmp_path / "rl.json").read_text()) == rows
    assert (folder / "checkpoint.pt").stat().st_mtime_ns == before
    assert "1 seeds" in rl.summary(rows)


@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "cuda"])
def test_the_seeds_of_a_fast_path_are_one_run(cuda, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    config = runs.BenchmarkConfig(suites=("paths",), seeds=(0, 1, 2), folder=tmp_path)
    plain, fast, half, *graphs = (e for e in experiments() if e.suite == "paths")
    together = [fast, half, *(graphs if cuda else [])]
    expected = [*((plain, [seed]) for seed in range(3)), *((e, [0, 1, 2]) for e in together)]
    assert runs.pending(config, []) == expected
    assert [e.device for e in together] == ["cpu", "cpu", *(["cuda"] * 3 if cuda else [])]
    done = {"task": fast.task, "agent": fast.agent, "preset": fast.preset, "seed": 1}
    assert runs.pending(config, [done])[3] == (fast, [0, 2])
    for experiment in graphs:
        assert runs.train_config(config, experiment, [0, 2]).cuda_graphs == 10
    options = runs.train_config(config, fast, [0, 2])
    assert (options.compile, options.background_eval, options.stacked) == (True, True, 2)
    assert replace(
        options, compile=False, background_eval=False, stacked=1, folder=None
    ) == replace(runs.train_config(config, plain, [0]), seeds=(0, 2), folder=None)


def test_paths_of_execution_learn_alike():
    """Recorded: every seed has the same success at every evaluation, and comes to learn."""
    recorded = json.loads(runs.BenchmarkConfig().record.read_text())
    plain, fast, half = (
        {(row["seed"], row["step"]): row["success"] for row in recorded if row["preset"] == name}
        for name in ("small plain", "small fast", "small fast bfloat16")
    )
    assert plain.keys() == fast.keys() == half.keys()
    assert len(plain) == 18
    assert plain == fast  # as docs/speed.md says
    episodes = [round(25 * (half[key] - plain[key])) for key in plain]
    assert sorted(n for n in episodes if n) == [-3, -1, -1, -1, -1]  # as docs/speed.md says
    for seed in range(3):
        assert plain[seed, 250] < 0.5 < plain[seed, 1500]


def test_the_agents_are_compared_from_one_behaviour_with_equal_updates(tmp_path):
    found = [e for e in experiments() if e.suite == "agents"]
    config = runs.BenchmarkConfig(suites=("agents",), folder=tmp_path)
    assert config.record.name == "rl_agents.json"
    with pytest.raises(ValueError, match="suites must be agents alone"):
        _ = runs.BenchmarkConfig(suites=("agents", "cube")).record
    for task in {e.task for e in found}:
        own = [e for e in found if e.task == task]
        assert own[0].agent == "bc"
        assert len({(e.offline, e.online, e.eval_every, e.episodes) for e in own}) == 1
        cloned = tmp_path / own[0].folder / "seed0"
        for e in own:
            started = runs.train_config(config, e, [0]).behaviour
            assert started == (str(cloned) if e.behaviour else None)
    assert {e.agent for e in found if not e.behaviour} >= {"bc", "rebrac", "rql", "qsm"}
    assert {e.agent for e in found if e.behaviour} >= {"qam", "trqam", "sqam", "fql", "bam"}
    only = replace(config, agents=("qam",), tasks=("pointmaze",), seeds=(5,))
    assert [(e.task, e.agent, seeds) for e, seeds in runs.pending(only, [])] == [
        (found[0].task, "qam", [5])
    ]


def curve(agent, values, task="maze", preset="small"):
    """Rows of one agent whose seeds have the success ``values[seed][step]``."""
    return [
        {"task": task, "agent": agent, "preset": preset, "seed": s, "step": step, "success": v}
        for s, own in enumerate(values)
        for step, v in own.items()
    ]


def test_relative_times_are_updates_times_their_cost():
    rows = [
        *curve(
            "qam",
            [{10: 0.0, 20: 0.6, 30: 0.9}, {10: 0.2, 20: 0.8, 30: 1.0}],
            preset="small behaviour",
        ),
        *curve("ours", [{10: 1.0, 20: 1.0, 30: 1.0}]),
        *curve("never", [{10: 0.1, 20: 0.1, 30: 0.1}]),
        *curve("qam", [{10: 1.0}], task="another", preset="small behaviour"),
    ]
    costs = [
        {"task": "maze", "agent": name, "preset": preset, "relative": cost}
        for name, preset, cost in (
            ("qam", "small behaviour", 1.0),
            ("ours", "small", 0.6),
            ("never", "small", 0.1),
        )
    ]
    times = cost.relative_times(rows, costs, "maze")  # the goal .8: qam at step 30, mean .95
    assert times == {
        ("qam", "small behaviour"): 1.0,
        ("ours", "small"): pytest.approx(0.6 * 10 / 30),
        ("never", "small"): None,
    }
    assert cost.relative_times(rows[6:], costs, "maze") == {}
    assert figure.final_success(rows, "maze")["qam", "small behaviour"].tolist() == [0.9, 1.0]


@pytest.mark.slow
def test_updates_of_agents_are_timed_in_turn(tmp_path):
    config = runs.BenchmarkConfig(suites=("agents",), folder=tmp_path, workers=1)
    found = [e for e in experiments() if e.agent in ("bc", "qam") and e.suite == "agents"]
    small = [replace(e, transitions=4000) for e in found if e.task == found[0].task]
    runs.make_data(config, small[0])
    cloned, reference = cost.measure(config, small, rounds=3, calls=1)
    assert reference["relative"] == 1.0
    assert 0 < cloned["relative"] < 1


def test_the_figure_has_all_agents(tmp_path):
    rows = [
        *curve("qam", [{10: 0.0, 20: 0.6}, {10: 0.2, 20: 0.8}], preset="small behaviour"),
        *curve("mine:Own", [{10: 0.5, 20: 1.0}]),
    ]
    assert figure.draw(tmp_path / "a.png", rows).stat().st_size > 10_000
    assert figure.label("qam", "small behaviour residual=True") == "qam residual=True"
