"""Downloads of OGBench's published data: atomic, with a timeout and a progress bar."""

from __future__ import annotations

import os
import shutil
import sys
import urllib.request
from pathlib import Path

from tqdm import tqdm

from applications.rl.data.episode_files import can_generate
from applications.rl.data.manifest import DataError
from applications.rl.environments.mujoco import import_ogbench
from applications.rl.environments.tasks import Task
from flows.training import replacing

TIMEOUT = 20.0
"""Seconds without an answer or a byte after which a download fails."""


def obtain(task: Task, path: Path, *, allowed: bool = True) -> None:
    """Download a file of a task's data from the server of OGBench.

    Arguments:
        task: task of the data.
        path: file to write; its name is the published one.
        allowed: whether to download at all.

    Raises:
        DataError: the download failed or was not allowed; the message says where the file would
            be, where it is published, and how to make it.
    """
    import_ogbench()
    from ogbench.utils import DATASET_URL

    url, folder = f"{DATASET_URL}/{path.name}", path.parent
    reason = "downloading is switched off"
    if allowed:
        try:
            return fetch(url, path)
        except OSError as error:
            reason = f"downloading it failed ({getattr(error, 'reason', error)})"
    command = f"python -m applications.rl data --task {task.name} --transitions 1000000"
    remedy = (
        f"make it by: {command} --workers {os.cpu_count()} --folder {folder}"
        if can_generate(task)
        else "make it with OGBench's own scripts, since no expert here can"
    )
    raise DataError(
        f"no data for {task.name!r}: there is neither {path} nor a folder of shards "
        f"{folder / task.dataset_name}, and {reason}. Get {url} by other means and put it into "
        f"{folder}, or {remedy}"
    )


def fetch(url: str, path: Path, *, timeout: float = TIMEOUT) -> None:
    """Save the file at ``url`` as ``path``, whole or not at all.

    Raises:
        OSError: there was no answer in time, the answer was an error, the connection broke off, or
            the path cannot be written.
    """
    with urllib.request.urlopen(url, timeout=timeout) as response:
        total = int(response.headers.get("Content-Length") or 0) or None
        with replacing(path, "folder") as file:
            with tqdm.wrapattr(
                file, "write", total=total, desc=path.name, file=sys.stderr, dynamic_ncols=True
            ) as out:
                shutil.copyfileobj(response, out, 1 << 20)
            if total is not None and file.tell() != total:
                raise OSError(f"the connection broke off after {file.tell()} of {total} bytes")
