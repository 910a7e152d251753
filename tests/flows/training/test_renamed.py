"""Options by the names of earlier versions are refused, and told by their new names."""

import pickle
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from flows.training.renamed import RefusesOldNames, old_options, refuse_old_flags

RENAMED = {"slow_rate": "target_rate"}


@dataclass(frozen=True)
class Config(RefusesOldNames):
    renamed: ClassVar = RENAMED
    target_rate: int = 0


@pytest.mark.parametrize(
    ("flag", "new"),
    [
        ("--slow-rate", "--target-rate"),
        ("--slow_rate=3", "--target-rate"),
        ("--no-slow-rate", "--no-target-rate"),
        ("--run.slow-rate", "--run.target-rate"),
    ],
)
def test_old_flags_are_refused_with_the_new_name(flag, new):
    with pytest.raises(ValueError, match=f"was renamed to {new}$"):
        refuse_old_flags(["--folder", "x", flag], RENAMED)


def test_values_and_new_flags_pass():
    refuse_old_flags(["slow-rate", "--target-rate", "3", "--other", "slow_rate"], RENAMED)
    assert Config(target_rate=3).target_rate == 3
    assert old_options(["target_rate"], RENAMED) == ""


def test_old_arguments_are_refused_with_the_new_name():
    with pytest.raises(TypeError, match="Config: the argument 'slow_rate' was renamed to 'target_"):
        Config(slow_rate=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_thing'"):
        Config(no_such_thing=3)


def test_a_configuration_is_copied_as_before():
    config = Config(target_rate=3)
    assert replace(config, target_rate=4) == Config(4)
    assert pickle.loads(pickle.dumps(config)) == config
