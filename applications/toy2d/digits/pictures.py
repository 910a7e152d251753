"""Pictures of small images, such as handwritten digits, before and after a tilt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from applications.common.pictures import style
from applications.common.pictures.arrays import Array, checked


def image_grid(
    path: str | Path,
    base: Array,
    tilted: Array,
    *,
    columns: int = 12,
    rows: int = 8,
    value_range: tuple[float, float] | None = None,
    title: str = "Digits, tilted",
    subtitle: str = "",
    captions: tuple[str, str] = ("", ""),
) -> Path:
    """Draw images of the base at the left and of the tilted flow at the right, equally bright.

    Arguments:
        path: The PNG to write.
        base: Images (N, H, W), drawn row by row.
        tilted: Images (M, H, W).
        columns: Images in a row.
        rows: Rows, at most; surplus images are left out.
        value_range: Values of black and white; the range of all images drawn unless given.
        title: Headline.
        subtitle: Line below it.
        captions: A few words beside each panel's title.

    Raises:
        ValueError: a shape is wrong, a value is not finite, the images differ in size, or
            ``value_range`` is not increasing.
    """
    if columns < 1 or rows < 1:
        raise ValueError(f"columns and rows must be positive, got {columns} and {rows}")
    before = checked(base, "base", ("N", "H", "W"))[: columns * rows]
    after = checked(tilted, "tilted", ("N", *before.shape[1:]))[: columns * rows]
    if value_range is None:
        value_range = (
            float(min(before.min(), after.min())),
            float(max(before.max(), after.max())),
        )
    low, high = value_range
    if not low < high:
        raise ValueError(f"value_range must be increasing, got {value_range}")
    tall = max(-(-len(x) // columns) for x in (before, after))
    h, w = before.shape[1] + 1, before.shape[2] + 1
    panel = (5.2, 5.2 * (tall * h - 1) / (columns * w - 1))
    figure, axes = style.sheet(1, 2, panel, title=title, subtitle=subtitle, gap=(0.5, 0))
    both = (
        ("base", before, style.BASE, style.ICE, captions[0]),
        ("tilted flow", after, style.TILTED, style.EMBER, captions[1]),
    )
    for ax, (name, images, hue, colors, caption) in zip(axes[0], both, strict=True):
        ax.set_axis_off()
        style.heading(ax, name, color=hue, caption=caption)
        ax.imshow(
            mosaic(images, columns, tall),
            cmap=colors,
            vmin=low,
            vmax=high,
            interpolation="nearest",
            aspect="auto",
        )
    return style.save(figure, path)


def class_frequencies(
    path: str | Path,
    base: Array,
    tilted: Array,
    exact: Array | None = None,
    *,
    tilted_error: Array | None = None,
    exact_error: Array | None = None,
    labels: Sequence[str] | None = None,
    title: str = "Class frequencies",
    subtitle: str = "frequency of each class",
) -> Path:
    """Draw bars of class frequencies: base, tilted flow and exact tilt.

    Standard errors are drawn as two-sided bars of two of them.

    Arguments:
        path: The PNG to write.
        base: Frequencies (C,) under the base.
        tilted: Frequencies (C,) under the tilted flow.
        exact: Exact frequencies (C,), where they are known or estimated.
        tilted_error: Standard errors (C,) of ``tilted``.
        exact_error: Standard errors (C,) of ``exact``.
        labels: Names of the classes; 0, 1, … unless given.
        title: Headline.
        subtitle: Line below it.

    Raises:
        ValueError: the sizes differ, a frequency is negative or not finite, or there are errors of
            frequencies that are not given.
    """
    b = checked(base, "base", ("C",))
    series = [("base", b, style.BASE)]
    series.append(("tilted flow", checked(tilted, "tilted", b.shape), style.TILTED))
    if exact is not None:
        series.append(("exact tilt", checked(exact, "exact", b.shape), style.EXACT))
    elif exact_error is not None:
        raise ValueError("exact_error must come with exact, got errors alone")
    for name, values, _ in series:
        if values.min() < 0:
            raise ValueError(f"frequencies of {name} must be >= 0, got {values.min()}")
    errors = {"tilted flow": ("tilted_error", tilted_error)}
    errors["exact tilt"] = ("exact_error", exact_error)
    names = [str(c) for c in range(len(b))] if labels is None else list(labels)
    if len(names) != len(b):
        raise ValueError(f"labels must name {len(b)} classes, got {len(names)}")
    figure, axes = style.sheet(
        1,
        1,
        (max(4.0, 0.8 * len(b)), 2.6),
        title=title,
        subtitle=subtitle,
        note="" if tilted_error is exact_error is None else "error bars: two standard errors",
        margin=(0.7, 0.4, 0.95, 0.65),
    )
    ax = axes[0, 0]
    style.chart(ax)
    width = 0.8 / len(series)
    where = np.arange(len(b))
    for i, (name, values, hue) in enumerate(series):
        x = where + (i - (len(series) - 1) / 2) * width
        ax.bar(x, values, 0.88 * width, color=hue, label=name)
        argument, given = errors.get(name, ("", None))
        if given is not None:
            error = 2 * checked(given, argument, b.shape)
            ax.errorbar(x, values, error, fmt="none", ecolor=style.MUTED, lw=1.2, capsize=2.5)
    ax.set_xticks(where, names)
    ax.tick_params(axis="x", labelsize=10, colors=style.INK)
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    style.legend(figure, [(name, hue) for name, _, hue in series])
    return style.save(figure, path)


def mosaic(images: np.ndarray, columns: int, rows: int) -> np.ndarray:
    """Lay out ``images`` (N, H, W), N <= rows·columns, row by row with gaps of one pixel (NaN).

    Returns an array (rows (H+1) - 1, columns (W+1) - 1).
    """
    n, h, w = images.shape
    cells = np.full((rows * columns, h + 1, w + 1), np.nan)
    cells[:n, :h, :w] = images
    grid = cells.reshape(rows, columns, h + 1, w + 1).swapaxes(1, 2)
    return grid.reshape(rows * (h + 1), columns * (w + 1))[:-1, :-1]
