"""The work of a job in its worker: it trains, and reports a failure in one line.

A run that fails for a reason of its own, such as missing data or a loss that became NaN, is not
tried again.  The seeds of a failed job of several seeds are then trained one by one, so that only
the seeds that cause the failure fail.

File locks keep two workers from training one run, such as when a sweep was started twice, and from
downloading the same data at the same time.  The system releases the locks of a process that dies.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import traceback
from collections.abc import Callable

from applications.common.errors import EXPECTED
from applications.common.lock import locked
from applications.rl.data.dataset import data_folder, find_files, load_shards
from applications.rl.environments.tasks import ENVIRONMENTS, find_task
from applications.rl.sweep import folders
from applications.rl.sweep.plan import Job
from applications.rl.training.config import TrainConfig
from applications.rl.training.train import Trained, train
from flows.training import ensure_writable, write_json

Train = Callable[[TrainConfig], list[Trained]]
LOCK = ".lock"
HOLDER = "another worker; does another sweep go on?"
PATIENCE = 20.0
"""Seconds to wait for a run that another worker holds, which may be about to die."""


def work(job: Job, attempt: str, train: Train, node: str = "") -> dict[int, str]:
    """Train the runs of a job in a worker.

    Arguments:
        job: the job.
        attempt: identifier of the submission, which the worker notes in worker.json.
        train: function that trains.
        node: identifier of the node, noted likewise.

    Returns:
        the reason of each failure, one line by seed.
    """
    where = {"attempt": attempt, "host": socket.gethostname(), "node": node, "pid": os.getpid()}
    notes: dict[int, str] = {}
    try:
        with contextlib.ExitStack() as locks:
            for run in job.runs:
                ensure_writable(run.folder / folders.WORKER, "folder")
                lock = locked(run.folder / LOCK, patience=PATIENCE, holder=HOLDER, required=True)
                locks.enter_context(lock)
                write_json(run.folder / folders.WORKER, where)
            for trained in train(job.config):
                hours = None if trained.evaluation is None else trained.seconds / 3600
                folders.write_finished(trained.folder, job.config, hours)
    except Exception as error:
        if len(job.runs) > 1:
            for run in job.runs:
                notes |= work(job.only([run]), attempt, train, node)
            return notes
        (run,) = job.runs
        notes[run.seed] = one_line(error)
        with contextlib.suppress(OSError):  # perhaps it was that the folder cannot be written
            (run.folder / folders.ERROR).write_text(traceback.format_exc())
    return notes


def train_task(config: TrainConfig) -> list[Trained]:
    """Train as `applications.rl.train` does; missing data are downloaded once for all workers."""
    task = find_task(config.task) if config.use_data else None
    own = config.data is not None and config.data.suffix == ".npz"
    if task is not None and task.environment in ENVIRONMENTS and not own:
        folder = data_folder(config.data)
        if not find_files(task, folder=folder):
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / LOCK, patience=math.inf, required=True):
                load_shards(task, folder=folder)
    return train(config)


def one_line(error: BaseException | None) -> str:
    """Describe an error in one line, with its type if the message was not written for users."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{lines[0]} {lines[-1].strip()}" if lines[0].endswith(":") else lines[0]
    return text if text and isinstance(error, EXPECTED) else f"{type(error).__name__}: {text}"
