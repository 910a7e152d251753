"""The figure of `benchmarks.tilt_speed`: times relative to the plain loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from applications.common.pictures import style


def plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Draw the ratios as bars, one group for each model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    kinds = list(dict.fromkeys((row["name"], row["mode"]) for row in rows))
    colours = ("#6f7a8c", style.TILTED, "#a9b4c4", "#f4e3c1", style.EXACT)
    hues = dict(zip(kinds, colours, strict=False))
    sheet, axes = style.sheet(
        1,
        1,
        (max(6.4, 1.9 * len(models)), 3.2),
        title="Time of an update relative to the plain loop",
        margin=(0.6, 0.4, 1.0, 0.6),
    )
    ax = axes[0, 0]
    style.chart(ax)
    for row in rows:
        kind = (row["name"], row["mode"])
        at = models.index(row["model"]) + (kinds.index(kind) - (len(kinds) - 1) / 2) * 0.2
        ax.bar(at, row["ratio_to_plain"], 0.18, color=hues[kind])
        label = f"{row['ratio_to_plain']:.2f}"
        ax.text(at, row["ratio_to_plain"] + 0.02, label, color=style.INK, fontsize=8, ha="center")
    ax.set_xticks(range(len(models)), models)
    ax.tick_params(axis="x", labelsize=9.5, colors=style.INK)
    style.legend(sheet, [(f"{side}, {mode}", hues[side, mode]) for side, mode in kinds])
    return style.save(sheet, path)
