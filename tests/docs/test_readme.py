"""The README's commands parse, its Python runs, and its files exist."""

import re
import shlex
from pathlib import Path

import pytest

from applications.rl import __main__ as rl
from applications.rl.export import SNIPPET
from applications.toy2d.__main__ import parse
from applications.toy2d.kernels import DESCRIPTIONS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(prefix: str) -> list[str]:
    whole = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = [line.split("#")[0].strip() for line in whole.splitlines()]
    return [line.removeprefix(prefix).strip() for line in lines if line.startswith(prefix)]


@pytest.mark.parametrize("command", commands("python -m applications.toy2d"))
def test_toy_commands_parse(command):
    parse(shlex.split(command))


@pytest.mark.parametrize("command", commands("python -m applications.rl"))
def test_reinforcement_learning_commands_parse(command):
    name, *options = shlex.split(command)
    rl.parse(name, options)


@pytest.mark.parametrize("target", commands("make"))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("code", [c for c in blocks("python") if c != SNIPPET])
def test_python_runs(code, capsys):
    """As written, but for the numbers of iterations."""
    assert "iterations=" in code
    exec(re.sub(r"iterations=\d+", "iterations=3", code), {})
    assert "log_weight_std" in capsys.readouterr().out


@pytest.mark.parametrize("link", re.findall(r"\]\(((?:docs|benchmarks)/[^)]+)\)", README))
def test_linked_files_and_headings_exist(link):
    path, _, heading = link.partition("#")
    assert (ROOT / path).is_file()
    if heading:
        titles = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), flags=re.MULTILINE)
        assert heading in [title.lower().replace(" ", "-") for title in titles]


def test_the_exported_policy_is_run_by_the_code_that_is_tested():
    assert SNIPPET in blocks("python")


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_kernels_are_described_in_the_same_words_as_by_the_command_line(name):
    assert f"| `{name}` | {DESCRIPTIONS[name]} |" in README.replace("–", "-")


def test_opens_with_two_commands():
    assert commands("make")[:2] == ["demo", "test"]


def test_no_placeholder_remains():
    assert not re.search(r"^[A-Z][A-Z0-9]{2,}$", README, flags=re.MULTILINE)
