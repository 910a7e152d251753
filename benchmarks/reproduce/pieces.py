"""Long work is done in pieces: each call has a limit of time, and stops cleanly.

A piece is one call of the benchmark with ``--minutes``.  Making data is a process of its own: files
that are finished are kept, so that it may be ended at any moment.  A training ends by
`flows.training.StopTraining` with a checkpoint and an evaluation; its seeds, which are stacked,
must end at the same update, or the rest of them would be compiled anew.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from applications.common.errors import RunError
from applications.rl.data.manifest import versions
from benchmarks.reproduce.config import ReproduceConfig
from flows import Callback
from flows.training import StopTraining, Training, write_json
from flows.training.callbacks import Metrics


class Piece:
    """Tells how much time is left to this call.

    Arguments:
        minutes: limit in minutes, from now; 0 is no limit.
        now: clock in seconds.
    """

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self.end = now() + 60 * minutes if minutes else float("inf")

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - self.now()


class Times:
    """Keeps in a file the seconds that data and trainings took over all pieces.

    Arguments:
        path: file to read and to write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def spent(self, part: str) -> float:
        """Return the seconds that a part has taken so far."""
        return float(self.content.get(part, {}).get("seconds", 0.0))

    def facts(self, part: str, step: int) -> dict[str, Any]:
        """Return seconds, device and versions at a step; empty if the call was killed there."""
        return dict(self.content.get(part, {}).get("steps", {}).get(str(step), {}))

    def add(self, part: str, seconds: float) -> None:
        """Add the seconds of a part."""
        self.content.setdefault(part, {})["seconds"] = self.spent(part) + seconds
        write_json(self.path, self.content)

    def note(self, part: str, step: int, facts: Mapping[str, Any]) -> None:
        """Note the facts of a step when it is reached first."""
        steps = self.content.setdefault(part, {}).setdefault("steps", {})
        if str(step) not in steps:
            steps[str(step)] = dict(facts)
            write_json(self.path, self.content)


class Clock(Callback):
    """Notes when the evaluations of a training are due, and stops it when the time is over.

    One clock serves all stacked seeds: the first that finds the time over sets the update, the next
    multiple of ``unit``, at which all of them stop.

    Arguments:
        piece: the time that is left.
        reserve: seconds that the evaluations after the stop need.
        times: where seconds are noted.
        part: name of the training in ``times``.
        every: updates between two evaluations.
        unit: updates that are made at once.
        facts: facts of this call, noted with the seconds.
    """

    def __init__(
        self,
        piece: Piece,
        *,
        reserve: float,
        times: Times,
        part: str,
        every: int,
        unit: int,
        facts: Mapping[str, Any],
    ) -> None:
        self.piece, self.reserve, self.times, self.part = piece, reserve, times, part
        self.every, self.unit, self.facts = every, unit, facts
        self.began, self.before = piece.now(), times.spent(part)
        self.stop_at: int | None = None

    def on_step(self, trainer: Training, iteration: int, metrics: Metrics) -> None:
        """Note the seconds where an evaluation is due, and stop where the time is over."""
        if iteration % self.every == 0:
            seconds = round(self.before + self.piece.now() - self.began, 1)
            self.times.note(self.part, iteration, {"seconds": seconds, **self.facts})
        if self.stop_at is None and self.piece.left < self.reserve:
            self.stop_at = (iteration // self.unit + 1) * self.unit
        if self.stop_at is not None and iteration >= self.stop_at:
            raise StopTraining("the minutes of this call are over; the same command continues")


def make_data(config: ReproduceConfig, piece: Piece) -> bool:
    """Make the data, or go on with them; say whether they are complete.

    Raises:
        RunError: the command that makes them failed.
    """
    command = [sys.executable, "-m", "applications.rl", "data", "--task", config.task(1)]
    command += ["--transitions", str(config.size), "--workers", str(config.cores)]
    command += ["--folder", str(config.data)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        status = process.wait(None if piece.left == float("inf") else max(0.0, piece.left))
    except subprocess.TimeoutExpired:
        return False
    finally:
        process.kill()
        process.wait()
    if status:
        raise RunError(
            f"the data could not be made, see above; the command was {' '.join(command)}"
        )
    return True


def facts_of(config: ReproduceConfig) -> dict[str, Any]:
    """Return device, precision and versions of this call."""
    found = versions()
    device = torch.cuda.get_device_name() if config.on_gpu else platform.processor() or "cpu"
    return {
        "device": device,
        "cores": config.cores,
        "precision": config.exactness,
        "torch": torch.__version__,
        "mujoco": found["mujoco"],
        "ogbench": found["ogbench"],
    }
