"""The published learning curves of offline-to-online agents on OGBench.

``published_curves.csv.gz`` holds the success rates that were published with Q-learning with
Adjoint Matching (arXiv 2601.14234): 12 seeds, 50 episodes an evaluation, every 50K steps, one
million steps offline and then half a million online.  Six methods are there for every task and
domain (QAM, QAM-E, QAM-F, BAM, FQL, ReBRAC), seventeen for the average over ``all`` 50 tasks.
Columns: task, method, step_k, mean, ci95_t (half-width of Student's interval), boot95_lo, boot95_hi
(bootstrap interval), min_seed, max_seed.

Task names in the file do not tell the reward: scene, puzzle-3x3 and puzzle-4x4 were run with the
sparse reward, all others with the environment's own.  Hence the curves of ``scene-play-...`` are
comparable with runs of ``scene-sparse-play-...`` and not with runs of the dense task of that name.
"""

from __future__ import annotations

import csv
import gzip
import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from applications.rl.environments.tasks import find_task

OFFLINE_STEPS = 1_000_000
"""The step at which the published runs go online."""
SEEDS = 12
"""Number of seeds of each published run."""
PRESET = "published"
"""Name of the preset of the published runs, see `applications.rl.agents.presets`."""
PUBLISHED = (
    *("QAM", "QAM-E", "QAM-F", "BAM", "FQL", "ReBRAC"),
    *("IFQL", "FEdit", "DSRL", "FAWAC", "FBRAC", "CGQL", "CGQL-M", "CGQL-L", "QSM", "DAC", "RLPD"),
)
"""Published methods; for the methods of the second line only the average is published."""
SPARSE = ("scene", "puzzle-3x3", "puzzle-4x4")
"""Environments whose published runs have the sparse reward."""


@dataclass(frozen=True, eq=False)
class PublishedCurve:
    """The published success of one method on one task.

    Attributes:
        task: name in the file, such as ``scene-play-singletask-task1-v0``.
        method: name of the method, such as ``QAM``.
        steps: steps (T,), offline and online counted together.
        mean: mean success over the seeds (T,), in [0, 1].
        low, high: ends of the 95% bootstrap interval of the mean (T,).
        student: half-width of Student's 95% interval of the mean (T,).
    """

    task: str
    method: str
    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    student: np.ndarray

    def until(self, step: int) -> PublishedCurve:
        """Return the curve up to ``step``."""
        keep = self.steps <= step
        columns = (self.steps, self.mean, self.low, self.high, self.student)
        return PublishedCurve(self.task, self.method, *(column[keep] for column in columns))

    def at(self, step: int, phase: str) -> float | None:
        """Return the mean at ``step`` if the curve has the step and it belongs to ``phase``."""
        online = step > OFFLINE_STEPS
        found = np.flatnonzero(self.steps == step)
        return float(self.mean[found[0]]) if len(found) and online == (phase == "online") else None


def published_curves(task: str) -> dict[str, PublishedCurve]:
    """Return the published curves of a task by method; empty where there are none.

    Arguments:
        task: name of a task (`published_name` translates it), of a domain of the file such as
            ``scene-play``, or ``all``.
    """
    return _table().get(published_name(task), {})


def published_name(task: str) -> str:
    """Return the name of a task in the file, or "" where no published run had its reward."""
    try:
        known = find_task(task)
    except ValueError:
        return task  # a domain, or all
    fits = known.sparse == (known.environment in SPARSE)
    return known.published if fits else ""


@cache
def _table() -> dict[str, dict[str, PublishedCurve]]:
    packed = (Path(__file__).parent / "published_curves.csv.gz").read_bytes()
    rows: dict[tuple[str, str], list[list[float]]] = {}
    for row in csv.DictReader(io.StringIO(gzip.decompress(packed).decode())):
        names = ("step_k", "mean", "boot95_lo", "boot95_hi", "ci95_t")
        numbers = [float(row[name]) for name in names]
        rows.setdefault((row["task"], row["method"]), []).append(numbers)
    table: dict[str, dict[str, PublishedCurve]] = {}
    for (task, method), points in rows.items():
        thousands, *columns = np.array(points).T
        steps = np.rint(1000 * thousands).astype(int)
        table.setdefault(task, {})[method] = PublishedCurve(task, method, steps, *columns)
    return table
