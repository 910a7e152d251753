"""The figure of the suite ``agents``: final success and learning curves of each task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from applications.common.pictures import style
from applications.rl import AGENTS
from applications.rl.evaluation.statistics import bootstrap_interval
from benchmarks.rl.cost import curves
from benchmarks.rl.runs import Row


def final_success(rows: Sequence[Row], task: str) -> dict[tuple[str, str], np.ndarray]:
    """Return the success at the last step, a value for each seed, by agent and preset of a task."""
    last: dict[tuple[str, str], dict[int, tuple[int, float]]] = {}
    for row in rows:
        if row["task"] == task:
            own = last.setdefault((str(row["agent"]), str(row["preset"])), {})
            seed, step = int(row["seed"]), int(row["step"])
            if seed not in own or step > own[seed][0]:
                own[seed] = (step, float(row["success"]))
    return {name: np.array([value for _, value in own.values()]) for name, own in last.items()}


def draw(path: Path, rows: Sequence[Row]) -> Path:
    """Draw a column for each task: final success with intervals above, learning curves below.

    Arguments:
        path: the PNG to write.
        rows: evaluations, see `benchmarks.rl.runs.read_rows`.
    """
    tasks = list(dict.fromkeys(str(row["task"]) for row in rows))
    figure, axes = style.sheet(
        2,
        len(tasks),
        (4.6, 4.4),
        title="Which agent learns best?",
        subtitle="success, mean over the seeds; bars and bands are 95% intervals over seeds",
        gap=(0.8, 1.5),
        margin=(1.6, 0.4, 1.2, 0.6),
    )
    for column, task in enumerate(tasks):
        _final(axes[0][column], final_success(rows, task))
        style.heading(axes[0][column], task.split("-singletask")[0])
        _curves(axes[1][column], rows, task)
    return style.save(figure, path)


def _color(agent: str) -> str:
    found = AGENTS.get(agent)
    return found.color if found is not None and found.color else style.INK


def _final(ax: Axes, values: dict[tuple[str, str], np.ndarray]) -> None:
    style.chart(ax)
    order = sorted(values, key=lambda name: values[name].mean())
    for y, name in enumerate(order):
        own = values[name]
        low, high = bootstrap_interval([own])
        ax.hlines(y, float(low), float(high), color=_color(name[0]), lw=2, alpha=0.6)
        ax.scatter([own.mean()], [y], color=_color(name[0]), s=24, zorder=3)
    ax.set_yticks(range(len(order)), [label(*name) for name in order])
    ax.tick_params(axis="y", labelsize=7.5)
    ax.set_xlim(-0.03, 1.03)


def _curves(ax: Axes, rows: Sequence[Row], task: str) -> None:
    style.chart(ax)
    for (agent, preset), curve in curves(rows, task).items():
        own = preset in ("small", "small behaviour")
        ax.plot(
            list(curve), list(curve.values()), color=_color(agent), lw=1.6, ls="-" if own else ":"
        )
    ax.set_ylim(-0.03, 1.03)
    ax.set_xlabel("updates", color=style.INK, fontsize=9)


def label(agent: str, preset: str) -> str:
    """Return the name of an agent in a table: with the changes to its preset, if there are any."""
    changes = preset.removeprefix("small").removeprefix(" behaviour").strip()
    return f"{agent} {changes}".strip()
