"""A figure of all targets tilted toward all rewards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from applications.common.pictures import style
from applications.common.pictures.arrays import Array, check_extent, checked, checked_density


def gallery(
    path: str | Path,
    densities: Mapping[str, Mapping[str, Array]],
    *,
    extent: float,
    rewards: Mapping[str, Mapping[str, Array]] | None = None,
    title: str = "Every target, every reward",
    subtitle: str = "",
    size: float = 1.25,
) -> Path:
    """Draw a row for each target and a column for each reward; the first column is the base.

    Arguments:
        path: The PNG to write.
        densities: Row titles to column titles to maps (R, R), first index x; every row has the
            columns of the first row, in its order.
        extent: Half-width of the window.
        rewards: Reward maps (R, R) by row and column title, drawn as contours; may be incomplete.
        title: Headline.
        subtitle: Line below it.
        size: Side of a panel in inches.

    Raises:
        ValueError: there is no row, the columns of two rows differ, or a map is not (R, R).
    """
    e = check_extent(extent)
    if not densities or not next(iter(densities.values())):
        raise ValueError("densities must have at least one row and one column, got none")
    columns = list(next(iter(densities.values())))
    figure, axes = style.sheet(
        len(densities),
        len(columns),
        (size, size),
        title=title,
        subtitle=subtitle,
        gap=(0.09, 0.09),
        margin=(1.3, 0.4, 1.2, 0.4),
    )
    for i, (row, maps) in enumerate(densities.items()):
        if list(maps) != columns:
            raise ValueError(
                f"densities[{row!r}] must have the columns {columns}, got {list(maps)}"
            )
        for j, (column, values) in enumerate(maps.items()):
            ax = axes[i, j]
            style.plane(ax, e)
            p = checked_density(values, f"densities[{row!r}][{column!r}]")
            style.density_image(ax, p, e, style.EMBER if j else style.ICE)
            r = (rewards or {}).get(row, {}).get(column)
            if r is not None:
                name = f"rewards[{row!r}][{column!r}]"
                style.reward_contours(
                    ax, checked(r, name, ("R", "R")), e, width=0.4, span=4, lines=4
                )
            if i == 0:
                hue = style.TILTED if j else style.BASE
                ax.set_title(column.replace("_", " "), color=hue, fontsize=10, pad=6)
        axes[i, 0].set_ylabel(
            row.replace("_", " "),
            color=style.INK,
            fontsize=10,
            rotation=0,
            ha="right",
            va="center",
            labelpad=8,
        )
    return style.save(figure, path)
