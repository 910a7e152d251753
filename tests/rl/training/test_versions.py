"""Checkpoints of another version: options that did not exist yet, options and networks now gone."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.killed_rl import configuration
from helpers.tiny import Corridor, corridor_data, options

from applications.rl import load_agent, train
from applications.rl.sweep.folders import is_other
from applications.rl.sweep.plan import Run
from flows.training import CheckpointError
from flows.training import checkpoint as checkpoints

torch.set_num_threads(1)

BRIEF = {"offline_steps": 4, "online_steps": 0, "eval_every": 0}
OPTIONS = options("bc", horizon=3, discount=0.9)
LATER = "solver"
"""An option of bc that the tests take for one that did not exist yet."""


def config_of(folder, steps=4, **changes):
    own = replace(OPTIONS, **changes)
    return configuration(folder, BRIEF | {"offline_steps": steps}, agent="bc", options=own)


def fit(*arguments, **changes):
    config = config_of(*arguments, **changes)
    return train(config, environment=Corridor, dataset=corridor_data())[0]


def rewrite(folder, change):
    """Change the checkpoint of a run, as another version would have written it."""
    path = folder / "checkpoint.pt"
    state = checkpoints.load(path)
    state["versions"]["adjoint-matching"] = "0.1.9"
    change(state)
    checkpoints.save(path, state)


def test_a_checkpoint_of_before_an_option_existed_goes_on_with_its_default(tmp_path):
    whole = fit(tmp_path / "whole", 8)
    run = fit(tmp_path / "parts")
    rewrite(run.folder, lambda state: state["identity"].pop(f"options.{LATER}"))
    assert load_agent(run.folder).agent.config == OPTIONS
    resumed = fit(tmp_path / "parts", 8)
    for x, y in zip(resumed.agent.parameters(), whole.agent.parameters(), strict=True):
        assert torch.equal(x, y)
    identity = checkpoints.load(run.folder / "checkpoint.pt")["identity"]
    assert identity[f"options.{LATER}"] == getattr(OPTIONS, LATER)


def test_a_checkpoint_of_before_an_option_existed_refuses_another_value_of_it(tmp_path):
    run = fit(tmp_path)
    rewrite(run.folder, lambda state: state["identity"].pop(f"options.{LATER}"))
    with pytest.raises(CheckpointError) as error:
        fit(tmp_path, 8, **{LATER: "ab2"})
    message = str(error.value)
    assert "options.solver: absent in the checkpoint, which stands for 'euler'" in message
    assert "expected 'ab2'; it was written by adjoint-matching 0.1.9" in message
    assert "\n" not in message


def test_the_seed_of_a_run_has_no_default(tmp_path):
    run = fit(tmp_path)
    rewrite(run.folder, lambda state: state["identity"].pop("seed"))
    with pytest.raises(CheckpointError, match="seed: 'absent' in the checkpoint, expected 0"):
        fit(tmp_path, 8)


def test_options_that_are_gone_are_named_with_the_version_that_had_them(tmp_path):
    run = fit(tmp_path)
    rewrite(run.folder, lambda state: state["identity"].update({"options.dropout": 0.1}))
    written = "written by adjoint-matching 0.1.9"
    with pytest.raises(CheckpointError, match=f"BCConfig of version .*: dropout; .*{written}"):
        load_agent(run.folder)
    with pytest.raises(CheckpointError, match=rf"options\.dropout: 0\.1 in the .*{written}"):
        fit(tmp_path, 8)


def test_networks_of_another_name_are_named_with_the_version_that_had_them(tmp_path):
    run = fit(tmp_path)

    def rename(state):
        module = state["module"]
        for name in [name for name in module if name.startswith("behaviour.")]:
            module["cloned." + name.partition(".")[2]] = module.pop(name)

    rewrite(run.folder, rename)
    expected = (
        r"lacks behaviour, and has cloned besides; it was written by adjoint-matching 0\.1\.9$"
    )
    with pytest.raises(CheckpointError, match=expected):
        load_agent(run.folder)
    with pytest.raises(
        CheckpointError, match=r"not fit this.*cloned.*by adjoint-matching 0\.1\.9$"
    ):
        fit(tmp_path, 8)


def test_a_sweep_goes_on_with_a_run_of_before_an_option_existed(tmp_path):
    run = fit(tmp_path)
    path = run.folder / "config.json"
    content = json.loads(path.read_text())
    del content["options"][LATER]
    path.write_text(json.dumps(content))
    planned = Run("corridor", "bc", 0, run.folder)
    assert not is_other(planned, config_of(tmp_path))
    assert is_other(planned, config_of(tmp_path, **{LATER: "ab2"}))
