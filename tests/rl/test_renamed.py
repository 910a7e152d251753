"""Options of earlier versions are refused by name, on command lines and in Python."""

from dataclasses import fields, replace

import pytest

from applications.rl import AGENTS, Setting, TrainConfig
from applications.rl.renamed import RENAMED, refuse_old_flags
from applications.rl.training.config import EXECUTION_OPTIONS

TASK = "gym:Pendulum-v1"


def names(*configurations):
    return {field.name for configuration in configurations for field in fields(configuration)}


def test_new_names_exist_and_old_ones_do_not():
    known = names(TrainConfig, *(config for config, _ in AGENTS.values()))
    assert set(RENAMED.values()) <= known
    assert not set(RENAMED) & known


@pytest.mark.parametrize("configuration", [TrainConfig, Setting])
def test_old_arguments_are_refused_in_python(configuration):
    expected = f"{configuration.__name__}: the argument 'together' was renamed to 'stacked'"
    with pytest.raises(TypeError, match=expected):
        configuration(task=TASK, together=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_thing'"):
        configuration(task=TASK, no_such_thing=3)
    assert replace(configuration(task=TASK), stacked=3).stacked == 3


def test_old_flags_are_refused():
    for flag in ("--eval-beside", "--no-eval-beside", "--eval_beside=True"):
        with pytest.raises(ValueError, match="was renamed to --background-eval"):
            refuse_old_flags(["--agent", "qam", flag])
    refuse_old_flags(["--agent", "graph", "graph", "--cuda-graphs", "10"])


def test_options_of_execution_are_those_that_leave_the_setting_as_it_is():
    assert {"device", "stacked", "folder", "log_every"} < set(EXECUTION_OPTIONS)
    assert not {"task", "seeds", "precision", "batch_size", "options"} & set(EXECUTION_OPTIONS)
