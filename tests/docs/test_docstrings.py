"""The first line of a docstring is understood alone: it says, and does not refer to other lines."""

import ast
import re

import pytest
from helpers.pages import ROOT

REFERS = re.compile(
    r"(What|Of|Those|The same|Whether|It|Its|That|And of|The (first|second|rest|last))\b"
)
NO_VERB = re.compile(r"[a-z]|(An?|The|Every|Each|All|No|Any|Both|One)\b|\w+ of\b|\w*[^s\W]s\b")
"""Beginnings of a phrase without its verb: an article, a noun with `of`, a plural."""
FOLDERS = ("flows", "adjoint", "applications", "benchmarks", "examples")


def first_lines(path):
    """The first line of every docstring of a file, with its place."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", text.split("\n")[0]


def lines_of_functions(path):
    """The first line of every docstring of a function that is no property, with its place."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            text = ast.get_docstring(node)
            decorators = " ".join(ast.unparse(each) for each in node.decorator_list)
            if text and "property" not in decorators:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", text.split("\n")[0]


@pytest.mark.parametrize("folder", ["flows", "applications"])
def test_first_lines_of_functions_begin_with_a_verb(folder):
    paths = [p for p in (ROOT / folder).rglob("*.py") if "agents" not in p.parts]
    lines = [line for path in paths for line in lines_of_functions(path)]
    assert len(lines) > 100
    assert [line for line in lines if NO_VERB.match(line[1])] == []


@pytest.mark.parametrize(
    "line", ["A mean.", "The mean of x.", "Mean of x.", "Means by name.", "log p(x)."]
)
def test_a_phrase_without_a_verb_is_found(line):
    assert NO_VERB.match(line)
    assert not NO_VERB.match(f"Compute {line}")
    assert not NO_VERB.match("Pass it on.")


@pytest.mark.parametrize("folder", FOLDERS)
def test_first_lines_say_something(folder):
    lines = [line for path in (ROOT / folder).rglob("*.py") for line in first_lines(path)]
    assert len(lines) > 0
    assert [line for line in lines if REFERS.match(line[1])] == []
