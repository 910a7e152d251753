"""Pictures of the frontier: curves of diversity and closeness, and samples at equal reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from applications.common.pictures import style
from applications.toy2d.digits.data import SIZE
from applications.toy2d.digits.pictures import mosaic
from benchmarks.digits_frontier.margins import root
from benchmarks.digits_frontier.metrics import CLOSENESS, Metrics, mean, stderr
from benchmarks.digits_frontier.rows import Point, curve_of

METHODS = {
    "exact": ("exact tilt", style.EXACT),
    "tilt": ("tilt", style.TILTED),
    "tilt_lora": ("tilt, LoRA", "#d9623a"),
    "best_of_n": ("best of n", "#7cc8ff"),
    "guidance": ("gradient guidance", "#2f7fc4"),
    "backprop_last": ("backpropagation, last step", "#a9b4c4"),
    "backprop_all": ("backpropagation, all steps", "#6f7a8c"),
}
"""Display name and colour of each method, in the order of the legend."""
LABELS = {
    "classes": "effective number of classes",
    "distance": "mean distance of two samples",
    "coverage": "per-class coverage",
    CLOSENESS: "√KL to the base, in √nats",
}
ACROSS, DOWN = 6, 4


def height(point: Metrics, metric: str) -> Tensor | None:
    """Return the height of a point in the panel of ``metric``, by batch; None if not drawn."""
    return root(point[metric]) if metric == CLOSENESS else point[metric]


def frontiers(path: str | Path, points: Mapping[str, Sequence[Point]]) -> Path:
    """Draw a column for each problem, a row for each metric and a curve for each method.

    Bars show two standard errors.  In the last row, √KL to the base, no method can lie below the
    exact tilt.

    Arguments:
        path: the PNG to write.
        points: the points of each problem, by its name.
    """
    sheet, axes = style.sheet(
        len(LABELS),
        len(points),
        (4.6, 2.9),
        title="Reward against diversity and closeness, handwritten digits",
        subtitle="all curves start at the base; bars: two standard errors; "
        "last row: no method can lie below the exact tilt",
        gap=(0.6, 0.6),
        margin=(0.7, 0.4, 1.5, 0.7),
    )
    for j, (problem, own) in enumerate(points.items()):
        shown = [mean(p.metrics["reward"]) for p in own if not p.method.startswith("backprop")]
        room = 0.3 * (max(shown) - min(shown))  # backpropagation goes on to absurd rewards
        left, right = min(shown) - 0.1 * room, max(shown) + room
        for i, metric in enumerate(LABELS):
            ax = axes[i, j]
            style.chart(ax)
            seen, usual = [], []
            for method, (_, hue) in METHODS.items():
                found = [
                    (p.metrics["reward"], height(p.metrics, metric)) for p in curve_of(own, method)
                ]
                curve = [(x, y) for x, y in found if y is not None]
                if len(curve) < 2:
                    continue
                ax.errorbar(
                    [mean(x) for x, _ in curve],
                    [mean(y) for _, y in curve],
                    [2 * stderr(y) for _, y in curve],
                    [2 * stderr(x) for x, _ in curve],
                    color=hue,
                    marker="o",
                    ms=3.5,
                    lw=1.3,
                    elinewidth=0.8,
                    zorder=4 if method.startswith("tilt") else 3,
                )
                inside = [mean(y) for x, y in curve if left <= mean(x) <= right]
                seen += inside
                usual += [] if method.startswith("backprop") else inside
            ax.set_xlim(left, right)
            low, high = (0.0, 1.8 * max(usual)) if metric == CLOSENESS else (min(seen), max(seen))
            edge = 0.05 * (high - low) or 0.1
            ax.set_ylim(low if metric == CLOSENESS else low - edge, high + edge)
            style.heading(ax, LABELS[metric], caption=f"{problem}: reward along x")
    style.legend_above(axes[0, 0], list(METHODS.values()))
    return style.save(sheet, path)


def nearest_in_reward(points: Sequence[Point], reward: float) -> Point:
    """Return the point whose mean reward is nearest to ``reward``."""
    return min(points, key=lambda p: abs(mean(p.metrics["reward"]) - reward))


def examples(path: str | Path, points: Mapping[str, Sequence[Point]]) -> Path:
    """Draw a row for each problem and a panel of samples for each method, at about equal reward.

    Of each method the panel shows the strength whose mean reward is nearest to that of the tilt at
    the median of the temperatures.
    """
    sheet, axes = style.sheet(
        len(points),
        1 + len(METHODS),
        (2.7, 2.7 * DOWN / ACROSS),
        title="Samples at the nearest reward",
        subtitle="each method at the strength whose mean reward is nearest to that of the tilt",
        gap=(0.25, 0.5),
    )
    for i, (problem, own) in enumerate(points.items()):
        tilts = curve_of(own, "tilt")[1:]
        reward = mean(tilts[len(tilts) // 2].metrics["reward"])
        for j, method in enumerate(("base", *METHODS)):
            ax = axes[i, j]
            ax.set_axis_off()
            found = [p for p in own if p.method == method]
            if not found:
                continue
            point = nearest_in_reward(found, reward)
            name, hue = METHODS.get(method, (f"{problem}: base", style.BASE))
            caption = f"{mean(point.metrics['reward']):.2f}"
            style.heading(
                ax, name.replace("backpropagation", "backprop"), color=hue, caption=caption
            )
            images = point.images[: ACROSS * DOWN].reshape(-1, SIZE, SIZE).numpy()
            ax.imshow(
                mosaic(images, ACROSS, DOWN),
                cmap=style.EMBER if method.startswith("tilt") else style.ICE,
                vmin=-1,
                vmax=1,
                interpolation="nearest",
                aspect="auto",
            )
    return style.save(sheet, path)
