"""The commands `run`, `digits`, `demo` and `list`; `gallery` has a file of its own."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from pathlib import Path

from adjoint import KERNELS
from applications.toy2d.config import RunConfig
from applications.toy2d.digits import run as digits
from applications.toy2d.digits.config import DigitsConfig
from applications.toy2d.pictures.of_a_run import save_pictures
from applications.toy2d.report import table
from applications.toy2d.rewards import REWARDS
from applications.toy2d.run import run
from applications.toy2d.targets import TARGETS

__all__ = ["DigitsConfig", "RunConfig"]


@dataclass(frozen=True)
class Demo:
    """Run both demonstrations, a trained 2-D flow and handwritten digits, in two minutes."""

    folder: Path = Path("outputs/demo")
    """Folder for pictures, reports and checkpoints."""
    quick: bool = False
    """A tenth of the training, to see that everything works."""
    resume: bool = False
    """Continue an earlier demo that was interrupted."""


@dataclass(frozen=True)
class List:
    """Name the targets, rewards and kernels."""


def show_run(config: RunConfig) -> None:
    """Run, print the report and write the pictures."""
    finished = run(config)
    print(f"\n{finished.tilted}\n\n{table(finished.report)}\n")
    pictures = save_pictures(finished)
    print("\n".join(f"wrote {path}" for path in [config.path / "report.json", *pictures]))


def show_digits(config: DigitsConfig) -> None:
    """Tilt the digits and print the report."""
    report = digits.run(config)
    print(f"\n{table(report)}\n\nwrote {config.folder}")


def show_demo(demo: Demo) -> None:
    """Run the demonstration in the plane, then the digits."""
    toy = RunConfig(folder=demo.folder, resume=demo.resume, overwrite=not demo.resume)
    image = DigitsConfig(
        folder=demo.folder / "digits",
        resume=demo.resume,
        overwrite=not demo.resume,
        quick=demo.quick,
    )
    if demo.quick:
        toy = replace(toy, base_iterations=300, iterations=60, samples=4000)
    print("1. A flow trained on samples in the plane, tilted toward a half-plane.")
    show_run(toy)
    print("\n2. A flow trained on handwritten digits, tilted toward one of them.")
    show_digits(image)


def show_list(_: List) -> None:
    """Print the names with their one-line descriptions."""
    print("targets")
    for name, target in TARGETS.items():
        closed = " (closed form)" if target.mixture is not None else ""
        print(f"  {name:<18}{target.description}{closed}")
    print("rewards")
    for name, make in REWARDS.items():  # their docstrings: making one may train a network
        print(f"  {name:<18}{inspect.getdoc(make) or ''}".splitlines()[0].rstrip("."))
    print("kernels")
    for name, scheme in KERNELS.items():
        print(f"  {name:<20}{scheme.summary}")
