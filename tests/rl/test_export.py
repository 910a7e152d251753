"""Exported policies: equal to the agent, of any batch size, run by PyTorch alone."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch

from applications.rl import (
    AGENTS,
    ExportConfig,
    RunError,
    Spaces,
    export,
    load_agent,
    make_agent,
    run_export,
)
from applications.rl.export import SNIPPET, Policy, largest_difference, program_bytes, show_export
from applications.rl.run_folder import describe_identity
from flows.training import checkpoint as checkpoints
from flows.training.checkpoint import CheckpointError

OBSERVATION_DIM, ACTION_DIM, HORIZON = 5, 2, 3
TASK = "pointmaze-medium-navigate-singletask-task1-v0"


def make(name, **options):
    """An untrained agent; its weights are as good as any for what is tested here."""
    small = {"hidden": (16, 16), "horizon": HORIZON, "flow_steps": 4}
    if name != "bc":
        small["critics"] = 3
    config = AGENTS[name].config_class(**(small | options))
    agent = make_agent(config, OBSERVATION_DIM, ACTION_DIM, seed=1)
    return agent.eval().requires_grad_(False)


def write_checkpoint(folder, name="qam", **options):
    agent = make(name, **options)
    spaces = Spaces(OBSERVATION_DIM, ACTION_DIM)
    identity = describe_identity(
        agent=name, task=TASK, config=agent.config, spaces=spaces, facts={"seed": 1}
    )
    state = {"module": agent.state_dict(), "identity": identity, "iteration": 7}
    checkpoints.save(folder / "checkpoint.pt", state)
    return folder


def read_back(content):
    return torch.export.load(io.BytesIO(content)).module()


CASES = [
    ("bc", {}),
    ("bc", {"solver": "ab2", "action_chunking": False}),
    ("qam", {"best_of_n": 3, "residual": True}),
    ("qam-e", {"best_of_n": 2}),
    ("qam-f", {}),
    ("fql", {"actor_layer_norm": True}),
    ("ifql", {}),
    ("bam", {}),
    ("fawac", {}),
    ("fbrac", {"best_of_n": 2}),
    ("cgql", {"best_of_n": 2}),
    ("cgql-linex", {}),
    ("rql", {}),
    ("trqam", {}),
    ("sqam", {}),
    ("fedit", {"best_of_n": 2}),
    ("dsrl", {}),
    ("qsm", {}),
    ("dac", {"action_chunking": False}),
    ("rebrac", {}),
    ("rlpd", {}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.slow
def test_the_program_acts_as_the_agent(name, options):
    agent = make(name, **options)
    policy = Policy(agent)
    program = read_back(program_bytes(policy))
    assert largest_difference(policy, program) <= 1e-6
    observations = torch.randn(6, OBSERVATION_DIM, generator=torch.Generator().manual_seed(0))
    noise = agent.act_noise(6, torch.Generator().manual_seed(1))
    flat = torch.cat([part.flatten(1) for part in noise.values()], 1)  # in the order of the json
    expected = agent.act(observations, noise)
    torch.testing.assert_close(program(observations, flat), expected, rtol=0, atol=1e-6)
    assert program(observations[:0], flat[:0]).shape == (0, agent.chunk_length, ACTION_DIM)
    assert expected.std() > 0.1  # not the same action whatever comes in


@pytest.mark.slow
def test_only_weights_that_acting_reads_are_in_the_file():
    agent = make("qam", hidden=(64, 64))
    content = program_bytes(Policy(agent))
    read = sum(p.numel() for p in agent.policy.parameters())
    held = sum(p.numel() for p in torch.export.load(io.BytesIO(content)).state_dict.values())
    assert held == read
    assert sum(p.numel() for p in agent.parameters()) > 5 * read
    assert all(p.numel() for p in agent.parameters())  # the agent itself keeps its own


@pytest.mark.slow
def test_critics_that_choose_are_in_the_file():
    agent = make("qam", best_of_n=2)
    state = torch.export.load(io.BytesIO(program_bytes(Policy(agent)))).state_dict
    read = sum(p.numel() for net in (agent.policy, agent.critic) for p in net.parameters())
    assert sum(p.numel() for p in state.values()) == read


@pytest.mark.slow
def test_a_run_is_exported_with_its_description(tmp_path, capsys):
    write_checkpoint(tmp_path / "run")
    show_export(ExportConfig(tmp_path / "run", repeats=3))
    facts = json.loads((tmp_path / "run" / "policy.json").read_text())
    assert facts["agent"] == "qam"
    assert (facts["task"], facts["updates"]) == (TASK, 7)
    assert facts["observation"]["shape"] == ["batch", OBSERVATION_DIM]
    assert facts["noise"]["shape"] == ["batch", HORIZON * ACTION_DIM]
    assert facts["noise"]["distribution"] == "standard normal"
    assert facts["noise"]["parts"] == [["noise", [1, HORIZON * ACTION_DIM]]]
    assert facts["actions"]["shape"] == ["batch", HORIZON, ACTION_DIM]
    assert facts["largest_difference"] <= 1e-6
    assert 0 < facts["latency_ms"] < 1000
    program = torch.export.load(tmp_path / "run" / "policy.pt2").module()
    agent = load_agent(tmp_path / "run").agent
    x, z = torch.randn(2, OBSERVATION_DIM), torch.randn(2, HORIZON * ACTION_DIM)
    torch.testing.assert_close(program(x, z), agent.act(x, {"noise": z[:, None]}))
    out = capsys.readouterr().out
    assert "batch x 5" in out
    assert "ms at batch 1 on cpu" in out
    assert SNIPPET.splitlines()[3] in out


@pytest.mark.parametrize("name", ["qam-e", "ifql"])
@pytest.mark.slow
def test_ten_lines_run_the_policy_without_this_package(tmp_path, name):
    assert len(SNIPPET.splitlines()) <= 10
    write_checkpoint(tmp_path, name)
    run_export(ExportConfig(tmp_path / "checkpoint.pt", folder=tmp_path / "robot", repeats=1))
    own = ("applications", "flows", "adjoint", "torchdiffeq", "ogbench")
    check = (
        "import runpy, sys\n"
        "got = runpy.run_path('snippet.py')\n"
        f"assert got['actions'].shape == ({HORIZON}, {ACTION_DIM}), got['actions'].shape\n"
        "assert got['actions'].abs().max() <= 1\n"
        f"loaded = {{m.partition('.')[0] for m in sys.modules}} & set({own})\n"
        "assert not loaded, loaded\n"
    )
    (tmp_path / "robot" / "snippet.py").write_text(SNIPPET)
    done = subprocess.run(
        [sys.executable, "-I", "-c", check],
        cwd=tmp_path / "robot",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tensor([[" in done.stdout


@pytest.mark.slow
def test_zeros_repeat_and_other_noise_varies():
    policy = Policy(make("qam"))
    program = read_back(program_bytes(policy))
    x, z = torch.randn(1, OBSERVATION_DIM), torch.zeros(1, policy.noise_dim)
    assert torch.equal(program(x, z), program(x, z))
    assert not torch.equal(program(x, z), program(x, z + 1))


@pytest.mark.slow
def test_a_program_that_acts_otherwise_is_refused_and_not_written(tmp_path, monkeypatch):
    write_checkpoint(tmp_path)
    wrong = program_bytes(Policy(make("qam", flow_steps=5)))
    monkeypatch.setattr(export, "program_bytes", lambda policy: wrong)
    with pytest.raises(RunError, match="must act as the agent to 1e-06, differs by"):
        run_export(ExportConfig(tmp_path, repeats=1))
    assert not (tmp_path / "policy.pt2").exists()


def test_nan_is_a_difference():
    policy = Policy(make("qam"))
    assert not largest_difference(policy, lambda x, z: policy(x, z) * float("nan")) <= 1


def test_what_cannot_be_exported_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint: there is no"):
        run_export(ExportConfig(tmp_path / "none"))
    write_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        run_export(ExportConfig(tmp_path, repeats=0))
    with pytest.raises(ValueError, match="device: cannot use 'warp'"):
        run_export(ExportConfig(tmp_path, device="warp"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="folder: cannot write"):
        run_export(ExportConfig(tmp_path, folder=tmp_path / "file"))
    content = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        run_export(ExportConfig(tmp_path))
