"""A table of the call without options and its peers marks what misses the aims."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from benchmarks.tilt_fidelity.metrics import Row

AIMS = {
    "mode_tv": 0.02,
    "velocity_error": 0.05,
    "w2_ratio": 1.5,
    "log_z_error": 2.0,
    "log_z_ode_error": 2.0,
    "seconds": 120.0,
}
"""Largest values that a problem should have."""
MEDIAN_AIM = 0.02
"""Largest median of the velocity error over the problems."""
COLUMNS = {
    "mode_tv": ("mode TV", 3),
    "velocity_error": ("velocity error", 3),
    "w2_ratio": ("W2 ratio", 2),
    "log_z_error": ("log Z, in s.e.", 1),
    "log_z_ode_error": ("by ODE, in s.e.", 1),
    "log_weight_std": ("std(log w)", 2),
    "ess": ("ESS", 2),
    "seconds": ("seconds", 0),
}
"""Headings and decimals of the columns."""
WIDTH = 18


def table(rows: Sequence[Row]) -> str:
    """Return a table for each method: mean / worst over the seeds of each problem.

    A star marks a worst value beyond its aim; the last column counts the seeds whose call raised a
    warning.  The last lines are the median of the means and the
    worst over all problems.
    """
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        headings = "".join(f"{heading:>{WIDTH}}" for heading, _ in COLUMNS.values())
        lines.append(f"{f'{method}, mean / worst':<32}{'d':>4}{'seeds':>6}{headings}{'warned':>9}")
        problems = list(dict.fromkeys(row["problem"] for row in own))
        summaries = []
        for problem in problems:
            seeds = [row for row in own if row["problem"] == problem]
            summary = {name: mean_and_worst(seeds, name) for name in COLUMNS}
            summaries.append(summary)
            cells = "".join(cell(name, *summary[name]) for name in COLUMNS)
            lines.append(
                f"{problem:<32}{seeds[0]['dim']:>4}{len(seeds):>6}{cells}{warned(seeds):>8} "
            )
        pooled = {name: [summary[name] for summary in summaries] for name in COLUMNS}
        cells = "".join(
            cell(name, statistics.median(m for m, _ in of), worst(name, [w for _, w in of]))
            for name, of in pooled.items()
        )
        lines.append(f"{'median / worst':<42}{cells}")
        met = sum(not any(misses(name, s[name][1]) for name in AIMS) for s in summaries)
        lines.append(f"{met} of {len(problems)} problems meet every aim {aims()}")
        median = statistics.median(mean for mean, _ in pooled["velocity_error"])
        star = "" if median <= MEDIAN_AIM else "*"
        lines.append(f"median velocity error {median:.3f}{star} (aim ≤ {MEDIAN_AIM:g})")
        lines += [f"{row['problem']}, seed {row['seed']}: {f}" for row in own if (f := failed(row))]
        lines.append("")
    return "\n".join(lines).rstrip()


def warned(rows: Sequence[Row]) -> int:
    """Return how many of the calls raised a warning."""
    return sum(bool(row.get("warnings")) for row in rows)


def mean_and_worst(rows: Sequence[Row], name: str) -> tuple[float, float]:
    """Return the mean and the worst of a column; unknown values count as infinitely bad."""
    bad = 0.0 if name == "ess" else math.inf
    values = [bad if row.get(name) is None else float(row[name]) for row in rows]
    return statistics.fmean(values), worst(name, values)


def worst(name: str, values: Sequence[float]) -> float:
    """Return the smallest effective sample size, or the largest value of another column."""
    return min(values) if name == "ess" else max(values)


def misses(name: str, value: float) -> bool:
    """Return whether a value is beyond the aim of its column."""
    return name in AIMS and not value <= AIMS[name]


def cell(name: str, mean: float, worst: float) -> str:
    """Return the text of one cell, with a star where the aim is missed."""
    decimals = COLUMNS[name][1]
    star = "*" if misses(name, worst) else " "
    return f"{f'{mean:.{decimals}f} / {worst:.{decimals}f}{star}':>{WIDTH}}"


def aims() -> str:
    """Return the aims in one line."""
    return "(" + ", ".join(f"{COLUMNS[name][0]} ≤ {aim:g}" for name, aim in AIMS.items()) + ")"


def failed(row: Row) -> str:
    """Return the message of the error that stopped the call of a row; empty if none did."""
    return str(row.get("failure") or "")
