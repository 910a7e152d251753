"""Charts: the certificate before and after, and training curves.

Functions of arrays or tensors that write a PNG and return its path, in the style of ``style``.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from scipy.ndimage import gaussian_filter1d

from adjoint import log_mean_exp
from applications.common.pictures import style
from applications.common.pictures.arrays import Array, checked

Rows = Sequence[Mapping[str, float | str | None]]


def certificate_histogram(
    path: str | Path,
    base: Array,
    tilted: Array,
    *,
    log_z_exact: float | None = None,
    log_z_exact_stderr: float = 0.0,
    title: str = "The certificate",
    subtitle: str = "",
    bins: int = 60,
) -> Path:
    """Draw histograms of the log-weights before and after, with log Z and std(log w).

    log Z is log mean w, and its standard error is the standard error of the mean of w divided by
    that mean.  The base's own weights estimate log Z too, with a larger error.

    Arguments:
        path: The PNG to write.
        base: Log-weights (N,) of the untilted flow.
        tilted: Log-weights (M,) of the tilted flow.
        log_z_exact: The exact log Z, where it is known.
        log_z_exact_stderr: Its standard error; 0 where there is none to tell.
        title: Headline.
        subtitle: Line below it.
        bins: Equal bins over the range of each set.

    Raises:
        ValueError: the log-weights are not of shape (N,) with N > 0, or not finite.
    """
    sets = {"base": checked(base, "base", ("N",)), "tilted": checked(tilted, "tilted", ("N",))}
    hues = {"base": style.BASE, "tilted": style.TILTED}
    heads = {"base": "before: base", "tilted": "after: tilted flow"}
    figure, axes = style.sheet(
        2,
        1,
        (8.4, 1.75),
        title=title,
        subtitle=subtitle,
        gap=(0, 0.5),
        margin=(0.6, 0.4, 1.2, 0.65),
    )
    for name, log_w in sets.items():
        if len(log_w) < 2:
            raise ValueError(f"{name} must hold at least two log-weights, got {len(log_w)}")
    low = min(x.min() for x in sets.values())
    high = max(x.max() for x in sets.values())
    pad = 0.04 * (high - low) + 1e-3
    for ax, (name, log_w) in zip(axes[:, 0], sets.items(), strict=True):
        style.chart(ax)
        counts, edges = np.histogram(log_w, bins=bins, range=_span(log_w, (high - low) / 1000))
        ax.stairs(counts, edges, fill=True, color=hues[name], alpha=0.9)
        ax.set(xlim=(low - pad, high + pad), ylim=(0, 1.12 * counts.max()))
        ax.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        log_z, error, ess = log_mean_exp(torch.from_numpy(log_w))
        ax.axvline(log_z, color=hues[name], lw=1.2, alpha=0.9)
        if log_z_exact is not None:
            ax.axvline(log_z_exact, color=style.EXACT, lw=1.2, ls=(0, (4, 3)))
        caption = f"log Z = {log_z:.3f} ± {error:.3f}    ESS/N = {ess:.2f}"
        style.heading(ax, heads[name], color=hues[name], caption=caption)
        _big_number(
            ax, f"{log_w.std(ddof=1):.3g}", "std(log w)", left=_emptier_left(log_w, low, high)
        )
    axes[0, 0].tick_params(labelbottom=False)
    axes[1, 0].set_xlabel("log w", color=style.MUTED, fontsize=9)
    if log_z_exact is not None:
        note = f"dashed: exact log Z = {log_z_exact:.3f}"
        if log_z_exact_stderr:
            note += f" ± {log_z_exact_stderr:.3f}"
        width, height = figure.get_size_inches()
        figure.text(0.6 / width, 0.2 / height, note, color=style.INK, fontsize=8)
    return style.save(figure, path)


def training_curves(
    path: str | Path,
    rows: Rows | str | Path,
    *,
    columns: Sequence[str] | None = None,
    exact: Mapping[str, float] | None = None,
    smoothing: float = 0.01,
    labels: Mapping[str, str] | None = None,
    refined_from: int | None = None,
    title: str = "Training",
    subtitle: str = "",
) -> Path:
    """Draw each logged quantity against the iteration, as logged and smoothed.

    A quantity that is positive and spans more than a factor of 30 gets a logarithmic axis.

    Arguments:
        path: The PNG to write.
        rows: Mappings with an "iteration" and numbers, blanks allowed, or the path of such a CSV.
        columns: Columns to draw; all but the iteration unless given.
        exact: Known optima by column, drawn as dashed lines.
        smoothing: Standard deviation of the Gaussian window as a fraction of the run.
        labels: Headings by column; the column's name unless given.
        refined_from: Iteration with which another loss took over: a line marks it, and curves end
            and begin there.
        title: Headline.
        subtitle: Line below it, before the words that tell the curves apart.

    Raises:
        ValueError: there are no rows, a row has no iteration, or a column does not occur.
    """
    if isinstance(rows, str | Path):
        with Path(rows).open(newline="") as file:
            rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError("rows must hold at least one row, got none")
    names = list(dict.fromkeys(name for row in rows for name in row))
    if any(_number(row.get("iteration")) is None for row in rows):
        raise ValueError(f"rows must each have an iteration, got the columns {names}")
    wanted = [n for n in names if n != "iteration"] if columns is None else list(columns)
    missing = [name for name in wanted if name not in names]
    if missing or not wanted:
        raise ValueError(f"columns must be among {names}, got {missing or wanted}")
    across = min(3, len(wanted))
    figure, axes = style.sheet(
        -(-len(wanted) // across),
        across,
        (3.7, 2.2),
        title=title,
        subtitle=subtitle,
        gap=(0.7, 0.75),
        margin=(0.7, 0.4, 1.2, 0.6),
    )
    for ax in axes.flat[len(wanted) :]:
        ax.set_visible(False)
    hue, names_of, legend = style.TILTED, labels or {}, ""
    for ax, name in zip(axes.flat, wanted, strict=False):
        pairs = [(_number(row["iteration"]), _number(row.get(name))) for row in rows]
        points = np.array([p for p in pairs if p[1] is not None], dtype=float).reshape(-1, 2)
        style.chart(ax)
        head = names_of.get(name, name.replace("_", " "))
        if len(points) == 0:
            style.heading(ax, head, caption="never logged")
            continue
        x, y = points.T
        cut = 0 if refined_from is None else int((x <= refined_from).sum())
        for part in (slice(0, cut), slice(cut, None)):
            if len(x[part]) == 0:
                continue
            smooth = gaussian_filter1d(y[part], max(smoothing * len(y), 1e-3), mode="nearest")
            if not np.array_equal(smooth, y[part]):
                ax.plot(x[part], y[part], color=hue, lw=0.8, alpha=0.35)
                legend = "faint: as logged; bright: smoothed"
            ax.plot(x[part], smooth, color=hue, lw=1.8, solid_capstyle="round")
        ax.plot(x[-1], smooth[-1], "o", color=style.INK, ms=4)
        if refined_from is not None and 0 < cut < len(x):
            _mark(ax, refined_from, "refinement")
        if y.min() > 0 and y.max() > 30 * y.min():
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            ax.yaxis.set_major_locator(MaxNLocator(5))
        caption = f"{smooth[-1]:.3g}"
        if exact is not None and name in exact:
            ax.axhline(exact[name], color=style.EXACT, lw=1.1, ls=(0, (4, 3)))
            caption += f"  of {exact[name]:.3g}"
        style.heading(ax, head, caption=caption)
        ax.margins(x=0.02)
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=True))
    for ax in axes.flat[max(0, len(wanted) - across) : len(wanted)]:
        ax.set_xlabel("iteration", color=style.MUTED, fontsize=9)
    figure.texts[1].set_text("; ".join(filter(None, (subtitle, legend))))
    return style.save(figure, path)


def _mark(ax: Axes, iteration: int, name: str) -> None:
    """Draw a thin vertical line with its name at the top."""
    ax.axvline(iteration, color=style.MUTED, lw=0.8)
    ax.annotate(
        name,
        (iteration, 1),
        (4, -3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        color=style.MUTED,
        fontsize=7.5,
        va="top",
    )


def _span(x: np.ndarray, least: float) -> tuple[float, float]:
    """Return the range of ``x``, widened to ``least``: weights of an exact tilt have no width."""
    low, high = float(x.min()), float(x.max())
    widen = max(0.0, (max(least, 1e-6 * (1 + abs(low))) - (high - low)) / 2)
    return low - widen, high + widen


def _emptier_left(x: np.ndarray, low: float, high: float) -> bool:
    """Return whether fewer of ``x`` lie in the left quarter of [low, high] than in the right."""
    quarter = (high - low) / 4
    return bool((x < low + quarter).sum() <= (x > high - quarter).sum())


def _big_number(ax: Axes, number: str, name: str, *, left: bool) -> None:
    at: dict[str, Any] = {"transform": ax.transAxes, "ha": "left" if left else "right"}
    x = 0.02 if left else 0.98
    box = {"facecolor": style.PANEL, "edgecolor": "none", "pad": 2}
    ax.text(x, 0.66, number, color=style.INK, fontsize=18, weight="bold", bbox=box, **at)
    ax.text(x, 0.52, name, color=style.MUTED, fontsize=8.5, **at)


def _number(value: float | str | None) -> float | None:
    """Convert ``value`` to a number; a blank, or a number that is not finite, gives None."""
    try:
        number = float(value) if value is not None else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None
