"""The benchmark of an update: its rows, its parts, and a peer that is a process of its own."""

import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks.speed import check as speed_check
from benchmarks.speed import update as speed_update
from benchmarks.speed.__main__ import FASTEST, FIXED, WHOLE, main
from benchmarks.speed.config import SpeedConfig
from benchmarks.speed.peer import Peer
from benchmarks.speed.update import QUICK, Operations, Sizes, operations, parts

PARTS = [
    "sampling",
    "chain and actions",
    "target",
    "critic loss",
    "behaviour loss",
    "terminal gradient",
    "adjoint",
    "matching loss",
    "clip, step, target networks",
]

# What the benchmark uses of jax and of the checkout.
JAX = """
import numpy as numpy
def block_until_ready(values):
    return values
"""
CHECKOUT = """
import types
def get_config():
    return types.SimpleNamespace()
class QAMAgent:
    def __init__(self, config):
        self.config = config
    @classmethod
    def create(cls, seed, observation, action, config):
        assert observation.shape == (6,) and action.shape == (2,)
        assert (config.num_qs, config.flow_steps, config.horizon_length) == (2, 4, 3)
        assert config.actor_hidden_dims == config.value_hidden_dims == (32, 32)
        return cls(config)
    def update(self, batch):
        assert batch["actions"].shape == (16, 3, 2)
        assert batch["next_observations"].shape == (16, 3, 6)
        sum(i for i in range(10_000))
        print("what a library says")
        return QAMAgent(self.config), {}
"""


COLUMNS = [
    *("name", "device", "threads", "seeds", "ms_per_update", "updates_per_s", "ratio_to_peer"),
    *("fraction_of_ceiling", "peak_memory_gb", "compile_s"),
]


def quick(tmp_path, **options):
    out = tmp_path / "speed.json"
    main(SpeedConfig(quick=True, rounds=3, updates=3, clock="cpu", output=out, **options))
    rows = json.loads(out.read_text())
    for row in rows:
        assert list(row) == COLUMNS
        assert (row["device"], row["threads"]) == ("cpu", 1)
        expected = 1e3 * row["seeds"] / row["updates_per_s"]
        assert row["ms_per_update"] == pytest.approx(expected)
    assert (tmp_path / "speed.png").stat().st_size > 1000
    return {(row["name"], row["seeds"]): row for row in rows}


@pytest.mark.slow
def test_parts_make_up_the_whole(tmp_path, capsys):
    rows = quick(tmp_path, seeds=(1, 3))
    whole = [(WHOLE, 1), (FIXED, 1), (f"{FIXED}, fastest block", 1), (WHOLE, 3)]
    assert list(rows) == [*whole, *[(name, 1) for name in PARTS]]
    assert all(row["ratio_to_peer"] is None for row in rows.values())
    total = sum(rows[name, 1]["ms_per_update"] for name in PARTS)
    assert 0.4 < total / rows[WHOLE, 1]["ms_per_update"] < 1.6
    assert 0 < rows[WHOLE, 1]["fraction_of_ceiling"] < 1
    assert "matching loss" in capsys.readouterr().out


def test_operations_are_those_of_the_products():
    a, b = torch.ones(3, 5), torch.ones(5, 7, requires_grad=True)
    with Operations() as counter:
        (a @ b).sum().backward()
    assert counter.total == 2 * (2 * 3 * 5 * 7)


def test_a_fixed_batch_stays_and_its_noise_does_not():
    update = speed_update.Update(QUICK, "cpu", fixed=True)
    (trainer,) = update.trainers
    (batch, noise), (again, other) = [
        trainer.loss.sample(trainer.module, trainer.generator) for _ in range(2)
    ]
    assert again is batch
    assert not torch.equal(noise["bc_x0"], other["bc_x0"])


def test_golden_values_are_asked_for(capsys, monkeypatch):
    speed_check.main("cpu", ("eager",), quick=True)
    assert "golden ifql-default eager, 3 at once" in capsys.readouterr().out
    monkeypatch.setattr(
        speed_check.Recorded, "evaluate", lambda _, module, inputs: _worse(module.loss(*inputs))
    )
    with pytest.raises(AssertionError, match="ifql-default, eager, 1 at once on cpu"):
        speed_check.main("cpu", ("eager",), quick=True)


def _worse(result):
    loss, metrics = result
    return 1.001 * loss, metrics


@pytest.mark.slow
def test_a_peer_is_timed_in_turns(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    (checkout / "agents").mkdir(parents=True)
    (checkout / "agents" / "qam.py").write_text(CHECKOUT)
    (checkout / "jax.py").write_text(JAX)
    rows = quick(tmp_path, peer=checkout)
    best, peer = rows[f"{FIXED}, fastest block", 1], rows["peer, fastest block", 1]
    assert best["ratio_to_peer"] == pytest.approx(best["ms_per_update"] / peer["ms_per_update"])
    assert rows[FIXED, 1]["ratio_to_peer"] > 1
    assert rows["peer", 1]["ratio_to_peer"] == 1


def test_a_peer_that_fails_is_an_error(tmp_path):
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "qam.py").write_text("raise RuntimeError('broken')")
    with pytest.raises(RuntimeError, match="exit code 1"):
        Peer(asdict(QUICK), tmp_path, Path(sys.executable), "cpu", 1)


def test_what_cannot_be_timed_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"agents/qam\.py"):
        SpeedConfig(peer=tmp_path)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        SpeedConfig(rounds=0)
    with pytest.raises(ValueError, match="clock must be 'wall' on device 'cuda'"):
        SpeedConfig(device="cuda", clock="cpu")
    with pytest.raises(ValueError, match="graph on device 'cpu'"):
        SpeedConfig(executions=("eager", "graph"))
    with pytest.raises(ValueError, match="precision must be float32"):
        SpeedConfig(precision="tf32")
    with pytest.raises(ValueError, match="seeds must be numbers of at least 1"):
        SpeedConfig(seeds=(0,))
    assert sys.executable == str(SpeedConfig().peer_python)


@pytest.mark.slow
def test_the_page_says_what_parts_cost():
    page = (Path(__file__).parents[2] / "docs" / "speed.md").read_text(encoding="utf-8")
    said = dict(re.findall(r"^\| ([a-z ]+) \| ([\d.]+) \|", page, flags=re.MULTILINE))
    few, times = replace(Sizes(), batch=8), Sizes().batch // 8
    found = {n: times * operations(run) / 1e9 for n, run in parts(few, "cpu").items()}
    found["step"] = found.pop("clip, step, target networks")
    assert {name: float(number) for name, number in said.items()} == {
        name: round(number, 1) for name, number in found.items() if name != "sampling"
    }
    assert f"is {round(sum(found.values()))} billion" in page


def test_the_pages_quote_the_records():
    root = Path(__file__).parents[2]
    page, readme = ((root / p).read_text(encoding="utf-8") for p in ("docs/speed.md", "README.md"))
    quoted = re.findall(r"\| (\d+) \| ([\d.]+) \| ([\d.]+) \| `(speed\w*\.json)` \|", page)
    assert len(quoted) == 3
    ratios, fractions = {}, []
    for ceiling, *numbers, record in quoted:
        rows = json.loads((root / "benchmarks" / "results" / record).read_text())
        ways = {row["name"]: row for row in rows if row["seeds"] == 1}
        found = [ways[f"{WHOLE}{way}"] for way in ("", ", compiled")]
        ratios[record] = [f"{row['ratio_to_peer']:.2f}" for row in found]
        assert numbers == ratios[record]
        fractions.append(f"{found[1]['fraction_of_ceiling']:.2f}")
        work = 60.2e9 / found[0]["fraction_of_ceiling"]
        assert int(ceiling) == round(work / found[0]["ms_per_update"] * 1e3 / 1e9)
    (here, there), (other_here, other_there) = (
        ratios["speed.json"],
        ratios["speed_other_machine.json"],
    )
    first, second, third = fractions
    page, said = (" ".join(text.split()) for text in (page, readme))
    assert f"take {first} and {second} of the compiled update" in page
    assert f"first two, and {third} in the third" in page
    rows = json.loads((root / "benchmarks" / "results" / "speed_bfloat16.json").read_text())
    ways = {row["name"]: row["ratio_to_peer"] for row in rows}
    eager, fast = (f"{ways[f'{WHOLE}{way}, bfloat16']:.2f}" for way in ("", ", compiled"))
    assert f"{eager} of the published float32 update's time as written and {fast} compiled" in page
    assert f"`--compile --precision bfloat16` takes {fast} where" in said
    assert all(row["name"].startswith("peer") or "bfloat16" in row["name"] for row in rows)
    rows = json.loads((root / "benchmarks" / "results" / "speed.json").read_text())
    ms = {row["seeds"]: row["ms_per_update"] for row in rows if row["name"] == f"{WHOLE}, compiled"}
    assert f"take {ms[4] / ms[1]:.1f} and {ms[12] / ms[1]:.1f} times the time of one" in page
    assert f"takes {there} of the published" in said
    assert f"`--compile`, {here} without, and {other_there} and {other_here} on another" in said


def test_the_pages_quote_the_records_of_the_gpu():
    root = Path(__file__).parents[2]
    page, readme = ((root / p).read_text(encoding="utf-8") for p in ("docs/speed.md", "README.md"))
    quoted = re.findall(
        r"^\| `(\w+)`.* \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) min \| "
        r"`(speed_h200\w+\.json)` \|$",
        page,
        flags=re.MULTILINE,
    )
    assert len(quoted) == 2
    records = {}
    for precision, ms, ratio, fastest, minutes, record in quoted:
        rows = json.loads((root / "benchmarks" / "results" / record).read_text())
        ways = records[precision] = {(row["name"], row["seeds"]): row for row in rows}
        found = ways[f"{WHOLE}, graph, {precision}", 1]
        assert (ms, ratio) == (f"{found['ms_per_update']:.2f}", f"{found['ratio_to_peer']:.2f}")
        block = ways[f"{FIXED}, graph, {precision}{FASTEST}", 1]
        assert fastest == f"{block['ratio_to_peer']:.2f}"
        assert int(minutes) == round(found["ms_per_update"] * 1e6 / 6e4)
        peers = [row["ms_per_update"] for name, row in ways.items() if name[0].startswith("peer")]
        assert all(f"{time:.2f}" in page for time in peers)
    one, eight = (records["tf32"][f"{WHOLE}, graph, tf32", seeds] for seeds in (1, 8))
    said = " ".join(page.split())
    assert (
        f"take {eight['ms_per_update'] / one['ms_per_update']:.1f} times the time of one (in TF32)"
        in said
    )
    assert f"update then {eight['ratio_to_peer']:.2f} of the published time" in said
    apart = [row["ms_per_update"] for row in records["tf32"].values() if "graph" not in row["name"]]
    assert round(sum(apart) / one["ms_per_update"]) == 12
    assert "an update takes twelve times as long" in said
    found = records["bfloat16"][f"{WHOLE}, graph, bfloat16", 1]
    said = (
        f"{found['ms_per_update']:.2f} ms an update, {found['ratio_to_peer']:.2f} of the published"
    )
    assert said in " ".join(readme.split())
