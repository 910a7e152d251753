"""The command ``report``: learning curves with the published ones, and the table of results.

For every task, a figure shows the mean success of all agents with bootstrap intervals over seeds,
and the published curves of these agents where they were run with the same reward.  Then follows the
table of `applications.rl.report.table`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro

from applications.rl.report.groups import Group, grouped
from applications.rl.report.learning_curves import Curve, learning_curves
from applications.rl.report.published import (
    OFFLINE_STEPS,
    PRESET,
    PUBLISHED,
    SEEDS,
    PublishedCurve,
    published_curves,
)
from applications.rl.report.results import read_results
from applications.rl.report.table import Line, curve_rows, format_table, table
from applications.rl.report.trust_regions import trust_region_remarks
from applications.rl.training.config import folder_name
from flows.training import ensure_writable, replacing


@dataclass(frozen=True)
class ReportConfig:
    """Draw learning curves of runs with the published ones, and print the table of results."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders, searched to any depth, or .json lists of rows; wildcards are allowed."""
    folder: Path = Path("outputs/report")
    """Folder to write figures and tables to."""
    tasks: tuple[str, ...] = ()
    """Tasks to report; all tasks that were found if not given."""
    by: tuple[str, ...] = ("agent",)
    """Settings that tell curves apart, such as `agent options.inverse_temperature`."""
    published: bool = True
    """Draw the published curves of the reported agents, where the task has them."""
    methods: tuple[str, ...] = ()
    """Additional published methods to draw, such as ReBRAC."""


@dataclass(frozen=True)
class Report:
    """The contents of a report and the files written.

    Attributes:
        lines: lines of the table.
        remarks: runs that were left out or could not be compared, and why; trust regions.
        files: the files written.
    """

    lines: tuple[Line, ...]
    remarks: tuple[str, ...]
    files: tuple[Path, ...]


def run_report(config: ReportConfig) -> Report:
    """Read the runs and write ``TASK.png``, ``curves.csv`` and ``table.csv``.

    Raises:
        ValueError: there are no results, a file is malformed, runs cannot be told apart, or a task
            or method is unknown; the message is one line.
        OSError: a file cannot be read or written.
    """
    if not config.runs:
        raise ValueError("runs: name at least one folder of runs or .json list of rows")
    unknown = [m for m in config.methods if m.lower() not in map(str.lower, PUBLISHED)]
    if unknown:
        raise ValueError(f"methods must be among {', '.join(PUBLISHED)}, got {unknown[0]!r}")
    results = read_results(config.runs)
    groups, remarks = grouped(results, config.by)
    known = sorted({group.task for group in groups})
    unknown = [task for task in config.tasks if task not in known]
    if unknown:
        raise ValueError(f"tasks: no run of {unknown[0]!r}; there are {', '.join(known)}")
    groups = [g for g in groups if not config.tasks or g.task in config.tasks]
    remarks += [
        f"{g.label} on {g.task}: no episode succeeded; where an environment does not tell success, "
        "compare the return"
        for g in groups
        if g.task.startswith(("gym:", "minari:")) and not g.success.any()
    ]
    remarks += trust_region_remarks(
        [r for r in results if not config.tasks or r.settings["task"] in config.tasks]
    )
    ensure_writable(config.folder / "table.csv", "folder")
    files = []
    for task in [t for t in known if not config.tasks or t in config.tasks]:
        path = config.folder / f"{folder_name(task)}.png"
        same = [g for g in groups if g.task == task]
        files.append(draw_task(path, same, config, remarks))
    lines = table(groups)
    files.append(_write(config.folder / "curves.csv", curve_rows(groups)))
    files.append(_write(config.folder / "table.csv", [asdict(line) for line in lines]))
    return Report(tuple(lines), tuple(remarks), tuple(files))


def show_report(config: ReportConfig) -> None:
    """Write the report and print its table, remarks and files, as the command ``report``."""
    report = run_report(config)
    print(format_table(report.lines))
    print("\n".join(["", *(f"note: {r}" for r in report.remarks)] if report.remarks else [""]))
    print("\n".join(f"wrote {path}" for path in report.files))


def draw_task(
    path: Path, groups: Sequence[Group], config: ReportConfig, remarks: list[str]
) -> Path:
    """Draw the groups of one task; append to ``remarks`` what cannot be compared."""
    starts = {group.online_from for group in groups} - {None}
    online_from = starts.pop() if len(starts) == 1 else None
    if starts:
        remarks.append(f"{groups[0].task}: agents went online at different steps")
    published: list[PublishedCurve] = []
    if config.published or config.methods:
        wanted = {m.lower() for m in config.methods}
        wanted |= {g.agent.lower() for g in groups} if config.published else set()
        found = published_curves(groups[0].task)
        published = [c for method, c in found.items() if method.lower() in wanted]
        absent = [m for m in config.methods if m.lower() not in map(str.lower, found)]
        if absent:
            remarks.append(f"{groups[0].task}: no published curve of {', '.join(absent)}")
    end = max(int(group.steps[-1]) for group in groups)
    if online_from != OFFLINE_STEPS:  # later on the published runs are in another phase
        end = min(end, OFFLINE_STEPS if online_from is None else online_from)
    published = [curve.until(end) for curve in published if curve.steps[0] <= end]
    counts = sorted({len(group.seeds) for group in groups})
    seeds = "1 seed" if counts == [1] else f"{'-'.join(map(str, counts))} seeds"
    episodes = sorted({int(n) for group in groups for n in np.unique(group.episodes)})
    span = str(episodes[0]) if len(episodes) == 1 else f"{episodes[0]}-{episodes[-1]}"
    subtitle = f"mean of {seeds}, {span} episodes an evaluation"
    if counts != [1]:
        subtitle += "; bands: 95% bootstrap intervals over seeds"
    names = ", ".join(curve.method for curve in published)
    other = "" if {group.preset for group in groups} == {PRESET} else "; runs of another preset"
    return learning_curves(
        path,
        [Curve(g.label, g.steps, g.success) for g in groups],
        published=published,
        online_from=online_from,
        title=groups[0].task,
        subtitle=subtitle,
        note=f"dashed: published {names}, {SEEDS} seeds{other}" if published else "",
    )


def _write(path: Path, rows: Sequence[dict]) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0]])
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path, "folder") as file:
        file.write(text.getvalue().encode())
    return path
