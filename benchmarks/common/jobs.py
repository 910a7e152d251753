"""Jobs of a benchmark in several processes, each with one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from flows.training import prepare_process

Result = TypeVar("Result")


def prepare_worker() -> None:
    """Give a worker process one thread, and flush denormals, which slow Adam down."""
    torch.set_num_threads(1)
    prepare_process()


def completed(
    run: Callable[..., Result], jobs: Sequence[Sequence[Any]], *, workers: int, name: str
) -> Iterator[Result]:
    """Yield the results of ``run(*job)`` in the order in which the jobs end.

    Arguments:
        run: function of a module, which the workers can import.
        jobs: arguments of each call.
        workers: number of processes.
        name: label of the progress bar.
    """
    spawn = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=prepare_worker) as pool:
        futures = [pool.submit(run, *job) for job in jobs]
        for future in tqdm(as_completed(futures), total=len(jobs), desc=name):
            yield future.result()
