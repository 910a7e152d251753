"""The glossary's concepts exist where it says, and names that were given up are nowhere."""

import importlib
import re

import pytest
from helpers.pages import ROOT, Page

GLOSSARY = Page("docs/glossary.md")
ROWS = [
    [cell.strip() for cell in line.strip("| ").split(" | ")]
    for line in GLOSSARY.text.replace("| |", "| – |").splitlines()
    if line.startswith("| ") and not line.startswith("| name ")
]
FORMER = (
    r"slow cop(y|ies)|slow_critic|update_slow",  # target network
    r"eval.beside|eval_beside",  # background evaluation
    r"read_[va]\b|read_next",  # residual
    r"train_together|TwoPartLoss",  # stacked trainers
    r"ReplayBuffer",  # trajectory buffer
    r"watchers\(",  # training callbacks
    r"_judged\(|train_judge|compare_laws",  # diagnostics, metrics, distributions
    r"probe_samples|known_rewards",  # base samples, reward record
    r"\blaws?\b|\bjudges?\b|\bprobe\b",  # distribution, certificate or metrics, measurement
)
"""Names that were given up, with the name that replaced them."""
RENAMING = re.compile(r'\s*"\w+": "\w+",')
"""A line of a configuration's mapping from former names to new ones, which refuses the former."""


def files():
    folders = ("flows", "adjoint", "applications", "benchmarks", "examples", "docs")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    paths += [ROOT / "README.md"]
    return [p for p in paths if p.suffix in (".py", ".md")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_concept_is_one_sentence_and_exists(row):
    _, _, meaning, where = row
    assert meaning.count(". ") == 0
    assert re.fullmatch(r"[A-Z].+\.|log .+\.", meaning), meaning
    path, name = re.fullmatch(r"`([\w/]+\.py): (\w+)`", where).groups()
    assert (ROOT / path).is_file(), path
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    assert hasattr(module, name), where


def test_no_concept_has_two_entries():
    names = [row[0] for row in ROWS]
    assert len(set(names)) == len(names) > 50


@pytest.mark.parametrize("former", FORMER)
def test_former_names_are_nowhere(former):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(former, line) and not RENAMING.fullmatch(line)
    ]
    assert found == []
