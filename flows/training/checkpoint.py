"""Checkpoints that a kill cannot spoil and that cannot run code.

A checkpoint is one file of plain data: nested dicts, lists and tuples of tensors, strings, numbers
and ``None``.  Two properties matter.

Atomic writing.  The bytes go to a temporary file in the same folder, which is flushed to the disk
and then renamed over the old file; POSIX makes the rename atomic, so a process killed at any
moment leaves either the old checkpoint or the new one, never a mixture.  A temporary file that a
kill leaves behind has a fixed name and is overwritten by the next save.

Safe reading.  The archive's checksums are verified before anything is interpreted (PyTorch does
not verify them), and the content is read by the restricted unpickler of
``torch.load(weights_only=True)``, which builds tensors and plain data only.
"""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import platform
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from torch import Tensor

from flows.version import __version__

PACKAGE = "adjoint-matching"


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, holds code, or belongs to another run."""


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path`` atomically; folders are created.

    Raises:
        TypeError: a value is neither a tensor nor plain data; the message names its place.
        OSError: the file cannot be written.
    """
    plain = _plain(state, "state")
    with replacing(path, "checkpoint") as file:
        try:
            torch.save(plain, file)
        except RuntimeError as error:  # how PyTorch reports a full disk when it closes the archive
            cause = error.__context__
            if not isinstance(cause, OSError):
                raise
            raise OSError(cause.errno, cause.strerror) from error


def load(
    path: str | Path,
    *,
    expect: Mapping[str, object] | None = None,
    defaults: Mapping[str, object] | None = None,
    map_location: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Read the dict that ``save`` wrote to ``path``.

    Arguments:
        path: the file.
        expect: if given, it must equal the entry ``"identity"`` of the checkpoint.
        defaults: values of facts that a checkpoint may lack, because it was written before they
            existed.
        map_location: device of the tensors.

    Raises:
        CheckpointError: the file is truncated or damaged, holds anything but tensors and plain
            data, was written by version 0.1 of this package, or its identity differs from
            ``expect``.
        FileNotFoundError: there is no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged: checksum of {damaged!r} does not match")
        state = torch.load(path, map_location=map_location, weights_only=True)
    except (CheckpointError, FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises to read the file all the same, so it is not shown.
        names = re.search(r"GLOBAL (\S+)", str(error), re.IGNORECASE)
        raise CheckpointError(
            f"{path} was refused: it refers to {names[1] if names else 'objects'!r}, but a "
            "checkpoint holds tensors and plain data only; reading it could run code"
        ) from None
    except Exception as error:  # readers of damaged archives fail in many ways
        raise CheckpointError(
            f"{path} is truncated, damaged or not a checkpoint: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a dict")
    if {"problem", "versions"} <= state.keys() and PACKAGE not in state["versions"]:
        raise CheckpointError(
            f"{path} was written by {PACKAGE} 0.1, whose names version {__version__} does not "
            f"read: train again, with another file or without resume, or continue with {PACKAGE} "
            "0.1; torch.load(path, weights_only=True) still gives its weights, under 'ema' and "
            "'module'"
        )
    if expect is not None:
        _check_identity(path, state, expect, defaults or {})
    return state


def writer(state: Mapping[str, Any]) -> str:
    """Return name and version of the package that wrote the checkpoint with content ``state``."""
    return f"{PACKAGE} {(state.get('versions') or {}).get(PACKAGE, 'of an unknown version')}"


def versions() -> dict[str, str]:
    """Return the versions of the software that a numerical result depends on."""
    return {
        PACKAGE: __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "platform": platform.platform(),
    }


@contextmanager
def replacing(path: str | Path, name: str = "path") -> Iterator[BinaryIO]:
    """Open a binary file that replaces ``path`` atomically at the end, unless the body raises.

    Raises:
        OSError: the file cannot be written; the message starts with ``name``.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with _open_temporary(path, name) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        # Below a regular file even unlink(missing_ok) fails; the first error is the one to report.
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and f"{name}: cannot write" not in str(error):
            raise _unwritable(path, name, error) from error
        raise
    if os.name == "posix":  # the rename itself must reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(
    path: str | Path,
    content: Mapping[str, object] | Sequence[object],
    name: str = "folder",
) -> None:
    """Write ``content`` as JSON, atomically.

    Values that JSON does not have, such as paths, become strings; numbers that are not finite
    become null.

    Raises:
        OSError: the file cannot be written; the message starts with ``name``.
    """
    with replacing(path, name) as file:
        text = json.dumps(finite(content), indent=2, default=str, allow_nan=False)
        file.write((text + "\n").encode())


def finite(content: object) -> object:
    """Return ``content`` with None for every float in it that is not finite, as JSON requires."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return content


def ensure_writable(path: str | Path, name: str = "path") -> Path:
    """Return ``path`` after creating its folder and proving that a file can be written there.

    Raises:
        OSError: no file can be written; the message gives ``name``, the path and the reason.
    """
    path = Path(path)
    _open_temporary(path, name).close()
    _temporary(path).unlink()
    return path


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _open_temporary(path: Path, name: str) -> BinaryIO:
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        return _temporary(path).open("wb")
    except OSError as error:
        raise _unwritable(path, name, error) from error


def _unwritable(path: Path, name: str, error: OSError) -> OSError:
    reason = error.strerror or str(error)
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        for folder in path.parents:
            if folder.exists() and not folder.is_dir():
                reason += f": {str(folder)!r} is a file, expected a folder"
    return OSError(error.errno, f"{name}: cannot write {str(path)!r}: {reason}")


def _plain(value: Any, place: str) -> Any:
    """Return ``value`` with plain dicts and tuples and detached tensors."""
    if isinstance(value, Tensor):
        value = value.detach()
        if value.layout == torch.strided and value.untyped_storage().nbytes() > value.nbytes:
            value = value.clone()  # a view would write its whole storage
        return value
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{place} has the key {key!r}; keys are strings or integers")
        return {key: _plain(item, f"{place}[{key!r}]") for key, item in value.items()}
    if isinstance(value, torch.Size) or type(value) in (list, tuple):
        items = [_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise TypeError(
        f"{place} is a {type(value).__module__}.{type(value).__qualname__}; a checkpoint holds "
        "dicts, lists, tuples, tensors, str, int, float, bool and None"
    )


def _check_identity(
    path: str | Path,
    state: Mapping[str, Any],
    expect: Mapping[str, object],
    defaults: Mapping[str, object],
) -> None:
    found = state.get("identity")
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} does not say what run it belongs to, expected {expect}")
    absent = "absent"
    differing = []
    for key in sorted({*found, *expect}):
        expected = repr(expect.get(key, absent))
        if key in found or key not in defaults:
            if key not in found or key not in expect or found[key] != expect[key]:
                got = repr(found.get(key, absent))
                differing.append(f"{key}: {got} in the checkpoint, expected {expected}")
        elif defaults[key] != expect.get(key, absent):
            differing.append(
                f"{key}: absent in the checkpoint, which stands for {defaults[key]!r}, expected "
                f"{expected}"
            )
    if differing:
        raise CheckpointError(
            f"{path} belongs to another run; {'; '.join(differing)}; it was written by "
            f"{writer(state)}"
        )
