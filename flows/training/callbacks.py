"""What watches a training run: a progress bar, and loggers of its metrics.

A callback does not change the run, but it can end it: `StopTraining`.  Metrics arrive as tensors,
perhaps on a device that is still computing them; turning one into a number waits for the device, so
every callback does that only once in a number of iterations, and in the last one.

A logged file is a function of the run alone (no clock, no host), and a run that is killed and
resumed writes the same file as one left undisturbed: rows are written out before the checkpoint of
their iteration is, and at a resume the rows beyond that checkpoint are dropped, to be written again
with the same numbers.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from torch import Tensor
from tqdm import tqdm

from flows.training.checkpoint import ensure_writable, finite, replacing

if TYPE_CHECKING:
    from flows.training.trainer import Trainer

Metrics = Mapping[str, Tensor | float]


class StopTraining(Exception):  # noqa: N818  (it names the event, as StopIteration does)
    """Ends a training cleanly when a callback raises it in ``on_step``.

    The other callbacks still see the iteration, a checkpoint is saved, ``on_end`` is called, and
    `Trainer.fit` returns the module that was reached.  ``Trainer.stopped`` then holds the message.
    A resume goes on from there.  Of several processes all stop, whichever callback raised it; of
    several runs trained together only that of the callback.

    Example: ``raise StopTraining(f"reward {reward:.2f} is high enough")``
    """


class Callback:
    """Hooks that do nothing; override the ones of interest.

    Attributes:
        writes: whether of several processes (``flows.training.distributed``) only the first calls
        it.  One
            that evaluates a sharded module must be called in all.
    """

    writes: bool = False

    def on_start(self, trainer: Trainer) -> None:
        """Before the first iteration; ``trainer.iteration`` is above 0 in a resumed run."""

    def on_step(self, trainer: Trainer, iteration: int, metrics: Metrics) -> None:
        """After every iteration, counted from 1, and before the checkpoint of that iteration."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last iteration, and also when training stops by an error."""


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse what is no callback before it is called in a training.

    Raises:
        TypeError: no sequence, or one that holds something else.
    """
    if not isinstance(callbacks, Sequence):
        raise TypeError(f"callbacks must be a sequence, got {callbacks!r}")
    for callback in callbacks:
        if isinstance(callback, type) or not hasattr(callback, "on_step"):
            got = f"the class {callback.__name__}" if isinstance(callback, type) else repr(callback)
            raise TypeError(
                f"callbacks must be a sequence of flows.training.callbacks.Callback, got {got}"
            )


class ProgressBar(Callback):
    """A bar on the standard error stream with the loss and a few more metrics.

    Arguments:
        description: what stands before the bar.
        every: iterations between two readings of the metrics.
        shown: how many metrics are shown, in the order in which the loss returns them.
    """

    writes = True

    def __init__(self, description: str = "", *, every: int = 25, shown: int = 3) -> None:
        self.description = description
        self.every = _check_every(every)
        self.shown = shown
        self._bar: Any = None

    def on_start(self, trainer: Trainer) -> None:
        """Open the bar at the iteration where the run stands."""
        self._bar = tqdm(
            total=trainer.config.iterations,
            initial=trainer.iteration,
            desc=self.description or None,
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def on_step(self, trainer: Trainer, iteration: int, metrics: Metrics) -> None:
        """Move the bar; read the metrics once in ``every`` iterations and at the end."""
        if _due(trainer, iteration, self.every):
            shown = {name: f"{float(metrics[name]):.4g}" for name in [*metrics][: self.shown]}
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(1)

    def on_end(self, trainer: Trainer) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class CSVLogger(Callback):
    """Metrics as a table: the column ``iteration``, then one column per metric.

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
        self.every = _check_every(every)
        self._file: TextIO | None = None
        self._columns: list[str] = []

    def on_start(self, trainer: Trainer) -> None:
        """Keep the header and the rows up to the iteration where the run stands."""
        lines = _complete_lines(self.path) if trainer.iteration else []
        if lines and lines[0].split(",")[0].strip() != "iteration":
            raise ValueError(f"{self.path}: first column must be 'iteration', got {lines[0]!r}")
        header, rows = lines[:1], lines[1:]
        kept = [row for row in rows if int(row.split(",")[0]) <= trainer.iteration]
        self._columns = next(csv.reader(header), [])
        self._file = _rewrite(self.path, "".join(header + kept))

    def on_step(self, trainer: Trainer, iteration: int, metrics: Metrics) -> None:
        """Append a row once in ``every`` iterations and at the end."""
        if self._file is None or not _due(trainer, iteration, self.every):
            return
        row = {"iteration": iteration, **_numbers(metrics)}
        new = [name for name in row if name not in self._columns]
        if new:
            self._widen(new)
        self._file.write(_csv_line(row.get(name, "") for name in self._columns))
        self._file.flush()  # before the checkpoint of this iteration

    def on_end(self, trainer: Trainer) -> None:
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
    """Metrics as one JSON object per line, with the key ``iteration``; non-finite values are null.

    Arguments and errors as for ``CSVLogger``.
    """

    writes = True

    def __init__(self, path: str | Path, every: int = 10) -> None:
        self.path = Path(path)
        self.every = _check_every(every)
        self._file: TextIO | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Keep the rows up to the iteration where the run stands."""
        lines = _complete_lines(self.path) if trainer.iteration else []
        try:
            kept = [line for line in lines if json.loads(line)["iteration"] <= trainer.iteration]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.path} is not a file of this logger: {error}") from error
        self._file = _rewrite(self.path, "".join(kept))

    def on_step(self, trainer: Trainer, iteration: int, metrics: Metrics) -> None:
        """Append a line once in ``every`` iterations and at the end."""
        if self._file is None or not _due(trainer, iteration, self.every):
            return
        row = finite({"iteration": iteration, **_numbers(metrics)})
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()  # before the checkpoint of this iteration

    def on_end(self, trainer: Trainer) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class TensorBoardLogger(Callback):
    """Metrics as TensorBoard scalars; after a resume TensorBoard hides what came later.

    Arguments:
        folder: of the event files.
        every: iterations between two points; the last iteration always has one.

    Raises (when training starts):
        ImportError: TensorBoard is not installed.
        OSError: the folder cannot be written.
    """

    writes = True

    def __init__(self, folder: str | Path, every: int = 10) -> None:
        self.folder = Path(folder)
        self.every = _check_every(every)
        self._writer: Any = None

    def on_start(self, trainer: Trainer) -> None:
        """Open an event file that takes over after the iteration where the run stands."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoardLogger needs TensorBoard: pip install 'adjoint-matching[logging]'"
            ) from error
        ensure_writable(self.folder / "events", "TensorBoardLogger")
        self._writer = SummaryWriter(str(self.folder), purge_step=trainer.iteration + 1)

    def on_step(self, trainer: Trainer, iteration: int, metrics: Metrics) -> None:
        """Add one point per metric once in ``every`` iterations and at the end."""
        if _due(trainer, iteration, self.every):
            for name, value in _numbers(metrics).items():
                self._writer.add_scalar(name, value, iteration)
            self._writer.flush()  # before the checkpoint of this iteration

    def on_end(self, trainer: Trainer) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _check_every(every: int) -> int:
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    return every


def _due(trainer: Trainer, iteration: int, every: int) -> bool:
    """Whether metrics are read after this iteration."""
    return iteration % every == 0 or iteration == trainer.config.iterations


def _numbers(metrics: Metrics) -> dict[str, float]:
    """The metrics with nine significant digits, which tell any two float32 numbers apart."""
    return {name: float(f"{float(value):.9g}") for name, value in metrics.items()}


def _csv_line(cells: Any) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def _complete_lines(path: Path) -> list[str]:
    """Lines of ``path``, without a last one that a kill cut short; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [line for line in file if line.endswith("\n")]


def _rewrite(path: Path, text: str) -> TextIO:
    """``path`` with the content ``text``, replaced atomically, and open for appending."""
    with replacing(path, "logger") as file:
        file.write(text.encode())
    return path.open("a", newline="", encoding="utf-8")
