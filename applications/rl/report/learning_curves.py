"""Learning curves: success against updates for several agents on one task.

A curve is the mean over the seeds of an agent within its bootstrap interval; name and last value
stand at its end.  Published curves are dashed, in the colour of their agent.  The online phase has
a lighter background.  The functions take arrays and write a PNG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from applications.common.pictures import style
from applications.rl.agents import AGENTS, find_agent
from applications.rl.evaluation.statistics import bootstrap_interval
from applications.rl.report.published import PublishedCurve

HUES: Mapping[str, str] = {name: agent.color for name, agent in AGENTS.items()}
"""Colour of each agent in every figure: amber for the tilt, blue for the behaviour."""
SPARE = ("#e8ebf0", "#7fe0e8", "#c9b27c", "#8e98a8", "#a3d977", "#d98a6a")
WIDTH, HEIGHT = 7.6, 4.1


@dataclass(frozen=True, eq=False)
class Curve:
    """The success rates of one agent.

    Arguments:
        label: name of the curve; a name of ``HUES``, also with words after it, has a fixed colour.
        steps: steps (T,), increasing; offline and online counted together.
        success: success rates (N, T) in [0, 1], a row per seed.
    """

    label: str
    steps: np.ndarray
    success: np.ndarray


def learning_curves(
    path: str | Path,
    curves: Sequence[Curve],
    *,
    published: Sequence[PublishedCurve] = (),
    online_from: int | None = None,
    title: str = "Learning",
    subtitle: str = "",
    note: str = "",
) -> Path:
    """Draw mean success with 95% bootstrap intervals over seeds, published curves dashed.

    Arguments:
        path: the PNG to write.
        curves: curves of the agents.
        published: curves to draw dashed, in the colour of the agent with the method's name; a curve
            of an agent that is not in ``curves`` also has its name at its end.
        online_from: step at which the online phase began, or None.
        title: headline.
        subtitle: line below the headline.
        note: small line at the foot.

    Raises:
        ValueError: there is no curve, or sizes of a curve do not agree, or a rate is not in [0, 1].
    """
    if not curves:
        raise ValueError("curves must hold at least one curve, got none")
    for curve in curves:
        _check(curve)
    labels = [curve.label for curve in curves]
    hues = colors(labels)
    drawn = {_agent(label) for label in labels}
    ends = [
        _End(c.label, int(c.steps[-1]), float(c.success[:, -1].mean()), hue)
        for c, hue in zip(curves, hues, strict=True)
    ]
    ends += [
        _End(f"{c.method}, published", int(c.steps[-1]), c.mean[-1], _published_hue(c), bold=False)
        for c in published
        if c.method.lower() not in drawn
    ]
    figure, axes = style.sheet(
        1,
        1,
        (WIDTH, HEIGHT),
        title=title,
        subtitle=subtitle,
        note=note,
        margin=(0.75, max(1.0, 0.35 + max(end.width for end in ends)), 1.2, 0.85),
    )
    ax = axes[0, 0]
    style.chart(ax)
    for curve, hue in zip(curves, hues, strict=True):
        _draw(ax, curve, hue)
    for line in published:
        _draw_published(ax, line, _published_hue(line))
    last = max(1, *(end.step for end in ends))
    ax.set(xlim=(-0.01 * last, 1.02 * last), ylim=(-0.02, 1.03))
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25", "50", "75", "100%"])
    ax.xaxis.set_major_formatter(lambda value, _: counted(value))
    online = "" if online_from is None else ", then environment steps"
    ax.set_xlabel(f"updates{online}", color=style.MUTED, fontsize=9)
    style.heading(ax, "success", caption="")
    if online_from is not None:
        _mark_phases(ax, online_from)
    _name_ends(ax, ends)
    return style.save(figure, path)


def colors(labels: Sequence[str]) -> list[str]:
    """Choose a colour for each label: its agent's, or a spare one if that is taken or unknown."""
    taken: list[str] = []
    for label in labels:
        own = agent_color(label)
        free = [c for c in SPARE if c not in taken] or list(SPARE)
        taken.append(own if own is not None and own not in taken else free[0])
    return taken


def counted(value: float) -> str:
    """Write a number of updates in short: 0, 500, 20K, 1.5M."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}K" if abs(value) >= 1e3 else f"{value:g}"


def spread(values: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Find positions near ``values``, in their order and at least ``gap`` apart.

    They are the least-squares solution, found by pooling neighbours that touch, and are then moved
    into [low, high] as far as there is room.
    """
    order = np.argsort(values, kind="stable")
    blocks: list[list[int]] = []
    offset = {int(i): k * gap for k, i in enumerate(order)}  # y_i - offset_i must not decrease
    for i in order:
        blocks.append([int(i)])
        while len(blocks) > 1 and _level(blocks[-2], values, offset) >= _level(
            blocks[-1], values, offset
        ):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    y = np.empty(len(values))
    for block in blocks:
        for i in block:
            y[i] = _level(block, values, offset) + offset[i]
    top, bottom = high, low  # push back into the window from above, then from below
    for i in order[::-1]:
        y[i] = min(y[i], top)
        top = y[i] - gap
    for i in order:
        y[i] = max(y[i], bottom)
        bottom = y[i] + gap
    return y


def _level(block: Sequence[int], values: Sequence[float], offset: Mapping[int, float]) -> float:
    return float(np.mean([values[i] - offset[i] for i in block]))


def _check(curve: Curve) -> None:
    steps, success = np.asarray(curve.steps), np.asarray(curve.success)
    if steps.ndim != 1 or steps.size == 0 or (np.diff(steps) < 0).any():
        raise ValueError(f"steps of {curve.label!r} must be increasing (T,), got {steps}")
    if success.ndim != 2 or len(success) == 0 or success.shape[1] != len(steps):
        shape = success.shape
        raise ValueError(f"success of {curve.label!r} must be (N, {len(steps)}), got {shape}")
    if not ((success >= 0) & (success <= 1)).all():
        raise ValueError(f"success of {curve.label!r} must be rates in [0, 1], got {success}")


def _draw(ax: Axes, curve: Curve, color: str) -> None:
    mean = curve.success.mean(0)
    if len(curve.success) > 1:
        low, high = bootstrap_interval([curve.success])
        ax.fill_between(curve.steps, low, high, color=color, alpha=0.16, lw=0, zorder=2)
    ax.plot(curve.steps, mean, color=color, lw=2, solid_capstyle="round", zorder=4)
    if len(mean) <= 30:
        ax.plot(curve.steps, mean, "o", color=color, mec=style.PANEL, mew=1, ms=5, zorder=5)


def _draw_published(ax: Axes, line: PublishedCurve, color: str) -> None:
    ax.fill_between(line.steps, line.low, line.high, color=color, alpha=0.08, lw=0, zorder=1)
    ax.plot(line.steps, line.mean, color=color, lw=1.2, ls=(0, (4, 2.5)), alpha=0.85, zorder=3)


def _mark_phases(ax: Axes, online_from: int) -> None:
    left, right = ax.get_xlim()
    ax.axvspan(online_from, right, color=style.INK, alpha=0.045, lw=0, zorder=0)
    ax.axvline(online_from, color=style.MUTED, lw=0.9, ls=(0, (1.5, 2)), zorder=1)
    share = (online_from - left) / (right - left)
    for name, where, side in (
        ("offline", share - 0.012, "right"),
        ("online", share + 0.012, "left"),
    ):
        ax.text(
            where,
            1.028,
            name,
            transform=ax.transAxes,
            color=style.MUTED,
            fontsize=8.5,
            ha=side,
            va="baseline",
        )


@dataclass(frozen=True)
class _End:
    """The name, last point and colour of a line."""

    name: str
    step: int
    value: float
    color: str
    bold: bool = True

    @property
    def text(self) -> str:
        return f"{self.name}  {100 * self.value:.0f}"

    @property
    def width(self) -> float:
        """Approximate width of the text in inches."""
        return (0.092 if self.bold else 0.072) * len(self.text)


def _name_ends(ax: Axes, ends: Sequence[_End]) -> None:
    """Write names at the ends of lines, kept apart, each connected by a thin line."""
    bottom, top = ax.get_ylim()
    left, right = ax.get_xlim()
    line = 0.2 / HEIGHT * (top - bottom)  # height of a name
    places = spread([end.value for end in ends], line, bottom + line / 2, top - line / 2)
    inch = (right - left) / WIDTH
    for end, y in zip(ends, places, strict=True):
        ax.plot(
            [end.step, right + 0.02 * inch, right + 0.12 * inch],
            [end.value, end.value, y],
            color=end.color,
            lw=0.8,
            alpha=0.6,
            clip_on=False,
            zorder=3,
        )
        ax.annotate(
            end.text,
            (right + 0.17 * inch, y),
            color=end.color,
            fontsize=9.5 if end.bold else 8.5,
            weight="bold" if end.bold else "normal",
            va="center_baseline",
            annotation_clip=False,
        )


def agent_color(label: str) -> str | None:
    """Return the colour of the agent that a label begins with; None if it has none.

    An agent from outside this package has its colour where its module is imported.
    """
    word = label.partition(" ")[0]
    try:
        return HUES.get(word.lower()) or find_agent(word, importing=False).color or None
    except ValueError:
        return None


def _agent(label: str) -> str:
    """Return the agent that a label begins with."""
    return label.partition(" ")[0].lower()


def _published_hue(line: PublishedCurve) -> str:
    return HUES.get(line.method.lower(), style.MUTED)
