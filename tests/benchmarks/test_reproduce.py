"""One number of the paper: bands, verdicts, the plan, and work in pieces."""

import json
import math
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.pages import ROOT

pytest.importorskip("ogbench")

from applications.common.errors import RunError
from applications.rl import train
from applications.rl.report.published import PublishedCurve, published_curves
from benchmarks.reproduce import __main__ as reproduce
from benchmarks.reproduce import pieces
from benchmarks.reproduce.bands import T, band, verdict
from benchmarks.reproduce.config import RECORD, ReproduceConfig
from benchmarks.reproduce.pieces import Clock, Piece, Times
from benchmarks.reproduce.plan import AIM, estimate, show, step_seconds
from flows import Callback
from flows.training import StopTraining

torch.set_num_threads(1)
QUICK = ReproduceConfig(quick=True, tasks=(1,), seeds=(0, 1), transitions=1000, workers=1)


def curve(mean, student):
    """A published curve with points at 50K, 100K, ..."""
    steps = 50_000 * np.arange(1, len(mean) + 1)
    mean, student = np.array(mean), np.array(student)
    return PublishedCurve("task", "QAM", steps, mean, mean - 0.01, mean + 0.01, student)


def test_the_band_is_a_prediction_interval():
    """Student's half-width c of 12 seeds: c sqrt(12) sqrt(1/12 + 1/S) = c sqrt(1 + 12/S)."""
    made = curve([0.5, 0.8], [0.06, 0.08])
    for seeds, factor in ((12, math.sqrt(2)), (3, math.sqrt(5)), (1, math.sqrt(13))):
        found = band(made, 100_000, seeds=seeds)
        half = min(0.2, 0.08 * factor)
        assert found.mean == 0.8
        assert found.low == pytest.approx(0.8 - 0.08 * factor)
        assert found.high == pytest.approx(0.8 + half)
    assert band(made, 50_000, seeds=12).high == pytest.approx(0.5 + 0.06 * math.sqrt(2))
    assert band(made, 70_000, seeds=12) is None


def test_a_band_where_all_succeeded_has_the_noise_of_the_episodes():
    found = band(curve([1.0], [0.0]), 50_000, seeds=3, episodes=50)
    p = 601 / 602
    width = 2.2010 * math.sqrt(p * (1 - p) / 50) * math.sqrt(1 / 12 + 1 / 3)
    assert found.low == pytest.approx(1 - width, rel=1e-4)
    assert found.high == 1
    assert found.holds(149 / 150)
    assert not found.holds(147 / 150)


def test_bands_of_the_published_curves_have_the_published_deviation():
    """Task 1 at 50K: 90.3 % with a deviation of 10.4 % over seeds."""
    found = published_curves("scene-sparse-play-singletask-task1-v0")["QAM"]
    half = T * 0.104 * math.sqrt(1 / 12 + 1 / 3)
    assert band(found, 50_000, seeds=3).low == pytest.approx(0.9033 - half, abs=2e-3)


def test_the_verdict_is_of_the_last_published_step_reached():
    made = curve([0.5, 0.8, 1.0], [0.06, 0.04, 0.0])

    def judged(success, **options):
        return verdict(made, success, episodes=50, **options)

    first = {50_000: [0.0, 0.0, 0.0]}
    assert judged(first).startswith("BELOW the published success at step 50000: 0.0% (3 seeds")
    good = judged({**first, 100_000: [0.7, 0.8, 0.9], 110_000: [0.0, 0.0, 0.0]})
    assert good.startswith("REPRODUCED at step 100000: 80.0% (3 seeds, 50 episodes each)")
    assert "71.1% to 88.9%; published 80.0% [79.0%, 81.0%], 12 seeds" in good
    assert judged({**first, 100_000: [0.7, 0.7, 0.7]}).startswith("BELOW")
    assert judged({**first, 100_000: [0.9, 0.9, 0.9]}).startswith("ABOVE")
    assert judged({}).startswith("OPEN")
    assert judged({30: [1.0]}).startswith("OPEN")
    trial = judged({100_000: [0.8]}, differences=["few data"])
    assert trial.startswith("TRIAL")
    assert "no reproduction (few data)" in trial
    assert "REPRODUCED" not in trial


def test_smaller_runs_are_trials():
    assert ReproduceConfig().differences() == []
    assert len(ReproduceConfig(transitions=500_000).differences()) == 1
    assert "tiny" in QUICK.differences()[0]


def test_full_size_is_the_published_size():
    config = ReproduceConfig(device="cpu").training(2)
    options = config.options
    assert (config.task, config.preset) == ("scene-sparse-play-singletask-task2-v0", "published")
    assert (options.hidden, options.critics, config.batch_size) == ((512,) * 4, 10, 256)
    assert (options.inverse_temperature, options.horizon, options.flow_steps) == (1, 5, 10)
    assert (config.eval_every, config.eval_episodes, config.stacked) == (50_000, 50, 3)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


def milliseconds(file, name, seeds):
    rows = json.loads((ROOT / "benchmarks/results" / file).read_text())
    return next(r["ms_per_update"] for r in rows if (r["name"], r["seeds"]) == (name, seeds))


def test_estimates_are_those_of_the_speed_records(gpu):
    full = ReproduceConfig(workers=16)
    tf32 = replace(full, precision="tf32")
    one = replace(full, seeds=(0,))
    eight = tuple(range(8))
    recorded = milliseconds("speed_h200_bfloat16.json", "update, graph, bfloat16", 1)
    assert 1000 * step_seconds(one) == pytest.approx(recorded)
    recorded = milliseconds("speed_h200_tf32.json", "update, graph, tf32", 8)
    assert 1000 * step_seconds(replace(tf32, seeds=eight)) == pytest.approx(recorded)
    cpu = replace(full, device="cpu", seeds=(0, 1))
    recorded = milliseconds("speed.json", "update, compiled", 1)
    assert 1000 * step_seconds(cpu) == pytest.approx(2 * recorded)
    assert step_seconds(one) < step_seconds(full) < step_seconds(tf32)


def test_the_plan_adds_up_and_says_what_can_be_reached(gpu):
    config = ReproduceConfig(workers=16)
    plan = estimate(config)
    assert plan.whole(50_000) == pytest.approx(
        plan.data + 2 * (plan.start + 50_000 * plan.step + 3 * plan.evaluation)
    )
    reached = plan.reachable(60 * AIM)
    assert reached >= 50_000
    assert plan.whole(reached) <= 60 * AIM < plan.whole(reached + 50_000)
    assert plan.reachable(plan.whole(50_000) - 1) == 0
    half = replace(config, transitions=500_000)
    assert estimate(half).data < 0.6 * plan.data
    assert estimate(replace(config, workers=2)).data > 5 * plan.data
    text = show(config, has_data=True, done={1: 100_000, 2: 50_000})
    left = f"{plan.training(50_000) / 60:.1f}"
    assert [line.split()[-1] for line in text.splitlines()[2:6]] == ["done", "done", left, left]
    assert f"step {reached} of the published curves in 15 minutes" in text


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    config = ReproduceConfig(dry_run=True, folder=tmp_path / "runs", output=tmp_path / "rows.json")
    assert reproduce.main(config) == []
    assert "data: 1000000 transitions" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"tasks": (6,)}, "tasks must be numbers from 1 to 5"),
        ({"seeds": ()}, "seeds must hold at least one number"),
        ({"steps": 60_000}, "steps must be a multiple of 50000"),
        ({"minutes": -1}, "minutes must be at least 0"),
    ],
)
def test_options_out_of_range_are_refused(option, expected):
    with pytest.raises(ValueError, match=expected):
        ReproduceConfig(**option)


def test_minutes_that_suffice_for_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="minutes must be 0 or at least"):
        reproduce.main(replace(QUICK, folder=tmp_path, minutes=0.01))
    assert not any(tmp_path.iterdir())


def test_a_quick_run_has_a_record_of_its_own(tmp_path):
    assert replace(QUICK, folder=tmp_path).record.parent == tmp_path / "quick"
    assert replace(QUICK, output=tmp_path / "rows.json").record == tmp_path / "rows.json"
    assert ReproduceConfig().record == RECORD


def test_newer_physics_are_warned_of(monkeypatch, tmp_path):
    config = replace(QUICK, dry_run=True, folder=tmp_path)
    for version, warned in (("3.4.0", False), ("3.5.0", True), ("4.0", True)):
        facts = {**pieces.facts_of(config), "mujoco": version}
        monkeypatch.setattr(reproduce, "facts_of", lambda _, facts=facts: facts)
        if warned:
            with pytest.warns(UserWarning, match=f"mujoco is {version}"):
                reproduce.main(config)
        else:
            reproduce.main(config)


def test_all_stacked_seeds_stop_at_one_update(tmp_path):
    seconds = 0.0
    piece = Piece(1, lambda: seconds)
    times = Times(tmp_path / "times.json")
    clock = Clock(
        piece, reserve=10, times=times, part="a", every=50, unit=10, facts={"device": "d"}
    )
    for iteration in range(1, 98):
        clock.on_step(None, iteration, {})  # the first seed at 97: there is time
    seconds = 50.5
    clock.on_step(None, 97, {})  # the second one: there is none
    for iteration in (98, 98, 99, 99):
        clock.on_step(None, iteration, {})
    for _ in range(2):
        with pytest.raises(StopTraining, match="the same command continues"):
            clock.on_step(None, 100, {})
    assert times.facts("a", 50) == {"seconds": 0, "device": "d"}
    assert Times(tmp_path / "times.json").facts("a", 100)["seconds"] == 50.5


def test_data_end_with_the_minutes_and_errors_are_told(tmp_path, monkeypatch):
    config = replace(QUICK, folder=tmp_path)
    seconds = iter((0.0, 60.0, 60.0))
    assert not pieces.make_data(config, Piece(1, lambda: next(seconds)))
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(RunError, match="the data could not be made"):
        pieces.make_data(config, Piece(0))


class Advance(Callback):
    """Moves a clock at each update."""

    def __init__(self, seconds):
        self.seconds, self.now = seconds, 0.0

    def on_step(self, trainer, iteration, metrics):
        self.now += self.seconds


@pytest.mark.slow
def test_pieces_give_the_rows_of_one_piece(tmp_path, monkeypatch, capsys):
    whole = replace(QUICK, folder=tmp_path / "whole")
    expected = reproduce.main(whole)
    assert [(row["seed"], row["step"]) for row in expected] == [(0, 20), (0, 40), (1, 20), (1, 40)]
    assert {row["published_mean"] for row in expected} == {None}
    assert "TRIAL of the pipeline, no reproduction" in capsys.readouterr().out
    assert json.loads(whole.record.read_text()) == expected
    assert whole.record.with_name("reproduce_task1.png").stat().st_size > 10_000

    split = replace(QUICK, folder=tmp_path / "split", minutes=5)
    shutil.copytree(whole.data, split.data)
    advance = Advance(6.0)  # of two seeds each: five minutes are 25 updates
    monkeypatch.setattr(
        reproduce, "train", lambda config, callbacks: train(config, callbacks=[advance, *callbacks])
    )
    rows = reproduce.main(split, now=lambda: advance.now)
    assert [(row["seed"], row["step"]) for row in rows] == [(0, 20), (1, 20)]
    assert "not finished" in capsys.readouterr().out
    last = split.training(1).run_folder(1) / "evaluation.csv"
    assert [line.split(",")[0] for line in last.read_text().split()[1:]] == ["20", "26"]
    rows = reproduce.main(split, now=lambda: advance.now)
    assert "not finished" not in capsys.readouterr().out

    def learned(rows):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert learned(rows) == learned(expected)
    weights = [
        torch.load(config.training(1).run_folder(1) / "checkpoint.pt", weights_only=True)["module"]
        for config in (whole, split)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    seconds = {row["step"]: row["seconds"] for row in rows}
    assert seconds == {20: pytest.approx(240, abs=12), 40: pytest.approx(480, abs=12)}
    assert reproduce.main(split) == rows  # nothing is left to do
