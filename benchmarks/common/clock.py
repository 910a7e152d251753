"""The clock of the benchmarks of speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch

Clock = Literal["wall", "cpu"]
"""Time of the wall, or of this process's processors: the better one on a CPU that others use too,
with one thread (with several it is their sum)."""


def seconds(run: Callable[[], object], calls: int, *, device: str, clock: Clock) -> float:
    """Seconds a call of ``run``, of a block of them; on a GPU until it has done them."""
    now = time.perf_counter if clock == "wall" else time.process_time
    wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    wait()
    start = now()
    for _ in range(calls):
        run()
    wait()
    return (now() - start) / calls


def check_clock(clock: Clock, device: str) -> None:
    """Refuse the processor's time for what is done elsewhere.

    Raises:
        ValueError: ``clock`` is "cpu" on another device.
    """
    if clock == "cpu" and not device.startswith("cpu"):
        raise ValueError(f"clock must be 'wall' on device {device!r}, got 'cpu'")
