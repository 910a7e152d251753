"""The benchmark of tilt()'s update: both sides compute the same, its rows, and what it refuses."""

import json

import pytest

from benchmarks.tilt_speed import plain
from benchmarks.tilt_speed.__main__ import PROBLEMS, Args, contestants, main, measure

QUICK = {"steps": 4, "batch_size": 16, "rounds": 2, "iterations": 1, "compile": False}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("model", PROBLEMS)
def test_both_sides_make_the_same_updates(model):
    plain, ours = contestants(Args(**QUICK), model).values()
    expected = [float(plain()) for _ in range(4)]
    assert [float(ours()) for _ in range(4)] == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) == 4


@pytest.mark.slow
def test_rows_and_figure(tmp_path, capsys):
    out = tmp_path / "tilt_speed.json"
    rows = main(Args(**QUICK, models=("toy, network",), output=out))
    assert json.loads(out.read_text()) == rows
    assert out.with_suffix(".png").stat().st_size > 0
    keys = ["name", "model", "device", "threads", "mode"]
    keys += ["ms_per_iteration", "ratio_to_plain", "compile_s"]
    assert [list(row) for row in rows] == [keys] * 2
    plain, ours = rows
    assert (plain["name"], plain["ratio_to_plain"]) == ("plain loop", 1.0)
    assert (ours["name"], ours["mode"], ours["compile_s"]) == ("tilt()", "eager", None)
    assert ours["ms_per_iteration"] > 0
    assert "tilt()" in capsys.readouterr().out


def test_sides_that_differ_are_not_timed(monkeypatch):
    different = plain.Plain.update
    monkeypatch.setattr(plain.Plain, "update", lambda self: 1.05 * different(self))
    with pytest.raises(RuntimeError, match=r"toy, network: losses of .* of the plain loop"):
        measure(Args(**QUICK), "toy, network")


def test_what_cannot_be_timed_is_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        Args(rounds=0)
    with pytest.raises(ValueError, match="clock must be 'wall' on device 'cuda'"):
        Args(device="cuda")
    with pytest.raises(ValueError, match=r"models must be of .*, got \['toy'\]"):
        Args(models=("toy",))
