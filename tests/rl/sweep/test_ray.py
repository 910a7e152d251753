"""Sweeps on an engine of Ray on this machine, with workers that are killed, and runs that fail."""

import json
import os
import random
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from helpers.same_run import equal
from helpers.sweep_jobs import SETTING, starts, sweep_config, train_corridor, train_or_fail

from applications.rl import __main__ as cli
from applications.rl import run_sweep
from applications.rl.sweep import folders
from applications.rl.sweep.ray import engine, room
from flows.training import checkpoint as checkpoints

if find_spec("ray") is None:  # importing it would be too early, see `QUIET`
    reason = "Ray is not installed: pip install 'adjoint-matching[cluster]'"
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def local():
    """One engine for all tests here, each of whose sweeps uses it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where workers find these modules
        with engine(cpus=2):
            yield


class Killer(threading.Thread):
    """Kills the worker of a run once it has done so many updates; ``killed`` counts."""

    def __init__(self, targets):
        super().__init__(daemon=True)
        self.targets, self.killed, self.stopped = dict(targets), 0, False

    def run(self):
        while self.targets and not self.stopped:
            for run, target in [*self.targets.items()]:
                worker = folders.read_json(run.folder / "worker.json")
                if worker and folders.updates_done(run.folder) >= target:
                    os.kill(worker["pid"], signal.SIGKILL)
                    self.killed += 1
                    del self.targets[run]
            time.sleep(0.01)


def test_workers_killed_at_random_change_no_result(tmp_path):
    calm, disturbed = (
        sweep_config(
            tmp_path / name,
            agents=("bc", "qam"),
            seeds=("0-5",),
            seeds_per_job=2,
            setting=replace(SETTING, offline_steps=40),
        )
        for name in ("calm", "disturbed")
    )
    torch.set_flush_denormal(True)  # as in a worker
    try:
        for job in calm.plan.jobs:
            train_corridor(job.config)
    finally:
        torch.set_flush_denormal(False)

    rng, runs = random.Random(0), disturbed.plan.runs
    assert len(runs) == 12
    targets = {run: rng.randrange(8, 20) for run in rng.sample(runs, 3)}
    killer = Killer(targets)
    killer.start()
    try:
        states = run_sweep(disturbed, train_corridor, poll=0.1)
    finally:
        killer.stopped = True
    assert {state.name for state in states.values()} == {"done"}
    assert killer.killed == 3
    # One fewer where a kill met the end of a job.
    assert sum(states[job.runs[0]].deaths for job in disturbed.plan.jobs) >= 2
    for run, target in targets.items():
        assert max(starts(run)) >= target - SETTING.checkpoint_every

    for run, other in zip(calm.plan.runs, runs, strict=True):
        expected, found = (checkpoints.load(r.folder / "checkpoint.pt") for r in (run, other))
        assert expected["iteration"] == 40
        assert all(equal(expected[part], found[part]) for part in expected)
        for name in ("metrics.csv", "evaluation.csv", "config.json"):
            content = (run.folder / name).read_bytes()
            assert content.count(b"\n") > 2
            assert (other.folder / name).read_bytes() == content, name
    rows = json.loads(disturbed.results.read_text())
    assert len(rows) == 12 * 2

    began = time.monotonic()
    assert {state.name for state in run_sweep(disturbed, train_or_fail).values()} == {"done"}
    assert time.monotonic() - began < 2  # nothing was submitted
    assert json.loads(disturbed.results.read_text()) == rows


def test_the_command_line(tmp_path, capsys):
    command = (
        f"sweep --tasks gym:Pendulum-v1 gym:Nothing-v3 --folder {tmp_path} --seeds 0 --agents bc "
        "--preset small --offline-steps 4 --no-use-data --online-steps 5000"
    )
    assert cli.main(command.split()) == 1
    assert "offline_steps must be 0 where no data are used" in capsys.readouterr().err
    assert cli.main(f"sweep --tasks gym:Pendulum-v1 --folder {tmp_path} --seeds 0-1".split()) == 1
    captured = capsys.readouterr()
    assert "error: 2 of 2 runs failed\n" in captured.err
    assert "failed: gym:Pendulum-v1 qam seed 0, 1: task 'gym:Pendulum-v1' has no" in captured.out
    assert "done: 0 of 2 runs" in captured.out


def test_what_fails_is_one_line_and_the_others_go_on(tmp_path, capsys):
    config = sweep_config(
        tmp_path,
        tasks=("gym:Pendulum-v1", "gym:Nothing-v3"),
        agents=("bc", "ifql", "fql", "bam"),
        seeds=("0-2",),
        seeds_per_job=3,
        setting=replace(SETTING, offline_steps=40),
        retries=0,
    )
    states = run_sweep(config, train_or_fail, poll=0.1)
    told = {(run.task, run.agent, run.seed): state for run, state in states.items()}
    assert len(told) == 2 * 4 * 3
    for (task, agent, seed), state in told.items():
        note = {
            "bc": "training stopped: loss is nan in iteration 31" if seed == 1 else "",
            "ifql": "workers died without a new checkpoint, 1 in a row; the last: WorkerCrashedErr",
            "fql": "KeyError: 'no such thing'",
            "bam": "",  # a death after a checkpoint does not count
        }[agent]
        note = "unknown task 'gym:Nothing-v3'" if "Nothing" in task else note
        assert state.name == ("failed" if note else "done")
        assert state.note.startswith(note)
        assert "\n" not in state.note
    assert told["gym:Pendulum-v1", "bam", 0].deaths == 1
    rows = {(row["agent"], row["seed"]) for row in json.loads(config.results.read_text())}
    assert rows == {("bc", 0), ("bc", 2), ("bam", 0), ("bam", 1), ("bam", 2)}

    captured = capsys.readouterr()
    assert captured.out == ""  # nothing of Ray's own
    lines = captured.err.splitlines()
    assert lines[-1].startswith("24 runs: 19 failed, 5 done")
    assert all(re.match("training|waiting|failed|done", line) for line in lines[:-1])
    assert sum(line.startswith("failed") for line in lines) == 7  # those that were tried


def test_room_is_what_the_nodes_hold():
    assert (room(1, 0), room(2, 0), room(0.5, 0), room(3, 0)) == (2, 1, 4, 0)
    assert room(1, 1) == 0
