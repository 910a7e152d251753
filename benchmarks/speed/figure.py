"""The figure of `benchmarks.speed`: times of whole updates, and of the parts of one update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from applications.common.pictures import style


def plot(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Draw the milliseconds of each row, divided by the number of seeds, as bars.

    Raises:
        ValueError: ``rows`` is empty.
    """
    if not rows:
        raise ValueError("rows must hold at least one row, got none")
    rows = [row for row in rows if "fastest" not in row["name"]]
    whole = [row for row in rows if row["compile_s"] is not None]
    parts = [row for row in rows if row["compile_s"] is None]
    panels = [panel for panel in (whole, parts) if panel]
    figure, axes = style.sheet(
        1,
        len(panels),
        (4.2, 0.32 * max(map(len, panels)) + 0.4),
        title="Where the time of an update goes",
        subtitle=f"milliseconds a seed, {rows[0]['device']}, {rows[0]['threads']} thread(s)",
        gap=(2.6, 0),
        margin=(2.6, 0.6, 1.3, 0.5),
    )
    for ax, panel, name in zip(axes[0], panels, ("whole", "parts, eager"), strict=False):
        _bars(ax, panel)
        style.heading(ax, name)
    return style.save(figure, path)


def _bars(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    style.chart(ax)
    ax.grid(visible=False)
    values = [row["ms_per_update"] / row["seeds"] for row in rows]
    names = [r["name"] + (f", {r['seeds']} seeds" if r["seeds"] > 1 else "") for r in rows]
    peer = [name.startswith("peer") for name in names]
    hues = [style.INK if each else style.TILTED for each in peer]
    ax.barh(range(len(rows)), values, color=hues, height=0.62)
    for i, value in enumerate(values):
        ax.text(value, i, f" {value:.3g}", va="center", color=style.INK, fontsize=8)
    ax.set_yticks(range(len(rows)), names)
    ax.tick_params(axis="y", labelsize=8.5, colors=style.INK)
    ax.set_xlim(0, 1.18 * max(values))
    ax.invert_yaxis()
