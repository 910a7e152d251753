"""Every page: its commands parse, and the files and headings that it links to exist."""

import re

import pytest
from helpers.pages import ROOT, Page, parse

PAGES = [
    Page(str(path.relative_to(ROOT)))
    for path in (
        ROOT / "README.md",
        *sorted(ROOT.glob("docs/**/*.md")),
        ROOT / "benchmarks/README.md",
    )
]
COMMANDS = [
    (page.name, command)
    for page in PAGES
    if page.name != "docs/extending.md"  # whose commands test_extending.py runs
    for command in page.commands()
]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder but for the checkout that commands of the speed benchmark name."""
    peer = tmp_path / "CHECKOUT" / "agents" / "qam.py"
    peer.parent.mkdir(parents=True)
    peer.touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_parse(page, command, elsewhere):
    parse(command)


@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "python -m applications.toy2d run --targets moons",
        "python -m applications.rl train --agent qam",
        "python -m benchmarks.tilt_speed --device tpu --clock sun",
        "python -m benchmarks.nothing",
        "python nothing.py",
    ],
)
def test_commands_that_do_not_exist_are_found(command, elsewhere):
    with pytest.raises((AssertionError, ImportError, SystemExit, ValueError)):
        parse(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_and_headings_exist(page):
    for name, heading in page.links():
        path = (ROOT / page.name).parent / name if name else ROOT / page.name
        assert path.exists(), name
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in slugs, f"{name}#{heading}"


def test_every_page_is_linked_from_the_readme_or_from_a_page_that_is():
    seen, queue = set(), [Page("README.md")]
    while queue:
        page = queue.pop()
        seen.add(page.name)
        for name, _ in page.links():
            path = ((ROOT / page.name).parent / name).resolve()
            if path.suffix == ".md" and str(path.relative_to(ROOT)) not in seen:
                queue.append(Page(str(path.relative_to(ROOT))))
    assert {page.name for page in PAGES} <= seen
