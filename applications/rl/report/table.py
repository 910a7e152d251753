"""The table of final results, and the numbers behind the learning curves.

Every task, agent and phase has a line at the last step that all seeds reached.  An agent that was
run on several tasks has a line for all of them together, with the stratified bootstrap of
`applications.rl.evaluation.statistics`.  One seed alone has no spread over seeds: its interval is
Wilson's, over episodes.  Several tasks with one seed and as many episodes each have Wilson's
interval over all episodes together (too wide rather than too narrow where tasks differ); in all
other cases there is no interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from applications.rl.evaluation.statistics import (
    Statistic,
    bootstrap_interval,
    interquartile_mean,
    mean,
    wilson_interval,
)
from applications.rl.report.groups import Group
from applications.rl.report.published import PRESET, published_curves
from applications.rl.report.results import PHASES


@dataclass(frozen=True)
class Line:
    """One line of the table; success rates are in [0, 1], intervals cover 95%.

    Attributes:
        task: name of the task, or "N tasks".
        agent: label of the setting.
        phase, step: place of the evaluation; the step is None where it differs between the tasks.
        seeds: number of seeds, of all tasks together.
        episodes: number of episodes, of all seeds together.
        mean, mean_low, mean_high: mean and its interval, None where there is none.
        iqm, iqm_low, iqm_high: interquartile mean and its interval, None where there is none.
        mean_return, return_low, return_high: mean return of one task and its interval over seeds,
            None where it was not recorded or there is none.
        over: population of the intervals: seeds, or episodes where each task has a single seed.
        preset: presets of the runs; published runs have the preset
            `applications.rl.report.published.PRESET`.
        published: published mean of the agent at this step, where there is one.
    """

    task: str
    agent: str
    phase: str
    step: int | None
    seeds: int
    episodes: int
    mean: float
    mean_low: float | None
    mean_high: float | None
    iqm: float
    iqm_low: float | None
    iqm_high: float | None
    mean_return: float | None
    return_low: float | None
    return_high: float | None
    over: str
    preset: str
    published: float | None = None


def table(groups: Sequence[Group]) -> list[Line]:
    """Make the lines of each task, agent and phase, then the lines over several tasks."""
    lines = []
    at: dict[tuple[str, str], list[tuple[Group, int]]] = {}
    for group in groups:
        for phase in PHASES:
            i = group.last(phase)
            if i is not None:
                lines.append(_line([(group, i)], phase))
                at.setdefault((group.label, phase), []).append((group, i))
    lines += [_line(tasks, phase) for (_, phase), tasks in at.items() if len(tasks) > 1]
    return lines


def curve_rows(groups: Sequence[Group]) -> list[dict[str, str | int | float | None]]:
    """Make the rows of curves.csv: one per task, agent and step, intervals None for one seed."""
    rows: list[dict[str, str | int | float | None]] = []
    for group in groups:
        low, high = bootstrap_interval([group.success])
        columns = (mean(group.success), low, high, interquartile_mean(group.success))
        returns = mean(group.returns)
        several = len(group.seeds) > 1
        for i, step in enumerate(group.steps):
            row: dict[str, str | int | float | None] = {
                "task": group.task,
                "agent": group.label,
                "phase": group.phases[i],
                "step": int(step),
                "seeds": len(group.seeds),
            }
            names = ("mean", "mean_low", "mean_high", "iqm")
            values = {n: float(c[i]) for n, c in zip(names, columns, strict=True)}
            row |= values | ({} if several else {"mean_low": None, "mean_high": None})
            rows.append(row | {"return": float(returns[i]) if np.isfinite(returns[i]) else None})
    return rows


def format_table(lines: Sequence[Line]) -> str:
    """Format the table for a terminal, in percent."""

    def interval(value: float | None, low: float | None, high: float | None, unit: float) -> str:
        if value is None:
            return ""
        if low is None or high is None:
            return f"{unit * value:5.1f}"
        return f"{unit * value:5.1f} [{unit * low:5.1f}, {unit * high:5.1f}]"

    head = ("task", "agent", "phase", "step", "seeds", "mean %", "IQM %", "return", "published %")
    cells = [
        (
            line.task,
            line.agent,
            line.phase,
            "last" if line.step is None else str(line.step),
            f"{line.seeds}{_mark(line)}",
            interval(line.mean, line.mean_low, line.mean_high, 100),
            interval(line.iqm, line.iqm_low, line.iqm_high, 100),
            interval(line.mean_return, line.return_low, line.return_high, 1),
            "" if line.published is None else f"{100 * line.published:.1f}{_other(line)}",
        )
        for line in lines
    ]
    widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
    left = (0, 1, 2, 5, 6, 7)
    text = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *cells)
    ]
    marks = {_mark(line) for line in lines}
    if "*" in marks:
        text.append("* one seed: the interval is Wilson's over its episodes")
    if "**" in marks:
        text.append("** one seed of each task: Wilson's interval over all episodes, where it holds")
    others = sorted({line.preset for line in lines if line.published is not None and _other(line)})
    if others:
        text.append(f"+ published runs have the preset {PRESET}, these have: {', '.join(others)}")
    return "\n".join(text)


def _other(line: Line) -> str:
    return "" if line.preset == PRESET else "+"


def _mark(line: Line) -> str:
    if line.over == "seeds":
        return ""
    return "*" if line.seeds == 1 else "**"


def _returns(values: np.ndarray) -> tuple[float | None, float | None, float | None]:
    """Compute the mean of the seeds' returns and its interval."""
    if not np.isfinite(values).all():
        return None, None, None
    if len(values) == 1:
        return float(values[0]), None, None
    low, high = bootstrap_interval([values])
    return float(mean(values)), float(low), float(high)


def _line(tasks: Sequence[tuple[Group, int]], phase: str) -> Line:
    group, i = tasks[0]
    scores = [g.success[:, k] for g, k in tasks]
    pooled = np.concatenate(scores)
    episodes = sum(int(g.episodes[:, k].sum()) for g, k in tasks)
    steps = {int(g.steps[k]) for g, k in tasks}
    over = "episodes" if len(pooled) == len(tasks) else "seeds"
    balanced = len({int(g.episodes[0, k]) for g, k in tasks}) == 1

    def interval(statistic: Statistic) -> tuple[float | None, float | None]:
        if over == "episodes":
            # The rate over all episodes is the mean of the tasks only if they have as many each,
            # and the interquartile mean only if it leaves none out.
            if not balanced or (statistic is interquartile_mean and len(pooled) >= 4):
                return None, None
            return wilson_interval(round(float(mean(pooled)) * episodes), episodes)
        low, high = bootstrap_interval(scores, statistic)
        return float(low), float(high)

    published = None
    if len(tasks) == 1:
        method = published_curves(group.task).get(group.agent.upper())
        published = None if method is None else method.at(int(group.steps[i]), phase)
    return Line(
        group.task if len(tasks) == 1 else f"{len(tasks)} tasks",
        group.label,
        phase,
        steps.pop() if len(steps) == 1 else None,
        len(pooled),
        episodes,
        float(mean(pooled)),
        *interval(mean),
        float(interquartile_mean(pooled)),
        *interval(interquartile_mean),
        *(_returns(group.returns[:, i]) if len(tasks) == 1 else (None, None, None)),
        over,
        ", ".join(sorted({g.preset for g, _ in tasks})),
        published,
    )
