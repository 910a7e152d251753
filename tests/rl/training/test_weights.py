"""Training goes on from a trained agent: on other data, in another phase, with a new optimiser."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.killed_rl import configuration
from helpers.tiny import Corridor, corridor_data, options

from applications.rl import train
from flows import Callback, StopTraining
from flows.training import CheckpointError

torch.set_num_threads(1)

BRIEF = {"offline_steps": 6, "online_steps": 0, "eval_every": 0, "checkpoint_every": 3}
SIZES = {"horizon": 3, "discount": 0.9, "observation_scale": 2.0}


def config_of(folder, agent="qam", own=None, **changes):
    known = replace(options(agent, **SIZES), **(own or {}))
    changes = BRIEF | {"resume": False} | changes
    return configuration(folder, changes, agent=agent, options=known)


def fit(folder, agent="qam", own=None, *, data=None, callbacks=(), environment=Corridor, **changes):
    config = config_of(folder, agent, own, **changes)
    data = None if not config.use_data else data or other_data()
    return train(config, environment=environment, dataset=data, callbacks=callbacks)


def other_data():
    """Data of another mean and deviation than the trained agent's."""
    data = corridor_data()
    return replace(
        data,
        observations=3 * data.observations + 1,
        next_observations=3 * data.next_observations + 1,
    )


class First(Callback):
    """Stops a training before its first update, and notes the optimiser's state."""

    def on_start(self, trainer):
        self.moments = len(trainer.optimizer.adam.state)
        raise StopTraining("before the first update")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    (run,) = fit(tmp_path_factory.mktemp("trained"), data=corridor_data(), offline_steps=20)
    return run


def assert_same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_all_networks_begin_at_the_weights_with_a_new_optimiser_and_other_options(
    tmp_path, trained
):
    first = First()
    own = {"inverse_temperature": 3.0}
    (run,) = fit(tmp_path, own=own, weights=trained.folder, callbacks=[first])
    assert_same(run.agent, trained.agent)  # among them the mean and deviation of observations
    assert first.moments == 0
    (further,) = fit(tmp_path / "further", weights=trained.folder)
    moved = [
        not torch.equal(x, y)
        for x, y in zip(further.agent.parameters(), trained.agent.parameters(), strict=True)
    ]
    assert all(moved)


def test_an_agent_goes_on_online_without_data(tmp_path, trained):
    phases = {"offline_steps": 0, "online_steps": 10, "start_training": 5, "use_data": False}
    (run,) = fit(tmp_path, weights=trained.folder, callbacks=[First()], **phases)
    assert_same(run.agent, trained.agent)


def test_a_resume_reads_the_digest_and_not_the_weights(tmp_path, trained):
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "checkpoint.pt").write_bytes((trained.folder / "checkpoint.pt").read_bytes())
    (whole,) = fit(tmp_path / "whole", weights=moved)
    (part,) = fit(tmp_path / "parts", weights=moved, offline_steps=3)
    digest = json.loads((part.folder / "config.json").read_text())["weights_digest"]
    assert len(digest) == 16
    (moved / "checkpoint.pt").unlink()
    (resumed,) = fit(tmp_path / "parts", weights=moved, resume=True)
    assert_same(resumed.agent, whole.agent)
    with pytest.raises(CheckpointError, match=f"weights_digest: '{digest}' in the checkpoint"):
        fit(tmp_path / "parts", resume=True, offline_steps=9)


@pytest.mark.parametrize(
    ("agent", "own", "message"),
    [
        ("bc", {}, r"has agent='qam', as the agent must have, got agent='bc'"),
        ("qam", {"hidden": (8,)}, r"has hidden=\[16, 16\], as the .* got hidden=\[8\]"),
        ("qam", {"observation_scale": 1.0}, r"observation_scale=2\.0, .* observation_scale=1\.0"),
        ("qam", {"horizon": 2}, r"has horizon=3, .* got horizon=2"),
        ("qam", {"critics": 3}, r"do not fit the agent: .*critic"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_run_is_deleted(
    tmp_path, trained, agent, own, message
):
    (old,) = fit(tmp_path, "bc", offline_steps=1)
    before = (old.folder / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, agent, own, weights=trained.folder, overwrite=True)
    assert (old.folder / "checkpoint.pt").read_bytes() == before


def test_sizes_of_the_data_are_checked(tmp_path, trained):
    data = corridor_data()
    wide = np.concatenate([data.observations, data.observations[:, :1]], 1)
    data = replace(data, observations=wide, next_observations=wide)
    with pytest.raises(ValueError, match=r"has observation_dim=4, .* got observation_dim=5"):
        fit(tmp_path, weights=trained.folder, data=data)


def test_weights_are_named_by_task_and_seed_and_must_exist(tmp_path, trained):
    config = config_of("x", weights=tmp_path / "{task}" / "seed{seed}")
    assert config.weights_run(3) == str(tmp_path / "corridor" / "seed3")
    with pytest.raises(FileNotFoundError, match="weights: there is no"):
        fit(tmp_path, weights=tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"name a run below it, such as .*seed0"):
        fit(tmp_path, weights=trained.folder.parent)
    with pytest.raises(ValueError, match="behaviour must not be given beside weights"):
        config_of("x", weights=trained.folder, behaviour=trained.folder)
