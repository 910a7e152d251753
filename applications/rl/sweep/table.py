"""The live table of a sweep: a row for every run, and a summary line.

The table is read from the folders of the runs.  On a terminal it is redrawn in place, with as many
rows as there is room for: first runs that train, then failed, waiting and finished runs.
Elsewhere, as in the log of a batch job, each change is a line, with a summary from time to time.

Updates per second are measured since this process first saw the run advance (any run, for the
summary); the time left is the number of remaining updates divided by this rate.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic
from typing import TextIO

from applications.rl.sweep import folders
from applications.rl.sweep.plan import Run, State, duration
from applications.rl.training.config import TrainConfig

ORDER = ("training", "failed", "waiting", "done")
"""Names of the visible states of a run, in the order of the rows."""


@dataclass
class Seen:
    """The visible progress of a run.

    Attributes:
        name: visible state, one of `ORDER`.
        note: reason of a failure, or the number of lost workers.
        attempt: identifier of the submission.
        updates: number of updates done.
        first, last: time and updates when the run was first and last seen to advance in this
            attempt; the time before, such as for loading the data, does not count for the rate.
        success: success rate of the latest evaluation.
    """

    name: str = "waiting"
    note: str = ""
    attempt: str = ""
    updates: int = 0
    first: tuple[float, int] | None = None
    last: tuple[float, int] = (0.0, 0)
    success: float | None = None

    @property
    def rate(self) -> float:
        """Updates per second, 0 where unknown."""
        if self.first is None or self.last[0] <= self.first[0]:
            return 0.0
        return (self.last[1] - self.first[1]) / (self.last[0] - self.first[0])

    def look(self, run: Run, state: State, config: TrainConfig, now: float) -> None:
        """Read the progress of the run from its folder."""
        if self.name in ("done", "failed"):
            return
        if state.attempt != self.attempt:
            self.attempt, self.first, self.name = state.attempt, None, "waiting"
        self.note = state.note or (f"workers lost: {state.deaths}" if state.deaths else "")
        if state.name == "submitted":
            if self.name == "waiting" and not folders.started(run, state.attempt):
                return
            self.name = "training"
        else:
            self.name = state.name
        updates = folders.updates_done(run.folder)
        if self.name == "done":
            updates = config.phases.updates
        if updates != self.updates:
            if self.first is None or updates < self.updates:
                self.first = (now, updates)
            self.last = (now, updates)
        self.updates, self.success = updates, folders.latest_success(run.folder)


class Table:
    """Shows the progress of runs on a terminal or in a log.

    Arguments:
        configs: options of each run, in the order of the table.
        states: states of the runs that ended before the sweep starts.
        out: stream to write to; the standard error stream if not given.
        every: seconds between two summaries where ``out`` is no terminal.
    """

    def __init__(
        self,
        configs: Mapping[Run, TrainConfig],
        states: Mapping[Run, State],
        out: TextIO | None = None,
        every: float = 60.0,
    ) -> None:
        self.configs, self.every = configs, every
        self.out = out or sys.stderr
        self.live = self.out.isatty()
        self.seen = {run: Seen() for run in configs}
        self._drawn, self._shown = 0, False
        self._summarised = self._began = monotonic()
        for run, state in states.items():
            self.seen[run].look(run, state, configs[run], self._began)
        for run, seen in self.seen.items():
            if seen.name == "waiting":
                seen.updates = folders.updates_done(run.folder)
        self._before = self._updates
        self._moved: tuple[float, int] | None = None

    @property
    def _updates(self) -> int:
        return sum(seen.updates for seen in self.seen.values())

    def show(self, states: Mapping[Run, State]) -> None:
        """Read the progress of all runs, then redraw the table or write new lines."""
        now, self._shown = monotonic(), True
        changed = []
        for run, state in states.items():
            seen = self.seen[run]
            was = (seen.name, seen.note)
            seen.look(run, state, self.configs[run], now)
            if (seen.name, seen.note) != was:
                changed.append(run)
        if self._moved is None and self._updates != self._before:
            self._moved = (now, self._updates)
        if self.live:
            self._draw(shutil.get_terminal_size())
            return
        lines = [self.row(run) for run in changed]
        if now - self._summarised >= self.every:
            self._summarised = now
            lines.append(self.summary(now))
        self._write("".join(f"{line}\n" for line in lines))

    def close(self) -> None:
        """Write the last summary as a line, if anything was shown."""
        if not self._shown:
            return
        if self.live and self._drawn:
            self._write(f"\x1b[{self._drawn}F\x1b[J")
            self._drawn = 0
        self._write(f"{self.summary(monotonic())}\n")

    def lines(self, height: int, now: float) -> list[str]:
        """Format the table in at most ``height`` lines."""
        runs = sorted(self.seen, key=lambda run: ORDER.index(self.seen[run].name))  # stable
        room = max(0, height - 1)
        if len(runs) > room:
            runs = runs[: max(0, room - 1)]
        rows = [self.row(run) for run in runs]
        hidden = len(self.seen) - len(runs)
        return [*rows, *([f"... and {hidden} more"] if hidden and room else []), self.summary(now)]

    def row(self, run: Run) -> str:
        """Format the row of one run."""
        seen, phases = self.seen[run], self.configs[run].phases
        text = f"{seen.name:<8}  {run.task}  {run.agent}  seed {run.seed}"
        if seen.name == "failed":
            return f"{text}: {seen.note}"
        words = [text]
        if seen.updates:
            words.append(f"step {phases.step(seen.updates)}/{phases.step(phases.updates)}")
        if seen.name == "training" and seen.rate:
            left = (phases.updates - seen.updates) / seen.rate
            words.append(f"{seen.rate:.3g} updates/s, {duration(left)} left")
        if seen.success is not None and not math.isnan(seen.success):
            words.append(f"success {seen.success:.0%}")
        return ", ".join([*words, *([seen.note] if seen.note else [])])

    def summary(self, now: float) -> str:
        """Format the summary line."""
        count = dict.fromkeys(ORDER, 0)
        for seen in self.seen.values():
            count[seen.name] += 1
        states = ", ".join(f"{n} {name}" for name, n in count.items() if n)
        ended = ("done", "failed")
        left = sum(
            self.configs[run].phases.updates - seen.updates
            for run, seen in self.seen.items()
            if seen.name not in ended
        )
        text = f"{len(self.seen)} runs: {states}; {duration(now - self._began)}"
        since, updates = self._moved or (now, 0)
        rate = (self._updates - updates) / max(1e-9, now - since)
        if left and now > since and rate > 0:
            text += f", {rate:.3g} updates/s, {duration(left / rate)} left"
        return text

    def _draw(self, size: tuple[int, int]) -> None:
        width, height = size
        lines = [line[: width - 1] for line in self.lines(height - 1, monotonic())]
        back = f"\x1b[{self._drawn}F" if self._drawn else ""
        self._write(back + "\x1b[J" + "".join(f"{line}\n" for line in lines))
        self._drawn = len(lines)

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()
