"""The folder of a run: who may write there, and what of an earlier run is kept.

Every run writes ``config.json`` (all options as they were resolved, seeds and versions), metrics,
checkpoints and results.  Nothing is written over unasked: a run continues the one in its folder
(``resume``), takes its place (``overwrite``), or is refused.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.training import versions, write_json
from flows.training.checkpoint import PACKAGE
from flows.training.renamed import Renamed, old_options

CONFIG = "config.json"

FIRST = "0.1"
"""The version whose files do not say which version wrote them."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a disk without room, a quota used up, a file above its limit."""


@dataclass(frozen=True)
class RunFiles:
    """The files that one kind of run writes beside config.json.

    Attributes:
        checkpoints: names of the files that a resume continues from.
        outputs: names of all other files; removed, with the checkpoints, where a run begins anew.
        marker: an option that config.json always holds, by which a run of this kind is known.
        last: name of the file that a finished run has; '' if none tells.
        renamed: options that config.json of earlier versions holds under another name.
    """

    checkpoints: tuple[str, ...]
    outputs: tuple[str, ...]
    marker: str
    last: str = ""
    renamed: Renamed = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all files but config.json."""
        return (*self.checkpoints, *self.outputs)


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a folder; empty if there is none, or it is no mapping."""
    try:
        content = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_config(folder: Path, content: Mapping[str, Any]) -> None:
    """Write config.json atomically, with the versions of this package and of its libraries.

    Raises:
        OSError: it cannot be written.
    """
    known = {**versions(), **content.get("versions", {})}
    write_json(folder / CONFIG, {**content, "versions": known})


def version_of(config: Mapping[str, Any]) -> str:
    """Return the version of this package that wrote a config.json with the content ``config``."""
    versions = config.get("versions")
    return str(versions.get(PACKAGE, FIRST)) if isinstance(versions, Mapping) else FIRST


def check_free(folder: Path, files: RunFiles, *, resume: bool, overwrite: bool) -> bool:
    """Refuse to write over what is in ``folder``; no file changes.

    Arguments:
        folder: the folder of the run, which may not exist yet.
        files: the files that the run is going to write.
        resume: whether it may continue a run.
        overwrite: whether it may take the place of a run.

    Returns:
        Whether there is a checkpoint to continue from.

    Raises:
        ValueError: the folder holds a run, and neither is allowed; it is to be resumed but was
            written by a version with other options, or is finished and without its checkpoints; or
            the folder holds files of these names but no config.json of such a run.
    """
    config = read_config(folder)
    old = old_options([*config, *_nested(config)], files.renamed)
    if resume and old:
        raise ValueError(
            f"folder: {folder} holds a run written by version {version_of(config)} of {PACKAGE}, "
            f"whose options had other names ({old}); continue it with that version, or begin it "
            "anew by --overwrite"
        )
    if resume and any((folder / name).exists() for name in files.checkpoints):
        return True
    holds_run = files.marker in config
    found = [name for name in (CONFIG, *files.names) if (folder / name).exists()]
    if found and not holds_run:
        raise ValueError(
            f"folder: {folder} holds files that are not of this application: {', '.join(found)}"
        )
    if resume and files.last and (folder / files.last).exists():
        raise ValueError(
            f"folder: {folder} holds a finished run whose checkpoints are gone, so that there is "
            "nothing to resume; --overwrite begins it anew"
        )
    if holds_run and not resume and not overwrite:
        raise ValueError(
            f"folder: {folder} holds a run already; --resume continues it, --overwrite begins it "
            "anew"
        )
    return False


def clear(folder: Path, files: RunFiles) -> None:
    """Remove the files of an earlier run, but for config.json; other files stay."""
    for name in files.names:
        (folder / name).unlink(missing_ok=True)


def start_run(
    folder: Path, files: RunFiles, settings: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> None:
    """Continue the run in ``folder``, or begin one there, without stale files.

    A resumed run keeps all files; its config.json is written by the caller, once its checkpoints
    have accepted the options.

    Arguments:
        settings: content of config.json, see `write_config`.
        folder, files, resume, overwrite: as in `check_free`.

    Raises:
        ValueError: as `check_free`.
        OSError: the folder cannot be written.
    """
    if check_free(folder, files, resume=resume, overwrite=overwrite):
        return
    if resume:
        print(f"nothing to resume in {folder}: begins anew", file=sys.stderr)
    clear(folder, files)
    write_config(folder, settings)


@contextmanager
def full_disk_explained(folder: Path, checkpoint: str) -> Iterator[None]:
    """Make the error of a full disk say how to go on.

    Arguments:
        folder: the folder of the run.
        checkpoint: name of the file in it that a resume continues from.

    Raises:
        OSError: instead, naming the folder and how to go on.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        path = folder / checkpoint
        kept = (
            f"free some space, then --resume continues from {path}"
            if path.exists()
            else "no checkpoint had been written"
        )
        raise OSError(error.errno, f"{folder}: {os.strerror(error.errno or 0)}; {kept}") from error


def _nested(config: Mapping[str, Any]) -> list[str]:
    """List the options one level down, such as those of an agent."""
    inner = [value for value in config.values() if isinstance(value, Mapping)]
    return [name for value in inner for name in value]
