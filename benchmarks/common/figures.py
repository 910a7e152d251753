"""Figures of benchmark results, in the style of the applications' pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from applications.common.pictures import style

METRICS = {
    "velocity_error": "velocity error",
    "w2_ratio": "Wasserstein ratio",
    "mode_tv": "mode TV",
}
AIMS = {"w2_ratio": 1.5, "mode_tv": 0.02}
HUES = ("#6f7a8c", "#a9b4c4", "#2f7fc4", "#7cc8ff", style.TILTED, "#f4e3c1", "#d9623a")


def kernel_comparison(
    path: str | Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    metrics: Mapping[str, str] = METRICS,
    aims: Mapping[str, float] = AIMS,
    kernels: Sequence[str] | None = None,
    title: str = "How faithful is the tilt?",
    subtitle: str = "dots are problems, bars are medians; by steps K; lower is better",
) -> Path:
    """Draw kernels side by side for each number of steps: dots are problems, bars are medians.

    Axes are logarithmic; values that are not positive are drawn at half the smallest positive one.
    Rows that lack a metric (absent or None or not finite) are left out of its panel.

    Arguments:
        path: The PNG to write.
        rows: Flat rows with "kernel", "steps" and the metrics, as in results/tilt_fidelity.json.
        metrics: Column names to titles, a panel each.
        aims: Dashed lines by column name.
        kernels: Order of the kernels; by default the order of their first rows.
        title: Headline.
        subtitle: Line below it.

    Raises:
        ValueError: there are no rows, a row lacks its kernel or steps, no row has a value of some
            metric, or there are more kernels than colours.
    """
    if not rows:
        raise ValueError("rows must hold at least one row, got none")
    for row in rows:
        if "kernel" not in row or "steps" not in row:
            raise ValueError(f"rows must each have kernel and steps, got a row with {list(row)}")
    order = list(dict.fromkeys(row["kernel"] for row in rows)) if kernels is None else list(kernels)
    if len(order) > len(HUES):
        raise ValueError(f"kernels must be at most {len(HUES)}, got {len(order)}")
    steps = sorted({int(row["steps"]) for row in rows})
    figure, axes = style.sheet(
        1,
        len(metrics),
        (max(3.2, 0.28 * len(order) * len(steps)), 3.6),
        title=title,
        subtitle=subtitle,
        gap=(0.7, 0),
        margin=(0.7, 0.4, 1.55, 0.55),
    )
    for ax, (metric, name) in zip(axes[0], metrics.items(), strict=True):
        groups = {
            (k, kernel): np.array([v for v in _values(rows, metric, k, kernel)])
            for k in steps
            for kernel in order
        }
        _panel(ax, groups, steps, order, metric)
        style.heading(ax, name)
        if metric in aims:
            ax.axhline(aims[metric], color=style.INK, lw=1, ls=(0, (4, 3)), alpha=0.8)
            at = {"transform": ax.get_yaxis_transform(), "ha": "right", "va": "bottom"}
            ax.text(0.995, aims[metric], f"aim {aims[metric]:g}", color=style.INK, fontsize=8, **at)
    names = [kernel.replace("_", " ") for kernel in order]
    style.legend_above(axes[0, 0], list(zip(names, HUES, strict=False)))
    return style.save(figure, path)


def _values(rows: Sequence[Mapping[str, Any]], metric: str, steps: int, kernel: str) -> list[float]:
    chosen = [r.get(metric) for r in rows if int(r["steps"]) == steps and r["kernel"] == kernel]
    return [float(v) for v in chosen if v is not None and math.isfinite(float(v))]


def _panel(
    ax: Axes,
    groups: Mapping[tuple[int, str], np.ndarray],
    steps: Sequence[int],
    order: Sequence[str],
    metric: str,
) -> None:
    """Draw one metric: a strip of dots for each (steps, kernel), on a logarithmic axis."""
    positive = np.concatenate([v[v > 0] for v in groups.values()])
    if len(positive) == 0:
        raise ValueError(f"rows must hold some positive {metric}, got none")
    style.chart(ax)
    ax.set_yscale("log")
    width = 0.84 / len(order)
    for (k, kernel), values in groups.items():
        if len(values) == 0:
            continue
        i = order.index(kernel)
        x = steps.index(k) + (i - (len(order) - 1) / 2) * width
        y = np.where(values > 0, values, positive.min() / 2)
        jitter = ((np.arange(len(y)) * 0.618034) % 1 - 0.5) * 0.55 * width
        ax.scatter(x + jitter, y, s=13, color=HUES[i], alpha=0.55, linewidths=0, zorder=3)
        median = float(np.median(y))
        ax.hlines(median, x - 0.42 * width, x + 0.42 * width, color=HUES[i], lw=2.6, zorder=4)
    for edge in range(1, len(steps)):
        ax.axvline(edge - 0.5, color=style.LINE, lw=0.7)
    ax.set_xlim(-0.5, len(steps) - 0.5)
    ax.set_xticks(range(len(steps)), [f"K = {k}" for k in steps])
    ax.tick_params(axis="x", labelsize=9.5, colors=style.INK)
    decades = math.log10(positive.max() / positive.min())
    marks = (1, 1.5, 2, 3, 4, 5, 7) if decades < 0.9 else (1, 2, 5) if decades < 1.8 else (1,)
    ax.yaxis.set_major_locator(LogLocator(subs=marks))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
