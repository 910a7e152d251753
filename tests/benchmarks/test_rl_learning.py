"""The learning benchmark: every run is told apart, and its rows are those of the evaluations."""

import csv
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("ogbench")

from benchmarks import rl

torch.set_num_threads(1)
COLUMNS = "task agent seed step phase success episodes hours device preset"


def test_no_two_experiments_share_a_row_or_a_folder():
    found = rl.experiments()
    assert len({(e.task, e.agent, e.preset) for e in found}) == len(found)
    assert len({e.folder for e in found}) == len(found)
    assert {e.suite for e in found} == set(rl.BenchmarkConfig().suites)


def test_options_of_an_experiment_reach_the_agent(tmp_path):
    config = rl.BenchmarkConfig(folder=tmp_path)
    for experiment in rl.experiments():
        options = rl.train_config(config, experiment, 1).options
        for name, value in experiment.options.items():
            assert getattr(options, name) == value


def test_rows_are_flat_and_kept(tmp_path, monkeypatch):
    tiny = replace(
        rl.experiments()[0], offline=4, transitions=4000, eval_every=2, episodes=1, agent="bc"
    )
    monkeypatch.setattr(rl, "experiments", lambda: [tiny])
    config = rl.BenchmarkConfig(
        suites=("pointmaze",),
        seeds=(3,),
        workers=1,
        folder=tmp_path,
        results=tmp_path / "rl.json",
    )
    rl.make_data(config, tiny)
    rows = rl.run(config, tiny, 3)
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
