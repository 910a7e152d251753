"""Timing of blocks of calls, by wall-clock time or by processor time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch

Clock = Literal["wall", "cpu"]
"""Wall-clock time, or the processor time of this process.  Processor time is the better choice with
one thread on a CPU that others use too; with several threads it is their sum."""


def seconds(run: Callable[[], object], calls: int, *, device: str, clock: Clock) -> float:
    """Return the seconds of a call of ``run``, averaged over ``calls``; a GPU is waited for."""
    now = time.perf_counter if clock == "wall" else time.process_time
    wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    wait()
    start = now()
    for _ in range(calls):
        run()
    wait()
    return (now() - start) / calls


def check_clock(clock: Clock, device: str) -> None:
    """Refuse processor time for work that another device does.

    Raises:
        ValueError: ``clock`` is "cpu" on another device.
    """
    if clock == "cpu" and not device.startswith("cpu"):
        raise ValueError(f"clock must be 'wall' on device {device!r}, got 'cpu'")
