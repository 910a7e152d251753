"""Callbacks that every training of an application has: a progress bar and a log."""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from flows import Callback, ProgressBar
from flows.training import CSVLogger, Training


class ResumeNotice(Callback):
    """Writes to the standard error stream at which iteration a training is resumed.

    Arguments:
        name: what is trained, as the user sees it.
    """

    writes = True

    def __init__(self, name: str) -> None:
        self.name = name

    def on_start(self, trainer: Training) -> None:
        """Write the line, if the training does not begin here."""
        if trainer.iteration:
            where = f"iteration {trainer.iteration} of {trainer.config.iterations}"
            tqdm.write(f"{self.name}: resumed at {where}", file=sys.stderr)


def training_callbacks(name: str, log: Path) -> list[Callback]:
    """Make a notice of resumes, a progress bar called ``name``, and a logger to the CSV ``log``."""
    return [ResumeNotice(name), ProgressBar(name), CSVLogger(log)]
