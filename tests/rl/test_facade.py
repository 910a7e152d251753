"""The names of `applications.rl`: all there, the same for editors, and cheap to import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import applications.rl as rl

HEAVY = ("mujoco", "ogbench", "ray")


def imported(program):
    """Top-level packages that a fresh process has imported after ``program``."""
    program += "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_every_name_is_there_and_another_one_is_not():
    for name in rl.__all__:
        assert getattr(rl, name) is not None
        assert name in dir(rl)
    assert rl.Trained.__module__ == "applications.rl.training.train"
    with pytest.raises(ImportError, match="no_such_name"):
        from applications.rl import no_such_name  # noqa: F401


def test_editors_see_the_names_that_there_are():
    tree = ast.parse(Path(rl.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        node.module.removeprefix("applications.rl."): " ".join(a.name for a in node.names)
        for node in block.body
    }
    assert seen == rl._FILES


def test_importing_the_facade_is_cheap():
    assert not imported("import applications.rl") & {"torch", "numpy", "gymnasium", *HEAVY}


@pytest.mark.slow
def test_no_name_needs_a_simulator_or_a_cluster():
    assert not imported(f"from applications.rl import {', '.join(rl.__all__)}") & set(HEAVY)
