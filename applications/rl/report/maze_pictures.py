"""Figures of a maze: its walls, and the trajectories of policies.

The functions take arrays and write a PNG.  The behaviour is blue, the tilt amber; other agents have
their colour in `applications.rl.report.learning_curves.agent_color`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgba
from matplotlib.patches import Circle, Rectangle

from applications.common.pictures import style
from applications.common.pictures.arrays import Array, checked
from applications.rl.report.learning_curves import agent_color

WALL, EDGE = "#232b38", "#46536a"


@dataclass(frozen=True, eq=False)
class Maze:
    """A maze of walls on a grid of square cells.

    Arguments:
        walls: table (rows, columns), true at walls; row i, column j is the cell around
            (j unit - offset_x, i unit - offset_y).
        unit: side of a cell, in the units of positions.
        offset: position of the centre of the first cell, negated.

    Raises:
        ValueError: ``walls`` is not a table, or ``unit`` is not positive.
    """

    walls: np.ndarray
    unit: float = 4.0
    offset: tuple[float, float] = (4.0, 4.0)

    def __post_init__(self) -> None:
        """Check the walls."""
        if np.ndim(self.walls) != 2 or np.size(self.walls) == 0:
            raise ValueError(f"walls must be (rows, columns), got {np.shape(self.walls)}")
        if not self.unit > 0:
            raise ValueError(f"unit must be positive, got {self.unit}")
        object.__setattr__(self, "walls", np.asarray(self.walls).astype(bool))

    @classmethod
    def from_environment(cls, environment: Any) -> Maze:
        """Read the maze of an OGBench environment, wrapped or not.

        Raises:
            ValueError: the environment has no maze.
        """
        inner = getattr(environment, "unwrapped", environment)
        if not hasattr(inner, "maze_map"):
            raise ValueError(f"environment must be a maze of OGBench, got {type(inner).__name__}")
        origin = inner.ij_to_xy((0, 0))
        unit = float(inner.ij_to_xy((0, 1))[0] - origin[0])
        return cls(np.asarray(inner.maze_map), unit, (-float(origin[0]), -float(origin[1])))

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Window (left, right, bottom, top) of the maze with half a cell of its outer wall."""
        rows, columns = self.walls.shape
        x, y = self.offset
        return (-x, (columns - 1) * self.unit - x, -y, (rows - 1) * self.unit - y)


def trajectories(
    path: str | Path,
    maze: Maze,
    policies: Mapping[str, Sequence[Array]],
    *,
    start: Array,
    goal: Array,
    goal_radius: float = 1.0,
    reached: Mapping[str, Sequence[bool]] | None = None,
    title: str = "Through the maze",
    subtitle: str = "",
    shown: int = 25,
) -> Path:
    """Draw trajectories of several policies side by side, and count how many reach the goal.

    Unless ``reached`` is given, a trajectory reaches the goal if its last position is within
    ``goal_radius`` of it, because episodes end there.  Other trajectories end in a cross.  Time
    runs from dark to bright.

    Arguments:
        path: the PNG to write.
        maze: the walls.
        policies: trajectories, each of positions (T, 2), by the name of the policy.
        start: approximate start of the trajectories (2,).
        goal: position of the goal (2,).
        goal_radius: distance within which the goal is reached.
        reached: whether each trajectory reached its goal, by policy; the goals of episodes may
            differ a little.
        title: headline.
        subtitle: line below the headline.
        shown: number of trajectories drawn in each panel, the first ones; all are counted.

    Raises:
        ValueError: there is no policy, one has no trajectories, or a shape is wrong.
    """
    if not policies:
        raise ValueError("policies must hold at least one policy, got none")
    ends = {"start": checked(start, "start", (2,)), "goal": checked(goal, "goal", (2,))}
    left, right, bottom, top = maze.box
    width = 4.6
    size = (width, width * (top - bottom) / (right - left))
    note = "time runs from dark to bright; a cross is where an episode that failed ended"
    figure, axes = style.sheet(
        1, len(policies), size, title=title, subtitle=subtitle, note=note, gap=(0.35, 0)
    )
    for ax, (name, paths) in zip(axes[0], policies.items(), strict=True):
        if len(paths) == 0:
            raise ValueError(f"policies[{name!r}] must hold at least one trajectory, got none")
        xs = [checked(p, f"policies[{name!r}][{i}]", ("T", 2)) for i, p in enumerate(paths)]
        hits = [bool(np.linalg.norm(x[-1] - ends["goal"]) <= goal_radius) for x in xs]
        if reached is not None:
            hits = [bool(hit) for hit in reached[name]]
            if len(hits) != len(xs):
                raise ValueError(f"reached[{name!r}] must hold {len(xs)} values, got {len(hits)}")
        draw_maze(ax, maze)
        lengths = [len(x) - 1 for x, hit in zip(xs, hits, strict=True) if hit]
        caption = f"{sum(hits)} of {len(xs)} reach the goal"
        if lengths:
            caption += f", median {np.median(lengths):.0f} steps"
        style.heading(ax, name, color=_hue(name), caption=caption)
        for x, hit in zip(xs[:shown], hits, strict=False):
            _draw_path(ax, x, _colors(name), hit=hit, many=min(shown, len(xs)))
        _draw_ends(ax, ends["start"], ends["goal"], goal_radius)
    return style.save(figure, path)


def draw_maze(ax: Axes, maze: Maze, box: tuple[float, float, float, float] | None = None) -> None:
    """Draw the walls in the window ``box`` (left, right, bottom, top), by default the maze's."""
    left, right, bottom, top = maze.box if box is None else box
    ax.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], aspect="equal")
    ax.set_facecolor(style.SHEET)
    for spine in ax.spines.values():
        spine.set(color=EDGE, linewidth=0.8)
    half, unit = maze.unit / 2, maze.unit
    corner = np.array([-maze.offset[0] - half, -maze.offset[1] - half])
    cells = [
        Rectangle((corner[0] + j * unit, corner[1] + i * unit), unit, unit)
        for i, j in np.argwhere(maze.walls)
    ]
    ax.add_collection(
        PatchCollection(cells, facecolor=WALL, edgecolor=WALL, linewidths=0.4, zorder=1)
    )
    ax.add_collection(LineCollection(_edges(maze), colors=EDGE, linewidths=1.1, zorder=2))


def _edges(maze: Maze) -> list[np.ndarray]:
    """List the segments (2, 2) between walls and floor."""
    unit, corner = maze.unit, -np.array(maze.offset) - maze.unit / 2
    lines = []
    for i, j in np.argwhere(maze.walls[:, 1:] != maze.walls[:, :-1]):
        lines.append(corner + unit * np.array([[j + 1, i], [j + 1, i + 1]]))
    for i, j in np.argwhere(maze.walls[1:] != maze.walls[:-1]):
        lines.append(corner + unit * np.array([[j, i + 1], [j + 1, i + 1]]))
    return lines


def _draw_path(ax: Axes, x: np.ndarray, colors: Colormap, *, hit: bool, many: int) -> None:
    time = np.linspace(0, 1, max(len(x) - 1, 1))
    rgba = colors(0.3 + 0.55 * time)
    rgba[:, 3] = (0.75 if hit else 0.5) * min(1.0, 0.35 + 4 / many)
    segments = np.stack([x[:-1], x[1:]], 1)
    ax.add_collection(LineCollection(list(segments), colors=rgba, linewidths=1.1, zorder=3))
    if not hit:
        ax.plot(*x[-1], "x", color=colors(0.9), ms=4.5, mew=1.2, zorder=5)


def _draw_ends(ax: Axes, start: np.ndarray, goal: np.ndarray, radius: float) -> None:
    ax.add_patch(
        Circle((goal[0], goal[1]), radius, fc=to_rgba(style.INK, 0.16), ec="none", zorder=4)
    )
    ax.add_patch(Circle((goal[0], goal[1]), radius, fc="none", ec=style.INK, lw=1.3, zorder=6))
    ax.plot(*start, "o", ms=8, mfc=style.SHEET, mec=style.INK, mew=1.6, zorder=6)
    for where, lift, word in ((start, 0.0, "start"), (goal, radius, "goal")):
        ax.annotate(
            word,
            (where[0], where[1] + lift),
            (0, 9 if lift == 0 else 5),
            textcoords="offset points",
            color=style.INK,
            fontsize=8.5,
            ha="center",
            zorder=7,
        )


def _hue(name: str) -> str:
    return agent_color(name) or style.INK


def _colors(name: str) -> Colormap:
    hue = _hue(name)
    known = {style.BASE: style.ICE, style.TILTED: style.EMBER}
    if hue in known:
        return known[hue]
    return LinearSegmentedColormap.from_list("own", [style.SHEET, hue, "#ffffff"])
