"""Objects by ``module:Name``."""

import sys

import pytest

from applications.common.objects import is_reference, load_object


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
