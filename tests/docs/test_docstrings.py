"""The first line of a docstring is understood alone: it says, and does not refer to other lines."""

import ast
import re

import pytest
from helpers.pages import ROOT

REFERS = re.compile(
    r"(What|Of|Those|The same|Whether|It|Its|That|And of|The (first|second|rest|last))\b"
)
FOLDERS = ("flows", "adjoint", "applications", "benchmarks", "examples")


def first_lines(path):
    """The first line of every docstring of a file, with its place."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", text.split("\n")[0]


@pytest.mark.parametrize("folder", FOLDERS)
def test_first_lines_say_something(folder):
    lines = [line for path in (ROOT / folder).rglob("*.py") for line in first_lines(path)]
    assert len(lines) > 0
    assert [line for line in lines if REFERS.match(line[1])] == []
