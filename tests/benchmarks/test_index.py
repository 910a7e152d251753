"""The table of benchmarks/README.md has every question and every record there is."""

import ast
import re
from fnmatch import fnmatch

import pytest
from helpers.pages import ROOT, Page, options_of, parse

FOLDER = ROOT / "benchmarks"
TABLE = Page("benchmarks/README.md")


def questions():
    """Files and packages that `python -m benchmarks.NAME` runs."""
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    return files | {path.parent.name for path in FOLDER.glob("*/__main__.py")}


def test_every_question_is_in_the_table():
    rows = [line for line in TABLE.text.splitlines() if line.startswith("| ")]
    assert set(re.findall(r"python -m benchmarks\.(\w+)", "\n".join(rows))) == questions()


def test_the_folder_holds_questions_only():
    folders = {path.name for path in FOLDER.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders - questions() == {"common", "results"}


def test_every_record_is_in_the_table():
    named = re.findall(r"results/([\w.]+)", TABLE.text) + re.findall(
        r"`(\w+_\*\.json)`", TABLE.text
    )
    for path in (FOLDER / "results").iterdir():
        assert any(fnmatch(path.name, name) for name in named), path.name


@pytest.mark.parametrize("question", sorted(questions()))
def test_every_benchmark_writes_where_output_says(question):
    assert options_of(f"benchmarks.{question}")().output.parent == FOLDER / "results"


def commands():
    """The commands in the docstrings of the questions, without optional parts."""
    for path in FOLDER.rglob("*.py"):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("    python -m"):
                yield re.split(r"\s#|\[", line)[0].strip()


@pytest.mark.parametrize("command", sorted(commands()))
def test_commands_in_docstrings_parse(command):
    parse(command)
