"""The README's Python runs, and what it says twice it says in the same words."""

import re

import pytest
from helpers.pages import Page, run

from adjoint import KERNELS
from applications.rl.export import SNIPPET

README = Page("README.md")


@pytest.mark.parametrize("code", [c for c in README.blocks("python") if c != SNIPPET])
@pytest.mark.slow
def test_python_runs(code, capsys):
    """As written, but for the numbers of iterations."""
    assert "iterations=" in code
    run(code, iterations="iterations=3")
    assert "log_weight_std" in capsys.readouterr().out


def test_the_exported_policy_is_run_by_the_code_that_is_tested():
    assert SNIPPET in README.blocks("python")


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_described_in_the_same_words_as_by_the_command_line(name):
    assert f"| `{name}` | {KERNELS[name].summary} |" in README.text.replace("–", "-")


def test_opens_with_the_commands_of_make():
    assert README.commands()[:3] == ["make demo", "make test", "make quick"]


def test_no_placeholder_remains():
    assert not re.search(r"^[A-Z][A-Z0-9]{2,}$", README.text, flags=re.MULTILINE)
