"""Callbacks that log the metrics of a training: CSV, JSON lines, and TensorBoard.

A logged file is a function of the run alone (no clock, no host), and a run that is killed and
resumed writes the same file as one left undisturbed: rows are written out before the checkpoint of
their iteration is, and at a resume the rows beyond that checkpoint are dropped, to be written again
with the same numbers.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any, TextIO

from flows.training.callbacks import Callback, Metrics, Training, check_every, due
from flows.training.checkpoint import ensure_writable, finite, replacing


class CSVLogger(Callback):
    """Writes metrics as a CSV table: the column ``iteration``, then one column per metric.

    A metric that first appears later widens the table; its earlier cells are empty.

    Arguments:
        path: the file; one of an earlier run is replaced unless the run is resumed.
        every: iterations between two rows; the last iteration always has one.

    Raises (when training starts):
        OSError: the file cannot be written.
        ValueError: a resumed run finds a file that this logger did not write.
    """

    writes = True

    def __init__(self, path: str | Path, every: int = 10) -> None:
        self.path = Path(path)
        self.every = check_every(every)
        self._file: TextIO | None = None
        self._columns: list[str] = []

    def on_start(self, trainer: Training) -> None:
        """Keep the header and the rows up to the iteration where the run stands."""
        lines = _complete_lines(self.path) if trainer.iteration else []
        if lines and lines[0].split(",")[0].strip() != "iteration":
            raise ValueError(f"{self.path}: first column must be 'iteration', got {lines[0]!r}")
        header, rows = lines[:1], lines[1:]
        kept = [row for row in rows if int(row.split(",")[0]) <= trainer.iteration]
        self._columns = next(csv.reader(header), [])
        self._file = _rewrite(self.path, "".join(header + kept))

    def on_step(self, trainer: Training, iteration: int, metrics: Metrics) -> None:
        """Append a row once in ``every`` iterations and at the end."""
        if self._file is None or not due(trainer, iteration, self.every):
            return
        row = {"iteration": iteration, **_numbers(metrics)}
        new = [name for name in row if name not in self._columns]
        if new:
            self._widen(new)
        self._file.write(_csv_line(row.get(name, "") for name in self._columns))
        self._file.flush()  # before the checkpoint of this iteration

    def on_end(self, trainer: Training) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _widen(self, new: list[str]) -> None:
        assert self._file is not None
        self._file.close()
        with self.path.open(newline="") as file:
            rows = [*csv.reader(file)][1:]
        self._columns = self._columns + new
        padding = [""] * len(self._columns)
        table = [self._columns, *((row + padding)[: len(padding)] for row in rows)]
        self._file = _rewrite(self.path, "".join(map(_csv_line, table)))


class JSONLLogger(Callback):
    """Writes metrics as one JSON object per line, with the key ``iteration``.

    Values that are not finite become null.  Arguments and errors are those of ``CSVLogger``.
    """

    writes = True

    def __init__(self, path: str | Path, every: int = 10) -> None:
        self.path = Path(path)
        self.every = check_every(every)
        self._file: TextIO | None = None

    def on_start(self, trainer: Training) -> None:
        """Keep the rows up to the iteration where the run stands."""
        lines = _complete_lines(self.path) if trainer.iteration else []
        try:
            kept = [line for line in lines if json.loads(line)["iteration"] <= trainer.iteration]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.path} is not a file of this logger: {error}") from error
        self._file = _rewrite(self.path, "".join(kept))

    def on_step(self, trainer: Training, iteration: int, metrics: Metrics) -> None:
        """Append a line once in ``every`` iterations and at the end."""
        if self._file is None or not due(trainer, iteration, self.every):
            return
        row = finite({"iteration": iteration, **_numbers(metrics)})
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()  # before the checkpoint of this iteration

    def on_end(self, trainer: Training) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class TensorBoardLogger(Callback):
    """Writes metrics as TensorBoard scalars; points beyond a resume are hidden.

    Arguments:
        folder: where the event files are written.
        every: iterations between two points; the last iteration always has one.

    Raises (when training starts):
        ImportError: TensorBoard is not installed.
        OSError: the folder cannot be written.
    """

    writes = True

    def __init__(self, folder: str | Path, every: int = 10) -> None:
        self.folder = Path(folder)
        self.every = check_every(every)
        self._writer: Any = None

    def on_start(self, trainer: Training) -> None:
        """Open an event file that takes over after the iteration where the run stands."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoardLogger needs TensorBoard: pip install 'adjoint-matching[logging]'"
            ) from error
        ensure_writable(self.folder / "events", "TensorBoardLogger")
        self._writer = SummaryWriter(str(self.folder), purge_step=trainer.iteration + 1)

    def on_step(self, trainer: Training, iteration: int, metrics: Metrics) -> None:
        """Add one point per metric once in ``every`` iterations and at the end."""
        if due(trainer, iteration, self.every):
            for name, value in _numbers(metrics).items():
                self._writer.add_scalar(name, value, iteration)
            self._writer.flush()  # before the checkpoint of this iteration

    def on_end(self, trainer: Training) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _numbers(metrics: Metrics) -> dict[str, float]:
    """Return metrics with nine significant digits, which tell any two float32 numbers apart."""
    return {name: float(f"{float(value):.9g}") for name, value in metrics.items()}


def _csv_line(cells: Any) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def _complete_lines(path: Path) -> list[str]:
    """Return the lines of a file, without a last one that a kill cut short."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [line for line in file if line.endswith("\n")]


def _rewrite(path: Path, text: str) -> TextIO:
    """Replace the content of ``path`` by ``text`` atomically, and open it for appending."""
    with replacing(path, "logger") as file:
        file.write(text.encode())
    return path.open("a", newline="", encoding="utf-8")
