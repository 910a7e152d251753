"""The parts of a dataset in the making: small files that are written once, by any process.

Episode i of a split is a function of (seed, split, i) alone, so that a part is the same whoever
makes it and whenever.  Workers are spawned, not forked, and end with their parent even if it is
killed.
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

from applications.rl.data.expert_manipulation import ManipulationCollector
from applications.rl.data.expert_maze import MazeCollector
from applications.rl.environments.reproducible import episode_seed
from applications.rl.environments.tasks import MANIPULATION, Task
from applications.rl.errors import RunError
from flows.training import replacing

PART_TRANSITIONS = 2000
"""Transitions of a part: what an interruption can cost each worker."""
SPLITS = ("train", "val")


@dataclass(frozen=True)
class EpisodeFile:
    """Episodes that one file holds.

    Attributes:
        split: ``train`` or ``val``.
        first: number of its first episode.
        lengths: transitions of each of its episodes.
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
        """Transitions of all its episodes."""
        return sum(self.lengths)


def make_parts(transitions: int, episode: int) -> Iterator[EpisodeFile]:
    """The parts of a dataset whose episodes have ``episode`` transitions, the last one the rest.

    The validation split has a tenth as many episodes, at least one.
    """
    whole, rest = divmod(transitions, episode)
    lengths = [episode] * whole + [rest] * (rest > 0)
    validation = [min(episode, transitions)] * max(1, len(lengths) // 10)
    step = math.ceil(PART_TRANSITIONS / episode)
    for split, all_lengths in zip(SPLITS, (lengths, validation), strict=True):
        for first in range(0, len(all_lengths), step):
            yield EpisodeFile(split, first, tuple(all_lengths[first : first + step]))


def can_generate(task: Task) -> bool:
    """Whether there is an expert here that can make the task's data."""
    if task.environment.startswith("pointmaze"):
        return task.kind in ("navigate", "stitch")
    return task.environment.startswith(MANIPULATION) and task.kind in ("play", "noisy")


def collector_class(task: Task) -> type[MazeCollector] | type[ManipulationCollector]:
    """The expert for the task's data."""
    return MazeCollector if task.environment.startswith("pointmaze") else ManipulationCollector


def write_missing(
    folder: Path, parts: Sequence[EpisodeFile], task: Task, *, seed: int, workers: int
) -> None:
    """Write the parts that are not in ``folder`` yet, with a progress bar over transitions.

    Raises:
        OSError: a part cannot be written; those before are kept.
        RunError: a worker was killed; the parts before are kept.
    """
    missing = [part for part in parts if not (folder / part.name).exists()]
    total = sum(part.transitions for part in parts)
    with tqdm(
        total=total,
        initial=total - sum(part.transitions for part in missing),
        desc=task.dataset_name,
        unit=" transitions",
        file=sys.stderr,
        dynamic_ncols=True,
    ) as bar:
        if workers == 1 or len(missing) < 2:
            for part in missing:
                bar.update(write_part(folder, part, task, seed))
        else:
            _share(missing, folder, task, seed, min(workers, len(missing)), bar.update)


def write_part(folder: Path, part: EpisodeFile, task: Task, seed: int) -> int:
    """Write one part, atomically; the number of its transitions."""
    split = SPLITS.index(part.split)
    episodes = [
        _collector(task).episode(episode_seed(seed, split, part.first + index), length)
        for index, length in enumerate(part.lengths)
    ]
    save_arrays(folder / part.name, concatenate(episodes))
    return part.transitions


def concatenate(episodes: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """The rows of all episodes, in order, by name."""
    return {name: np.concatenate([episode[name] for episode in episodes]) for name in episodes[0]}


def save_arrays(
    path: Path, arrays: Mapping[str, NDArray[Any]], *, compressed: bool = False
) -> None:
    """Write an npz file, atomically; equal arrays give equal bytes.

    Raises:
        OSError: it cannot be written.
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
    """The collector of a process: making its environment takes seconds."""
    return collector_class(task)(task)


def _share(
    missing: Sequence[EpisodeFile],
    folder: Path,
    task: Task,
    seed: int,
    workers: int,
    update: Callable[[int], object],
) -> None:
    """Have ``workers`` processes write the parts."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker)
    try:
        waiting: set[Future[int]] = {
            pool.submit(write_part, folder, part, task, seed) for part in missing
        }
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                update(future.result())
    except BrokenProcessPool as error:
        raise RunError(
            f"a worker was killed, perhaps for want of memory; the parts made so far are in "
            f"{folder}, and the same command continues"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it, even by SIGKILL, rather than wait forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
