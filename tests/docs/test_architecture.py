"""The walks of docs/architecture.md: a traced run makes every hop, in the order of the page."""

import functools
import importlib
import inspect
import re
import sys

import pytest
from helpers.pages import ROOT, Page

from adjoint import TiltConfig, tilt
from flows import MLPVelocity

SECTIONS = re.split(r"^### ", Page("docs/architecture.md").text, flags=re.MULTILINE)[1:]
HOP = re.compile(r"^\d+\. `([\w/]+\.py): ([\w.]+)`", flags=re.MULTILINE)
WALKS = {section.splitlines()[0]: HOP.findall(section) for section in SECTIONS}


@pytest.mark.parametrize("package", ["flows", "adjoint"])
def test_every_file_and_folder_has_its_place_in_the_rooms(package):
    rooms = Page("docs/architecture.md").text.split("```")[1]
    listed = re.search(rf"^{package}/.*\n((?: .*\n)+)", rooms, flags=re.MULTILINE)[1]
    paths = [path for path in (ROOT / package).iterdir() if not path.name.startswith("_")]
    names = {path.stem for path in paths if path.suffix == ".py" and path.stem != "version"}
    names |= {f"{path.name}/" for path in paths if path.is_dir()}
    assert len(names) > 8
    assert names <= set(listed.split())


def code_of(path, name):
    """The code that runs when the function of a hop is called."""
    found = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    if isinstance(found, property):
        found = found.fget
    if isinstance(found, functools.cached_property):
        found = found.func
    if isinstance(found, staticmethod | classmethod):
        found = found.__func__
    return inspect.unwrap(found).__code__


def calls(program):
    """The code objects that a program calls in this thread, in order; also resumed generators."""
    seen = []
    sys.setprofile(lambda frame, event, _: seen.append(frame.f_code) if event == "call" else None)
    try:
        program()
    finally:
        sys.setprofile(None)
    return seen


def a_tilt(folder):
    """A tilt in the plane by the default kernel, without a checkpoint."""
    base = MLPVelocity(2, hidden=(8,))
    few = TiltConfig(iterations=1, steps=3, batch_size=4, certificate_samples=8, base_samples=64)
    tilt(base, lambda x, cond: x.sum(1), shape=(2,), config=few)


def a_training(folder):
    """A training of QAM offline, one seed."""
    pytest.importorskip("gymnasium", reason="needs the packages of the extra rl")
    from helpers.killed_rl import configuration
    from helpers.tiny import Corridor, corridor_data

    from applications.rl import train

    config = configuration(folder, {"offline_steps": 2, "online_steps": 0}, agent="qam")
    train(config, environment=Corridor, dataset=corridor_data())


PROGRAMS = dict(zip(WALKS, (a_tilt, a_training, a_tilt), strict=True))


@pytest.mark.parametrize("walk", WALKS)
def test_the_hops_occur_in_the_order_of_the_page(walk, tmp_path):
    assert 5 <= len(WALKS[walk]) <= 12
    hops = [code_of(*hop) for hop in WALKS[walk]]
    seen = calls(lambda: PROGRAMS[walk](tmp_path))
    place = 0
    for hop, code in zip(WALKS[walk], hops, strict=True):
        assert code in seen[place:], f"{': '.join(hop)} does not follow its predecessor"
        place = seen.index(code, place) + 1
