"""The table of benchmarks/README.md has every question and every record there is."""

import re
from fnmatch import fnmatch

import pytest
from helpers.pages import ROOT, Page, options_of

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
