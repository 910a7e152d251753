"""The look of every picture: a dark sheet, two hues and one neutral.

Blue is the base, amber the tilted flow, near-white whatever is exact; nothing else is coloured.
Density maps run from the sheet's own colour through that hue to near-white with growing lightness,
so that empty space is simply the sheet.  Figures are built with matplotlib's objects alone (no
pyplot, no global state, no rcParams), laid out in inches, and written atomically.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flows.training import replacing

SHEET, PANEL, LINE = "#0d1117", "#12171f", "#2b3340"
INK, MUTED = "#e8ebf0", "#8e98a8"
BASE, TILTED, EXACT = "#58b4f5", "#ffb14e", INK
DPI = 150
GAMMA = 0.6

ICE: Colormap = LinearSegmentedColormap.from_list(
    "ice", [SHEET, "#12294a", "#1a5590", "#3a9be0", "#9fdcff", "#f4fcff"]
)
EMBER: Colormap = LinearSegmentedColormap.from_list(
    "ember", [SHEET, "#3a1a33", "#84293f", "#d9623a", "#ffb95c", "#fff7e0"]
)


def sheet(
    rows: int,
    columns: int,
    panel: tuple[float, float],
    *,
    title: str = "",
    subtitle: str = "",
    note: str = "",
    gap: tuple[float, float] = (0.25, 0.25),
    margin: tuple[float, float, float, float] = (0.4, 0.4, 1.2, 0.5),
) -> tuple[Figure, np.ndarray]:
    """Make a figure and a grid of axes of exact size, an object array (rows, columns).

    Arguments:
        rows: Rows of panels.
        columns: Columns of panels.
        panel: Width and height of a panel in inches; gap and margin are in inches too.
        title: Headline, above the panels at the left.
        subtitle: Line below it.
        note: Small line at the foot.
        gap: Space between columns and between rows.
        margin: Space left, right, above and below.
    """
    left, right, top, bottom = margin
    width = left + columns * panel[0] + (columns - 1) * gap[0] + right
    height = top + rows * panel[1] + (rows - 1) * gap[1] + bottom
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=SHEET)
    FigureCanvasAgg(figure)
    axes = np.empty((rows, columns), dtype=object)
    for i in range(rows):
        for j in range(columns):
            x = left + j * (panel[0] + gap[0])
            y = bottom + (rows - 1 - i) * (panel[1] + gap[1])
            box = (x / width, y / height, panel[0] / width, panel[1] / height)
            axes[i, j] = figure.add_axes(box)
    x = left / width
    figure.text(x, 1 - 0.44 / height, title, color=INK, fontsize=15, weight="bold", va="baseline")
    figure.text(x, 1 - 0.70 / height, subtitle, color=MUTED, fontsize=9.5, va="baseline")
    figure.text(x, 0.2 / height, note, color=MUTED, fontsize=8, va="baseline")
    return figure, axes


def plane(ax: Axes, extent: float) -> None:
    """Dress ``ax`` as the window [-extent, extent]²: no ticks, a thin frame."""
    ax.set(xlim=(-extent, extent), ylim=(-extent, extent), xticks=[], yticks=[])
    ax.set_facecolor(SHEET)
    for spine in ax.spines.values():
        spine.set(color=LINE, linewidth=0.8)


def chart(ax: Axes) -> None:
    """Dress ``ax`` as a chart: soft panel, faint horizontal lines, no box."""
    ax.set_facecolor(PANEL)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.tick_params(which="both", length=0, colors=MUTED, labelsize=8.5, pad=5)
    ax.grid(axis="y", color=LINE, lw=0.7)
    ax.set_axisbelow(True)


def heading(ax: Axes, text: str, *, color: str = INK, caption: str = "") -> None:
    """Write a panel's title at the upper left, and a muted caption at the upper right."""
    at: dict[str, Any] = {
        "xycoords": "axes fraction",
        "textcoords": "offset points",
        "annotation_clip": False,
    }
    ax.annotate(text, (0, 1), (0, 7), color=color, fontsize=11, weight="bold", va="baseline", **at)
    ax.annotate(caption, (1, 1), (0, 7), color=MUTED, fontsize=8.5, ha="right", va="baseline", **at)


def density_image(
    ax: Axes, density: np.ndarray, extent: float, colors: Colormap, *, top: float | None = None
) -> None:
    """Draw ``density`` (R, R), first index x; ``top`` is its value near the end of the colours."""
    ax.imshow(
        density.T,
        origin="lower",
        extent=(-extent, extent, -extent, extent),
        cmap=colors,
        norm=PowerNorm(GAMMA, 0, 1.2 * (float(density.max()) if top is None else top)),
        interpolation="bilinear",
        zorder=0,
    )


def reward_levels(reward: np.ndarray, *, span: float = 8.0, lines: int = 8) -> np.ndarray:
    """Choose about ``lines`` round levels, equally spaced, within ``span`` nats of the maximum."""
    top, bottom = float(reward.max()), float(reward.min())
    bottom = max(bottom, top - span)
    levels = np.asarray(MaxNLocator(lines, steps=[1, 2, 2.5, 5, 10]).tick_values(bottom, top))
    return levels[(levels > bottom) & (levels < top)]


def reward_contours(
    ax: Axes,
    reward: np.ndarray,
    extent: float,
    *,
    width: float = 0.7,
    span: float = 8.0,
    lines: int = 8,
) -> str:
    """Draw contour lines of ``reward`` (R, R), first index x, brighter where it is higher.

    Returns the sentence that explains them, empty for a constant reward.
    """
    levels = reward_levels(reward, span=span, lines=lines)
    if len(levels) == 0:
        return ""
    axis = cell_centres(len(reward), extent)
    alpha = np.linspace(0.18, 0.6, len(levels))
    colors = [(0.91, 0.92, 0.94, a) for a in alpha]
    ax.contour(axis, axis, reward.T, levels=levels, colors=colors, linewidths=width, zorder=2)
    if len(levels) == 1:
        return f"contour: reward {levels[0]:g}"
    return f"contours: reward, every {levels[1] - levels[0]:g} nat, brighter is higher"


def cell_centres(resolution: int, extent: float) -> np.ndarray:
    """Return the centres (R,) of the cells of a map along either axis."""
    return ((np.arange(resolution) + 0.5) / resolution * 2 - 1) * extent


def legend(figure: Figure, entries: Sequence[tuple[str, str]]) -> None:
    """Draw coloured dots with names at the upper right, in the line of the subtitle."""
    width, height = figure.get_size_inches()
    x = width - 0.4
    for name, color in reversed(entries):
        text = figure.text(
            x / width, 1 - 0.70 / height, name, color=INK, fontsize=9.5, ha="right", va="baseline"
        )
        x -= text.get_window_extent().width / DPI + 0.12
        figure.text(
            x / width, 1 - 0.70 / height, "●", color=color, fontsize=8, ha="right", va="baseline"
        )
        x -= 0.35


def legend_above(ax: Axes, entries: Sequence[tuple[str, str]]) -> None:
    """Draw coloured dots with names, in a line above the panel ``ax`` from its left edge on."""
    x = 0.0
    for name, color in entries:
        text = ax.annotate(
            f"●  {name}",
            (0, 1),
            (x, 30),
            xycoords="axes fraction",
            textcoords="offset points",
            color=color,
            fontsize=9.5,
            annotation_clip=False,
        )
        x += text.get_window_extent().width * 72 / DPI + 18


def save(figure: Figure, path: str | Path) -> Path:
    """Write ``figure`` as PNG, atomically, creating its folder, and return the path.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as file:
        figure.savefig(file, format="png", facecolor=SHEET, metadata={"Software": None})
    return Path(path)
