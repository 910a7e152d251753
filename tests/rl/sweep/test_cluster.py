"""A sweep on a cluster of two nodes of Ray, one of which dies."""

import os
import sys
import threading
import time
from dataclasses import replace
from importlib.util import find_spec

import pytest
from helpers.sweep_jobs import SETTING, starts, sweep_config, train_corridor

from applications.rl import RunError, run_sweep
from applications.rl.sweep import folders as sweep_folders
from applications.rl.sweep.ray import QUIET
from flows.training import checkpoint as checkpoints

if find_spec("ray") is None:  # importing it would be too early, see `QUIET`
    reason = "Ray is not installed: pip install 'adjoint-matching[cluster]'"
    pytest.skip(reason, allow_module_level=True)


LONG = replace(SETTING, offline_steps=150, eval_every=50)


@pytest.fixture
def cluster(monkeypatch):
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where workers find these modules
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield nodes
    nodes.shutdown()


def test_the_jobs_of_a_node_that_dies_go_on_at_another(tmp_path, cluster):
    other = cluster.add_node(num_cpus=1)
    config = sweep_config(
        tmp_path, seeds=("0-5",), seeds_per_job=3, setting=LONG, address=cluster.address
    )
    runs = config.plan.runs
    nodes = set()

    def kill():
        while True:
            for run in runs:
                node = sweep_folders.read_json(run.folder / "worker.json").get("node")
                nodes.add(node)
                if node == other.node_id and sweep_folders.updates_done(run.folder) >= 20:
                    return cluster.remove_node(other, allow_graceful=False)
            time.sleep(0.01)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    states = run_sweep(config, train_corridor, poll=0.1)
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert len(nodes - {None}) == 2
    assert {state.name for state in states.values()} == {"done"}
    assert sorted(state.deaths for state in states.values()) == [0, 0, 0, 1, 1, 1]
    assert any(0 < start < 150 for run in runs for start in starts(run))
    for run in runs:
        assert checkpoints.load(run.folder / "checkpoint.pt")["iteration"] == 150


def test_no_cluster_on_this_machine_is_one_line(tmp_path, monkeypatch):
    if os.path.exists("/tmp/ray/ray_current_cluster"):
        pytest.skip("there is one")
    with pytest.raises(RunError, match="address: Ray cannot use auto: Could not find any running"):
        run_sweep(sweep_config(tmp_path, address="auto"), train_corridor)
