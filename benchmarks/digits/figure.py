"""The figure of `benchmarks.digits`: class frequencies by temperature and kind of sample."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from applications.common.pictures import style
from applications.toy2d.digits.data import CLASSES
from applications.toy2d.digits.metrics import Comparison

KINDS = ("ode", "chain", "weighted", "accepted")
"""Kinds of sample."""


def plot(path: Path, found: Mapping[float, Mapping[str, Comparison]]) -> Path:
    """Draw the class frequencies: a row for each temperature, a column for each kind of sample."""
    sheet, axes = style.sheet(
        len(found),
        len(KINDS),
        (4.6, 1.9),
        title="Class frequencies by temperature and kind of sample",
        subtitle="error bars: two standard errors of the resampled base",
        gap=(0.5, 0.6),
        margin=(0.7, 0.4, 1.1, 0.6),
    )
    series = (("base", style.BASE), ("tilted flow", style.TILTED), ("exact tilt", style.EXACT))
    where = np.arange(CLASSES)
    for i, (temperature, comparisons) in enumerate(found.items()):
        for j, kind in enumerate(KINDS):
            ax, own = axes[i, j], comparisons[kind]
            style.chart(ax)
            for k, (values, (_, hue)) in enumerate(
                zip((own.base, own.tilted, own.exact), series, strict=True)
            ):
                ax.bar(where + 0.27 * (k - 1), values.numpy(), 0.24, color=hue)
            error = 2 * own.exact_error.numpy()
            ax.errorbar(
                where + 0.27, own.exact.numpy(), error, fmt="none", ecolor=style.MUTED, lw=1.1
            )
            ax.set_xticks(where, [str(c) for c in where])
            caption = f"TV {own.total_variation:.3f}, largest |z| {float(own.z.abs().max()):.1f}"
            style.heading(ax, f"T = {temperature:g}, {kind}", caption=caption)
    style.legend(sheet, list(series))
    return style.save(sheet, path)
