"""The benchmark of an update: its rows, its parts, and a peer that is a process of its own."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import rl_speed
from benchmarks.rl_speed import FIXED, WHOLE, SpeedConfig, main
from benchmarks.rl_speed_peer import Peer

PARTS = [
    "sampling",
    "target",
    "critic loss",
    "behaviour loss",
    "rollout",
    "terminal gradient",
    "adjoint",
    "matching loss",
    "clip, step, slow copies",
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


def quick(tmp_path, **options):
    out = tmp_path / "rl_speed.json"
    main(SpeedConfig(quick=True, rounds=3, updates=3, clock="cpu", output=out, **options))
    rows = json.loads(out.read_text())
    for row in rows:
        keys = ["name", "device", "threads", "ms_per_update", "ratio_to_peer", "seeds"]
        assert list(row) == keys
        assert (row["device"], row["threads"], row["seeds"]) == ("cpu", 1, 1)
        assert row["ms_per_update"] > 0
    return {row["name"]: row for row in rows}


def test_parts_make_up_the_whole(tmp_path, capsys):
    rows = quick(tmp_path)
    assert list(rows) == [WHOLE, FIXED, f"{FIXED}, fastest block", *PARTS]
    assert all(row["ratio_to_peer"] is None for row in rows.values())
    total = sum(rows[name]["ms_per_update"] for name in PARTS)
    assert 0.4 < total / rows[WHOLE]["ms_per_update"] < 1.6
    assert "matching loss" in capsys.readouterr().out


def test_a_peer_is_timed_in_turns(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    (checkout / "agents").mkdir(parents=True)
    (checkout / "agents" / "qam.py").write_text(CHECKOUT)
    (checkout / "jax.py").write_text(JAX)
    rows = quick(tmp_path, peer=checkout)
    best, peer = rows[f"{FIXED}, fastest block"], rows["peer, fastest block"]
    assert best["ratio_to_peer"] == pytest.approx(best["ms_per_update"] / peer["ms_per_update"])
    assert rows[FIXED]["ratio_to_peer"] > 1
    assert rows["peer"]["ratio_to_peer"] == 1


def test_a_peer_that_fails_is_an_error(tmp_path):
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "qam.py").write_text("raise RuntimeError('broken')")
    with pytest.raises(RuntimeError, match="exit code 1"):
        Peer(asdict(rl_speed.QUICK), tmp_path, Path(sys.executable), "cpu", 1)


def test_what_cannot_be_timed_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"agents/qam\.py"):
        SpeedConfig(peer=tmp_path)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        SpeedConfig(rounds=0)
    with pytest.raises(ValueError, match="clock must be 'wall' on device 'cuda'"):
        SpeedConfig(device="cuda", clock="cpu")
    assert sys.executable == str(SpeedConfig().peer_python)
