"""The commands that start agents from one behaviour run as they stand, on small data."""

import re
import shlex

import numpy as np
import pytest
from helpers.pages import Page

from applications.rl import __main__ as cli
from applications.rl.sweep import worker

SMALLER = (
    (r"pointmaze-medium-navigate-singletask-task1-v0", "gym:Pendulum-v1 --data data.npz"),
    (r"--offline-steps \d+", "--offline-steps 4 --eval-episodes 1 --environments 1"),
    (r"--eval-every [1-9]\d*", "--eval-every 4"),
)


def commands(name):
    """The commands of a page that make a behaviour and start from it, made smaller."""
    (block,) = [b for b in Page(name).blocks("bash") if "--behaviour" in b]
    for pattern, replacement in SMALLER:
        block = re.sub(pattern, replacement, block)
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder with random transitions of Pendulum."""
    rng = np.random.default_rng(0)
    rows = {name: rng.normal(size=(60, 3)) for name in ("observations", "next_observations")}
    rows |= {"actions": rng.uniform(-1, 1, (60, 1)), "rewards": rng.normal(size=60)}
    ends = (np.arange(60) % 20 == 19).astype(float)
    np.savez(tmp_path / "data.npz", **rows, terminals=ends, masks=np.ones(60))
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_by_train(data, tmp_path, capsys):
    for _, _, module, name, *options in commands("docs/agents/README.md"):
        assert module == "applications.rl"
        assert cli.main([name, *options]) == 0, capsys.readouterr().err
    found = {p.parent.name for p in (tmp_path / "outputs").glob("**/seed0")}
    assert found == {"behaviour", "qam", "fql"}


@pytest.mark.slow
def test_by_sweep(data, tmp_path):
    """Job by job, in the order of the plan, without Ray."""
    for _, _, module, name, *options in commands("docs/sweep.md"):
        assert module == "applications.rl"
        config, _ = cli.parse(name, options)
        for job in config.plan.jobs:
            assert worker.work(job, "one", worker.train_task) == {}
    assert len([*(tmp_path / "outputs/shared").glob("*/*/seed*/finished.json")]) == 7
