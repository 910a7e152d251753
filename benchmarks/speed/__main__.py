r"""How long an update of QAM takes, which parts take the time, and how its JAX peer compares.

    python -m benchmarks.speed [--executions eager compiled] [--seeds 1 4 12] [--quick]
                               [--peer CHECKOUT --peer-python PYTHON]
    python -m benchmarks.speed --device cuda --check --executions eager compiled graph

The update is the published one at full size: 4x512 networks, 10 critics, batch 256, K = 10, at the
dimensions of the scene tasks.  ``update`` is one step of the trainer, sampling from a replay
included, executed eagerly; ``update, compiled`` and ``update, graph`` are executed as by the
options ``--compile`` and ``--cuda-graphs`` of a training.  With several seeds a row is an update
of all of them.  The last rows are the parts of an eager update, each run by itself through the
functions that the update calls, so that their sum may differ from the whole by the code between
them.

The peer is the published JAX implementation in the user's own checkout, run by an interpreter that
has its requirements (jax, flax, optax, distrax, ml_collections).  It makes one update of the same
sizes on a fixed batch: compare it with ``update without sampling``.  Both take turns in blocks of a
few updates, and the order changes from round to round, because the load of a shared machine changes
within minutes.  Times are medians over blocks, and the ratio is
the median over paired blocks.  Warm-up and compilation are timed separately.  On a CPU both are
pinned to the first ``threads`` processors.

The ceiling is the rate of float32 matrix products of the update's own sizes, measured on the same
threads: ``fraction_of_ceiling`` is the part of an update that its products would take at that rate.
With ``--precision`` tf32 or bfloat16 it may exceed 1; ``--check`` measures the loss of accuracy.
"""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
import tyro

from benchmarks.speed import check as speed_check
from benchmarks.speed import figure as speed_figure
from benchmarks.speed.config import SpeedConfig
from benchmarks.speed.peer import Peer
from benchmarks.speed.update import QUICK, Execution, Sizes, Update, largest_rate, operations, parts
from flows.training import prepare_process, write_json

Row = dict[str, Any]

WHOLE = "update"
FIXED = "update without sampling"
FASTEST = ", fastest block"


@contextlib.contextmanager
def confined(config: SpeedConfig) -> Iterator[None]:
    """Pin this process and its children to the first ``threads`` processors it may use."""
    before = torch.get_num_threads()
    pinned = config.device == "cpu" and hasattr(os, "sched_setaffinity")
    processors = os.sched_getaffinity(0) if pinned else set()
    torch.set_num_threads(config.threads)
    try:
        if pinned:
            os.sched_setaffinity(0, sorted(processors)[: config.threads])
        yield
    finally:
        if pinned:
            os.sched_setaffinity(0, processors)
        torch.set_num_threads(before)


def measure(config: SpeedConfig) -> Iterator[list[Row]]:
    """Yield the rows of each execution and number of seeds, then the rows of the parts."""
    sizes = QUICK if config.quick else Sizes()
    with confined(config), contextlib.ExitStack() as closing:
        rate = largest_rate(config.device, lambda run: config.timed(run, 20))
        if config.precision != "float32" and config.device.startswith("cuda"):
            torch.set_float32_matmul_precision("high")
        work = operations(Update(sizes, config.device))
        print(f"ceiling {rate / 1e9:.0f} billion operations a second, an update {work / 1e9:.1f}")
        peer = None
        if config.peer is not None:
            interpreter = (config.peer_python, config.device, config.threads)
            peer = Peer(asdict(sizes), config.peer, *interpreter)
            closing.callback(peer.close)
            print(f"warm-up of the peer {peer.compile_s:.1f} s")
            peer.block(2, config.clock)
        for execution in config.executions:
            for seeds in config.seeds:
                yield _updates(config, sizes, execution, seeds, work / rate, peer)
        kind = torch.device(config.device).type
        lower = config.precision == "bfloat16"
        with torch.autocast(kind, torch.bfloat16, enabled=lower, cache_enabled=False):
            some = parts(sizes, config.device)
            rows = [_part(config, name, run, rate) for name, run in some.items()]
        yield rows


def _part(config: SpeedConfig, name: str, run: Callable[[], object], rate: float) -> Row:
    """Time a part of an update and return its row; ``rate`` is the ceiling."""
    work = operations(run)
    print(f"{name}: {work / 1e9:.1f} billion operations")
    config.timed(run, 2)
    blocks = [config.timed(run, config.updates) for _ in range(config.rounds)]
    value = statistics.median(blocks)
    name += config.suffix
    return _row(config, name, value, fraction_of_ceiling=work / rate / value)


def _updates(
    config: SpeedConfig,
    sizes: Sizes,
    execution: Execution,
    seeds: int,
    share: float,
    peer: Peer | None,
) -> list[Row]:
    """Time one execution and number of seeds, in turns with the peer, and return the rows.

    Arguments:
        share: seconds that the matrix products of one agent's update take at the ceiling.
    """
    if config.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    runs, warm_up = {}, {}
    for name in (WHOLE, FIXED) if seeds == 1 else (WHOLE,):
        started = time.perf_counter()
        runs[name] = Update(
            sizes,
            config.device,
            seeds=seeds,
            execution=execution,
            fixed=name == FIXED,
            autocast=config.precision == "bfloat16",
        )
        config.timed(runs[name], 2)
        warm_up[name] = time.perf_counter() - started
    times: dict[str, list[float]] = {name: [] for name in runs}
    theirs: list[float] = []
    for i in range(config.rounds):
        together = config.updates * runs[WHOLE].calls  # equally many before each is waited for
        if peer is not None and i % 2:
            theirs.append(peer.block(together, config.clock))
        for name in reversed(runs) if i % 2 else runs:
            block = config.timed(runs[name], config.updates) / runs[name].calls
            times[name].append(block)
        if peer is not None and not i % 2:
            theirs.append(peer.block(together, config.clock))
    memory = _memory_gb(config.device)
    suffix = "" if execution == "eager" else f", {execution}"
    suffix += config.suffix

    def row(name: str, value: float, ratio: float | None) -> Row:
        return _row(
            config,
            name,
            value,
            seeds=seeds,
            ratio_to_peer=ratio,
            fraction_of_ceiling=seeds * share / value,
            peak_memory_gb=memory,
            compile_s=warm_up.get(name.removesuffix(FASTEST).removesuffix(suffix)),
        )

    rows = []
    for name, values in times.items():
        pairs = [a / (seeds * b) for a, b in zip(values, theirs, strict=False)]
        rows.append(
            row(
                f"{name}{suffix}",
                statistics.median(values),
                statistics.median(pairs) if pairs else None,
            )
        )
    if FIXED in times:
        best = min(times[FIXED])
        ratio = best / min(theirs) if theirs else None
        rows.append(row(f"{FIXED}{suffix}{FASTEST}", best, ratio))
    if theirs and seeds == 1:
        beside = f" beside{suffix[1:]}" if suffix else ""
        for end, value in (("", statistics.median(theirs)), (FASTEST, min(theirs))):
            compile_s = None if peer is None else peer.compile_s
            name = f"peer{beside}{end}"
            rows.append(_row(config, name, value, ratio_to_peer=1.0, compile_s=compile_s))
    return rows


def _row(config: SpeedConfig, name: str, value: float, *, seeds: int = 1, **columns: Any) -> Row:
    """Return the row of an update that takes ``value`` seconds; missing columns are None."""
    optional = ("ratio_to_peer", "fraction_of_ceiling", "peak_memory_gb", "compile_s")
    return {
        "name": name,
        "device": config.device,
        "threads": config.threads,
        "seeds": seeds,
        "ms_per_update": 1e3 * value,
        "updates_per_s": seeds / value,
        **{column: columns.get(column) for column in optional},
    }


def _memory_gb(device: str) -> float:
    """Return the peak memory in GB: of these updates on a GPU, of the process so far on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def main(config: SpeedConfig) -> None:
    """Check, measure and print; write the rows after each execution, and the figure at the end.

    Raises:
        AssertionError: an execution does not reproduce the golden values.
    """
    if config.check:
        speed_check.main(config.device, config.executions, quick=config.quick)
    rows: list[Row] = []
    for some in measure(config):
        for row in some:
            ratio = (
                "" if row["ratio_to_peer"] is None else f"{row['ratio_to_peer']:8.2f} of the peer"
            )
            print(
                f"{row['name']:<44}{row['seeds']:3d} {row['ms_per_update']:9.2f} ms{ratio}",
                flush=True,
            )
        rows += some
        write_json(config.output, rows)
    speed_figure.plot(config.output.with_suffix(".png"), rows)


if __name__ == "__main__":
    prepare_process()
    main(tyro.cli(SpeedConfig, prog="python -m benchmarks.speed"))
