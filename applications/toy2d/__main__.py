"""Command line: ``python -m applications.toy2d {run, demo, gallery, digits, list}``."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TextIO

import tyro
from tqdm import tqdm

from applications.toy2d import gallery as overview
from applications.toy2d import kernels
from applications.toy2d.digits import run as digits
from applications.toy2d.pictures.of_a_run import save_pictures
from applications.toy2d.rewards import REWARDS
from applications.toy2d.run import RunConfig, run, table
from applications.toy2d.targets import TARGETS
from flows.training import CheckpointError, prepare_process
from flows.training.fit import TrainingDiverged


@dataclass(frozen=True)
class Demo:
    """Both demonstrations: a trained 2-D flow, then handwritten digits; two minutes."""

    folder: Path = Path("outputs/demo")
    """Where pictures, reports and checkpoints are written."""
    quick: bool = False
    """A tenth of the training, to see that everything works."""
    resume: bool = False
    """Continue where an earlier demo was interrupted."""


@dataclass(frozen=True)
class List:
    """Name the targets, rewards and kernels."""


def show_run(config: RunConfig) -> None:
    """Run, print the table, write the pictures."""
    finished = run(config)
    print(f"\n{finished.tilted}\n\n{table(finished.report)}\n")
    pictures = save_pictures(finished)
    print("\n".join(f"wrote {path}" for path in [config.path / "report.json", *pictures]))


def show_digits(config: digits.DigitsConfig) -> None:
    """Tilt the digits and print the table."""
    report = digits.run(config)
    print(f"\n{table(report)}\n\nwrote {config.folder}")


def show_demo(demo: Demo) -> None:
    """The two-dimensional demonstration, then the digits."""
    toy = RunConfig(folder=demo.folder, resume=demo.resume, overwrite=not demo.resume)
    image = digits.DigitsConfig(
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
    """Names with their one-line descriptions."""
    print("targets")
    for name, target in TARGETS.items():
        closed = " (closed form)" if target.mixture is not None else ""
        print(f"  {name:<18}{target.description}{closed}")
    print("rewards")
    for name, make in REWARDS.items():  # their own words: making one may train a network
        print(f"  {name:<18}{inspect.getdoc(make) or ''}".splitlines()[0].rstrip("."))
    print("kernels")
    print("\n".join(f"  {name:<20}{words}" for name, words in kernels.DESCRIPTIONS.items()))


COMMANDS: dict[type, Callable] = {
    RunConfig: show_run,
    Demo: show_demo,
    overview.GalleryConfig: overview.show_gallery,
    digits.DigitsConfig: show_digits,
    List: show_list,
}

Command = (
    Annotated[RunConfig, tyro.conf.subcommand("run")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[overview.GalleryConfig, tyro.conf.subcommand("gallery")]
    | Annotated[digits.DigitsConfig, tyro.conf.subcommand("digits")]
    | Annotated[List, tyro.conf.subcommand("list")]
)


def parse(arguments: list[str] | None = None) -> Any:
    """The configuration that a command line (``sys.argv`` if None) asks for."""
    return tyro.cli(Command, args=arguments, prog="python -m applications.toy2d")


def describe(error: OSError) -> str:
    """What went wrong and where, without the number of the error."""
    if error.strerror is None:
        return str(error)
    if error.filename is None:
        return error.strerror  # those of `flows.training.checkpoint` name the path
    return f"cannot access {error.filename}: {error.strerror}"


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as one line that leaves progress bars in place; without where it was raised."""
    tqdm.write(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; a warning or an expected failure is one line on stderr, the latter's exit
    status 1.
    """
    command = parse(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            COMMANDS[type(command)](command)
    except OSError as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 1
    except (ValueError, CheckpointError, TrainingDiverged) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        flag = "--resume"
        if getattr(command, "overwrite", False):
            flag += " instead of --overwrite"
        hint = f"; the same command with {flag} continues" if hasattr(command, "resume") else ""
        print(f"\ninterrupted{hint}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
