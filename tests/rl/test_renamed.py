"""Options of earlier versions are refused by name, on command lines and in Python."""

import json
from dataclasses import fields, replace

import pytest

from applications.rl import AGENTS, Setting, TrainConfig
from applications.rl import __main__ as cli
from applications.rl.run_folder import claim, load_agent
from applications.rl.training.config import EXECUTION_OPTIONS
from flows.training import CheckpointError, checkpoint

TASK = "gym:Pendulum-v1"


def names(*configurations):
    return {field.name for configuration in configurations for field in fields(configuration)}


def test_new_names_exist_and_old_ones_do_not():
    known = names(TrainConfig, *(agent.config_class for agent in AGENTS.values()))
    assert set(TrainConfig.renamed.values()) <= known
    assert not set(TrainConfig.renamed) & known


@pytest.mark.parametrize("configuration", [TrainConfig, Setting])
def test_old_arguments_are_refused_in_python(configuration):
    expected = f"{configuration.__name__}: the argument 'together' was renamed to 'stacked'"
    with pytest.raises(TypeError, match=expected):
        configuration(task=TASK, together=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_thing'"):
        configuration(task=TASK, no_such_thing=3)
    assert replace(configuration(task=TASK), stacked=3).stacked == 3


def test_old_flags_are_refused():
    for flag, no in (
        ("--eval-beside", ""),
        ("--no-eval-beside", "no-"),
        ("--eval_beside=True", ""),
    ):
        with pytest.raises(ValueError, match=f"was renamed to --{no}background-eval"):
            cli.parse("train", ["--task", TASK, "--agent", "qam", flag])


def test_options_of_execution_are_those_that_leave_the_setting_as_it_is():
    assert {"device", "stacked", "folder", "log_every"} < set(EXECUTION_OPTIONS)
    assert not {"task", "seeds", "precision", "batch_size", "options"} & set(EXECUTION_OPTIONS)


def test_a_run_of_an_earlier_version_says_which_and_what_to_do(tmp_path):
    config = {"offline_steps": 9, "together": 0, "options": {"slow_rate": 0.1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = {"problem": {"agent": "qam", "options.slow_rate": 0.1}, "versions": {"torch": "2.6"}}
    checkpoint.save(tmp_path / "checkpoint.pt", old)
    names = "together is now stacked, slow_rate is now target_rate"
    with pytest.raises(ValueError, match=rf"written by version 0\.1 .*\({names}\); continue it"):
        claim(tmp_path, resume=True, overwrite=False)
    with pytest.raises(CheckpointError, match=r"written by adjoint-matching 0\.1, whose names"):
        load_agent(tmp_path)
    claim(tmp_path, resume=False, overwrite=True)
