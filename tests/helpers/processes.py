"""Run a function in several processes that train together (gloo), and give back what each says."""

import multiprocessing
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flows.training import distributed

needs_cpu_shards = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 on a CPU needs PyTorch 2.7"
)
PRELOADED = ["torch", "torch._dynamo", "torch.distributed.fsdp", "adjoint.tilt"]


def several(function, *arguments, processes=2, timeout=60, patience=60):
    """What ``function(rank, *arguments)`` returns in each process.

    An exception is returned as it is; a process that was killed gives None.  Processes wait for
    each other for ``patience`` seconds.

    Raises:
        TimeoutError: a process neither ends nor dies: it hangs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(processes):
            target = (Path(folder), rank, processes, patience, function, arguments)
            started.append(context.Process(target=_run, args=target, daemon=True))
            started[-1].start()
        for process in started:
            process.join(timeout)
        hung = [rank for rank, process in enumerate(started) if process.is_alive()]
        for rank in hung:
            started[rank].kill()
        if hung:
            raise TimeoutError(f"processes {hung} hang")
        said = [Path(folder, f"{rank}.pt") for rank in range(processes)]
        # Exceptions and results of any kind, which these processes themselves have just written.
        return [torch.load(path, weights_only=False) if path.exists() else None for path in said]


def agreed(results):
    """``results``, none of which is an exception."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _run(folder, rank, processes, patience, function, arguments):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), processes)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=patience),
    )
    dist.barrier()  # one that fails at once must not leave before the others have connected to it
    try:
        result = function(rank, *arguments)
    except Exception as error:
        traceback.print_exc()
        result = error
    torch.save(result, folder / f"{rank}.tmp")
    (folder / f"{rank}.tmp").rename(folder / f"{rank}.pt")
    if not isinstance(result, Exception):
        distributed.leave()
