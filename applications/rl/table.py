"""The table of final results, and the numbers behind the curves.

For every task, agent and phase a line at the last step that all seeds reached; where an agent was
run on several tasks, a line for all of them together, by the stratified bootstrap of
``statistics``.  One seed alone has no spread over seeds: its interval is Wilson's, over episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from applications.rl.groups import Group
from applications.rl.official import published_curves
from applications.rl.results import PHASES
from applications.rl.statistics import (
    Statistic,
    bootstrap_interval,
    interquartile_mean,
    mean,
    wilson_interval,
)


@dataclass(frozen=True)
class Line:
    """One line of the table; success rates are in [0, 1], intervals cover 95%.

    Attributes:
        task: Its name, or "N tasks".
        agent: Label of the setting.
        phase, step: When; the step is None where it differs between the tasks.
        seeds: Seeds, of all tasks together.
        episodes: Episodes behind the line, of all seeds together.
        mean, mean_low, mean_high: Mean and its interval.
        iqm, iqm_low, iqm_high: Interquartile mean and its interval.
        over: What the intervals are over: seeds, or the episodes of a single seed.
        published: Published mean of the same agent at the same step, where there is one.
    """

    task: str
    agent: str
    phase: str
    step: int | None
    seeds: int
    episodes: int
    mean: float
    mean_low: float
    mean_high: float
    iqm: float
    iqm_low: float
    iqm_high: float
    over: str
    published: float | None = None


def table(groups: Sequence[Group]) -> list[Line]:
    """Lines per task, agent and phase, then those of agents over several tasks."""
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


def curve_rows(groups: Sequence[Group]) -> list[dict[str, str | int | float]]:
    """Everything drawn, a row per task, agent and step; intervals over seeds."""
    rows: list[dict[str, str | int | float]] = []
    for group in groups:
        low, high = bootstrap_interval([group.success])
        columns = (mean(group.success), low, high, interquartile_mean(group.success))
        for i, step in enumerate(group.steps):
            row: dict[str, str | int | float] = {
                "task": group.task,
                "agent": group.label,
                "phase": group.phases[i],
                "step": int(step),
                "seeds": len(group.seeds),
            }
            names = ("mean", "mean_low", "mean_high", "iqm")
            rows.append(row | {n: float(c[i]) for n, c in zip(names, columns, strict=True)})
    return rows


def format_table(lines: Sequence[Line]) -> str:
    """The table for a terminal, in percent."""

    def interval(value: float, low: float, high: float) -> str:
        return f"{100 * value:5.1f} [{100 * low:5.1f}, {100 * high:5.1f}]"

    head = ("task", "agent", "phase", "step", "seeds", "mean %", "IQM %", "published %")
    cells = [
        (
            line.task,
            line.agent,
            line.phase,
            "last" if line.step is None else str(line.step),
            f"{line.seeds}" + ("" if line.over == "seeds" else "*"),
            interval(line.mean, line.mean_low, line.mean_high),
            interval(line.iqm, line.iqm_low, line.iqm_high),
            "" if line.published is None else f"{100 * line.published:.1f}",
        )
        for line in lines
    ]
    widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
    left = (0, 1, 2, 5, 6)
    text = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *cells)
    ]
    if any(line.over == "episodes" for line in lines):
        text.append("* one seed: the interval is Wilson's over its episodes")
    return "\n".join(text)


def _line(tasks: Sequence[tuple[Group, int]], phase: str) -> Line:
    group, i = tasks[0]
    scores = [g.success[:, k] for g, k in tasks]
    pooled = np.concatenate(scores)
    episodes = sum(int(g.episodes[:, k].sum()) for g, k in tasks)
    steps = {int(g.steps[k]) for g, k in tasks}
    over = "episodes" if len(pooled) == 1 else "seeds"

    def interval(statistic: Statistic) -> tuple[float, float]:
        if over == "episodes":
            return wilson_interval(round(float(pooled[0]) * episodes), episodes)
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
        over,
        published,
    )
