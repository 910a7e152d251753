"""Dotted names in backticks, in docstrings, comments and pages, are names that Python imports."""

import pkgutil
import re

import pytest
from helpers.pages import ROOT

PACKAGES = ("flows", "adjoint", "applications", "benchmarks")
DOTTED = re.compile(rf"`((?:{'|'.join(PACKAGES)})(?:\.\w+)+)(?![\w.])")
FOLDERS = (*PACKAGES, "examples", "docs")


def exists(name):
    """Tell whether a dotted name is a module or in one; an attribute may be only annotated."""
    try:
        pkgutil.resolve_name(name)
    except AttributeError:
        owner, _, last = name.rpartition(".")
        return exists(owner) and last in getattr(pkgutil.resolve_name(owner), "__annotations__", {})
    except ModuleNotFoundError as error:
        pytest.skip(f"needs the package {error.name}")
    return True


def files():
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return [p for p in (ROOT / "README.md", *paths) if p.suffix in (".py", ".md")]


def named(text):
    return [
        (n, name) for n, line in enumerate(text.splitlines(), 1) for name in DOTTED.findall(line)
    ]


NAMED = {}
for path in files():
    for number, name in named(path.read_text(encoding="utf-8")):
        NAMED.setdefault(name, f"{path.relative_to(ROOT)}:{number}")


@pytest.mark.parametrize("name", sorted(NAMED))
def test_names_exist(name):
    assert exists(name), f"{NAMED[name]}: {name}"


def test_names_are_found_and_false_ones_are_refused():
    text = (
        "`flows.grid`, ``adjoint.tilt(x)``, `benchmarks.speed --check`\n`flows.no.such` flows.path"
    )
    found = named(text)
    assert [name for _, name in found] == [
        "flows.grid",
        "adjoint.tilt",
        "benchmarks.speed",
        "flows.no.such",
    ]
    assert [exists(name) for _, name in found] == [True, True, True, False]
    assert not exists("flows.training.callbacks.CSVLogger")
    assert len(NAMED) > 50
