"""Episode files: small files of a dataset in the making, each written once by any process.

Episode i of a split is a function of (seed, split, i) alone, so that a file is the same whichever
process makes it, and whenever.  Workers are spawned, not forked, and end with their parent even if
it is killed.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from applications.common.errors import RunError
from applications.rl.data.expert_manipulation import ManipulationCollector
from applications.rl.data.expert_maze import MazeCollector
from applications.rl.environments.reproducible import episode_seed
from applications.rl.environments.tasks import MANIPULATION, Task
from flows.training import replacing

FILE_TRANSITIONS = 2000
"""Transitions of a file: the work that an interruption can cost each worker."""
SPLITS = ("train", "val")


@dataclass(frozen=True)
class EpisodeFile:
    """The plan of one file: which episodes it holds.

    Attributes:
        split: ``train`` or ``val``.
        first: number of the first episode in the file.
        lengths: number of transitions of each episode.
    """

    split: str
    first: int
    lengths: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the file."""
        return f"{self.split}-{self.first:07d}.npz"

    @property
    def transitions(self) -> int:
        """Number of transitions of all episodes in the file."""
        return sum(self.lengths)


def plan_files(transitions: int, episode: int) -> Iterator[EpisodeFile]:
    """Divide a dataset into files of episodes.

    The validation split has a tenth as many episodes, at least one.

    Arguments:
        transitions: number of transitions of the training split.
        episode: number of transitions of an episode; the last episode has the rest.
    """
    whole, rest = divmod(transitions, episode)
    lengths = [episode] * whole + [rest] * (rest > 0)
    validation = [min(episode, transitions)] * max(1, len(lengths) // 10)
    step = math.ceil(FILE_TRANSITIONS / episode)
    for split, all_lengths in zip(SPLITS, (lengths, validation), strict=True):
        for first in range(0, len(all_lengths), step):
            yield EpisodeFile(split, first, tuple(all_lengths[first : first + step]))


def can_generate(task: Task) -> bool:
    """Say whether there is an expert here that can make the task's data."""
    if task.environment.startswith("pointmaze"):
        return task.kind in ("navigate", "stitch")
    return task.environment.startswith(MANIPULATION) and task.kind in ("play", "noisy")


def collector_class(task: Task) -> type[MazeCollector] | type[ManipulationCollector]:
    """Return the class of the expert for the task's data."""
    return MazeCollector if task.environment.startswith("pointmaze") else ManipulationCollector


def write_missing(
    folder: Path, files: Sequence[EpisodeFile], task: Task, *, seed: int, workers: int
) -> None:
    """Write the files that ``folder`` lacks, with a progress bar over transitions.

    Raises:
        OSError: a file cannot be written; earlier files are kept.
        RunError: a worker was killed; earlier files are kept.
    """
    missing = [file for file in files if not (folder / file.name).exists()]
    total = sum(file.transitions for file in files)
    with tqdm(
        total=total,
        initial=total - sum(file.transitions for file in missing),
        desc=task.dataset_name,
        unit=" transitions",
        file=sys.stderr,
        dynamic_ncols=True,
    ) as bar:
        if workers == 1 or len(missing) < 2:
            for file in missing:
                bar.update(write_file(folder, file, task, seed))
        else:
            _write_in_workers(missing, folder, task, seed, min(workers, len(missing)), bar.update)


def write_file(folder: Path, file: EpisodeFile, task: Task, seed: int) -> int:
    """Play the episodes of one file and write it, atomically; return its transitions."""
    split = SPLITS.index(file.split)
    episodes = [
        _collector(task).episode(episode_seed(seed, split, file.first + index), length)
        for index, length in enumerate(file.lengths)
    ]
    save_arrays(folder / file.name, concatenate(episodes))
    return file.transitions


def concatenate(episodes: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Join the rows of all episodes, in order, for each named array."""
    return {name: np.concatenate([episode[name] for episode in episodes]) for name in episodes[0]}


def save_arrays(
    path: Path, arrays: Mapping[str, NDArray[Any]], *, compressed: bool = False
) -> None:
    """Write an npz file, atomically; equal arrays give equal bytes.

    Raises:
        OSError: the file cannot be written.
    """
    save: Callable[..., None] = np.savez_compressed if compressed else np.savez
    try:
        with replacing(path, "data") as file:
            save(file, **arrays)
    except OSError as error:
        if str(path) in str(error):
            raise
        message = f"data: cannot write {str(path)!r}: {error.strerror or error}"
        raise OSError(error.errno, message) from error


@functools.lru_cache(maxsize=1)
def _collector(task: Task) -> MazeCollector | ManipulationCollector:
    """Return the collector of this process, made once: its environment takes seconds."""
    return collector_class(task)(task)


def _write_in_workers(
    missing: Sequence[EpisodeFile],
    folder: Path,
    task: Task,
    seed: int,
    workers: int,
    update: Callable[[int], object],
) -> None:
    """Let ``workers`` processes write the files."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker)
    try:
        waiting: set[Future[int]] = {
            pool.submit(write_file, folder, file, task, seed) for file in missing
        }
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                update(future.result())
    except BrokenProcessPool as error:
        raise RunError(
            "a worker was killed, perhaps for want of memory; the episodes made so far are in "
            f"{folder}, and the same command continues"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent ends, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
