"""Locks that keep two processes from one folder or file; a process that dies gives them back."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from applications.common.errors import RunError

try:
    import fcntl
except ImportError:  # only systems of the POSIX kind have it
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(
    path: Path, *, patience: float = 0.0, holder: str = "another run", required: bool = False
) -> Iterator[None]:
    """Hold the lock of ``path`` while the body runs.

    Arguments:
        path: a folder that exists, or a file, which is created.
        patience: seconds to wait for a process that holds the lock.
        holder: the process that may hold it, for the message.
        required: whether to raise, instead of going on unlocked, where the file system (or the
            operating system) has no locks.

    Raises:
        RunError: another process holds the lock.
        OSError: the file cannot be written, or has no locks where one is ``required``.
    """
    if fcntl is None:
        if required:
            raise OSError(f"{path}: this operating system has no file locks")
        yield
        return
    flags = os.O_RDONLY if path.is_dir() else os.O_WRONLY | os.O_CREAT
    handle = os.open(path, flags, 0o666)
    try:
        try:
            _acquire(handle, path, time.monotonic() + patience, holder)
        except OSError:
            if required:
                raise
        yield
    finally:
        os.close(handle)


def _acquire(handle: int, path: Path, deadline: float, holder: str) -> None:
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                folder = path if path.is_dir() else path.parent
                raise RunError(f"folder: {folder} is in use by {holder}") from None
        time.sleep(0.1)
