"""Objects by ``module:Name``, and options by the names of earlier versions."""

import sys

import pytest

from applications.common.objects import is_reference, load_object
from applications.common.renamed import old_options, refuse_old_arguments, refuse_old_flags


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "mine_for_tests.py").write_text("Spiral = 3\n")
    (tmp_path / "needy_for_tests.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("mine_for_tests", None)


def test_references_have_a_module_and_a_name():
    assert is_reference("package.module:Name")
    for text in ("name", "gym:Pendulum-v1", "a:b:c", ":name", "module:", "1a:b"):
        assert not is_reference(text), text


def test_an_object_is_imported_from_its_module(module):
    assert load_object("mine_for_tests:Spiral", "target") == 3


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("spiral", "target must have the form module:Name, got 'spiral'"),
        ("no_such_module:Spiral", "target: there is no module 'no_such_module' in the current"),
        ("mine_for_tests:Ring", "target: the module 'mine_for_tests' has no 'Ring'"),
        ("mine_for_tests.deep:Ring", "there is no module 'mine_for_tests.deep'"),
    ],
)
def test_what_is_not_there_is_named(module, reference, message):
    with pytest.raises(ValueError, match=message):
        load_object(reference, "target")


def test_a_package_that_the_module_needs_is_another_error(module):
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        load_object("needy_for_tests:Spiral", "target")


RENAMED = {"slow_rate": "target_rate"}


@pytest.mark.parametrize(
    ("flag", "new"),
    [
        ("--slow-rate", "--target-rate"),
        ("--slow_rate=3", "--target-rate"),
        ("--no-slow-rate", "--target-rate"),
        ("--run.slow-rate", "--run.target-rate"),
    ],
)
def test_old_flags_are_refused_with_the_new_name(flag, new):
    with pytest.raises(ValueError, match=f"was renamed to {new}$"):
        refuse_old_flags(["--folder", "x", flag], RENAMED)


def test_values_and_new_flags_pass():
    refuse_old_flags(["slow-rate", "--target-rate", "3", "--other", "slow_rate"], RENAMED)
    refuse_old_arguments("Config", ["target_rate"], RENAMED)
    assert old_options(["target_rate"], RENAMED) == ""


def test_old_arguments_are_refused_with_the_new_name():
    with pytest.raises(TypeError, match="Config: the argument 'slow_rate' was renamed to 'target_"):
        refuse_old_arguments("Config", ["slow_rate"], RENAMED)
