"""The folder of a run: who may write there, and what of an earlier run is there."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flows.training import write_json

try:
    import fcntl
except ImportError:  # only systems of the POSIX kind have it
    fcntl = None  # type: ignore[assignment]

CONFIG = "config.json"
CHECKPOINTS = ("classifier.pt", "base.pt", "tilt.pt")
WRITTEN = (
    *CHECKPOINTS,
    *("classifier.csv", "base.csv", "tilt.csv", "report.json"),
    *("densities.png", "paths.png", "control.png", "certificate.png", "training.png", "flow.gif"),
    *("digits.png", "classes.png"),
)
"""What runs write beside config.json; removed where one begins anew."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of ``folder``, which exists, where the system has locks.

    Raises:
        ValueError: another run is in there.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"folder: {folder} is in use by another run") from None
        except OSError:  # some file systems have no locks
            pass
        yield
    finally:
        os.close(handle)


def claim(folder: Path, settings: Mapping[str, object], *, resume: bool, overwrite: bool) -> None:
    """Refuse to write over what is in ``folder``, or begin a run there if none is resumed.

    A resumed run keeps its files.  One that begins removes those of the run before it and writes
    ``settings`` to config.json, by which a folder is known to hold a run.

    Arguments:
        folder: of the run.
        settings: its options.
        resume: whether it may continue one.
        overwrite: whether it may take the place of one.

    Raises:
        ValueError: the folder holds a run, and neither is the case, or it is to be resumed without
            its checkpoints; or it has no config.json of a run but files of the names of a run's.
        OSError: the folder cannot be written.
    """
    if resume and any((folder / name).exists() for name in CHECKPOINTS):
        return
    holds_run = _is_run(folder / CONFIG)
    found = [name for name in (CONFIG, *WRITTEN) if (folder / name).exists()]
    if found and not holds_run:
        raise ValueError(
            f"folder: {folder} holds files that are not of this application: {', '.join(found)}"
        )
    finished = (folder / "report.json").exists()
    if resume and holds_run and finished:
        raise ValueError(
            f"folder: {folder} holds a finished run whose checkpoints are gone, so that there is "
            "nothing to resume; --overwrite begins it anew"
        )
    if holds_run and not resume and not overwrite:
        raise ValueError(
            f"folder: {folder} holds a run already; --resume continues it, --overwrite begins it "
            "anew"
        )
    if resume:
        print(f"nothing to resume in {folder}: begins anew", file=sys.stderr)
    for name in WRITTEN:
        (folder / name).unlink(missing_ok=True)
    write_json(folder / CONFIG, settings)


def _is_run(config: Path) -> bool:
    """Whether the file is there and holds the options of a run of this application."""
    try:
        options = json.loads(config.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(options, dict) and "base_iterations" in options
