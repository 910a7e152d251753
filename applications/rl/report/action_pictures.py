"""Figure of the actions at one state: the behaviour, its tilt, and the critic's preference.

The functions take arrays.  The tilt of a behaviour b by a critic Q at one state s should have the
distribution

    p(A) ∝ b(A) exp(τ Q(s, A)),

drawn from samples A_i of b by their weights exp(τ Q(s, A_i)).  That is exact for chunks of any
length h, whatever part of the chunk is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.patches import Circle, Rectangle
from scipy.ndimage import map_coordinates
from torch import Tensor

from applications.common.pictures import style
from applications.common.pictures.arrays import Array, checked, density_of
from applications.rl.report.maze_pictures import Maze, draw_maze

SLATE: Colormap = LinearSegmentedColormap.from_list(
    "slate", [style.SHEET, "#2a3342", "#5d6b80", "#aab4c2", "#f4f6fa"]
)
WINDOW = 1.12
"""Half-width of the window around the square of actions [-1, 1]²."""


def action_distribution(
    path: str | Path,
    base: Array,
    tilted: Array,
    landscape: Array,
    *,
    log_weights: Array | None = None,
    maze: Maze | None = None,
    position: Array | None = None,
    goal: Array | None = None,
    names: tuple[str, str] = ("behaviour", "tilted"),
    title: str = "Actions at one state",
    subtitle: str = "",
    shown: int = 1500,
) -> Path:
    """Draw two-dimensional actions at one state: the base, the tilt, and exp(τ Q).

    Arguments:
        path: the PNG to write.
        base: actions (N, 2) of the behaviour.
        tilted: actions (M, 2) of the tilted policy.
        landscape: τ Q (R, R) at the cell centres of the square [-1, 1]², first index the action's
            first component; see `action_grid`.
        log_weights: τ Q of the chunks that begin with ``base`` (N,); adds the panel of the exact
            tilt.
        maze: with ``position``, adds a panel with actions as arrows at that place.
        position: position of the state (2,).
        goal: position of the goal, marked if it is in sight.
        names: names of the base and the tilted policy.
        title: headline.
        subtitle: line below the headline.
        shown: number of samples drawn as dots, the first ones.

    Raises:
        ValueError: a shape is wrong or a value not finite, or only one of ``maze`` and
            ``position`` is given.
    """
    if (maze is None) != (position is None):
        raise ValueError("maze and position belong together, got only one of them")
    a_base, a_tilted = checked(base, "base", ("N", 2)), checked(tilted, "tilted", ("M", 2))
    q = checked(landscape, "landscape", ("R", "R"))
    panels = 3 + (maze is not None) + (log_weights is not None)
    figure, axes = style.sheet(1, panels, (3.1, 3.1), title=title, subtitle=subtitle, note=" ")
    rest = list(axes[0])
    if maze is not None and position is not None:
        at = checked(position, "position", (2,))
        _draw_place(rest.pop(0), maze, at, goal, {names[0]: a_base, names[1]: a_tilted})
    lines = ""
    top = float(density_of(a_tilted, WINDOW).max())
    gain = _mean_height(q, a_tilted) - _mean_height(q, a_base)
    for name, actions, hue, colors in (
        (names[0], a_base, style.BASE, style.ICE),
        (names[1], a_tilted, style.TILTED, style.EMBER),
    ):
        ax = rest.pop(0)
        _action_square(ax)
        density = density_of(actions, WINDOW)
        style.density_image(ax, density, WINDOW, colors, top=None if name == names[0] else top)
        lines = style.reward_contours(ax, q, 1.0)
        ax.scatter(*actions[:shown].T, s=2.2, color="#ffffff", alpha=0.35, linewidths=0, zorder=3)
        caption = "" if name == names[0] else f"mean τQ {gain:+.2f} nat"
        style.heading(ax, name, color=hue, caption=caption)
    ax = rest.pop(0)
    _action_square(ax)
    height = np.exp(q - q.max())
    ax.imshow(height.T, origin="lower", extent=(-1, 1, -1, 1), cmap=SLATE, interpolation="bilinear")
    style.heading(ax, "exp(τQ)", caption=f"τQ spans {q.max() - q.min():.2g} nat")
    if log_weights is not None:
        _draw_exact(rest.pop(0), a_base, checked(log_weights, "log_weights", (len(a_base),)), top)
    note = f"the square is the range of actions; {lines.replace('reward', 'τQ')}".rstrip("; ")
    figure.texts[2].set_text(note)
    return style.save(figure, path)


def action_grid(resolution: int) -> Tensor:
    """Return the actions (R², 2) at the cell centres of [-1, 1]², the first component slowest.

    Their values v (R²,) make the map ``v.reshape(R, R)`` that `action_distribution` takes.
    """
    axis = torch.from_numpy(style.cell_centres(resolution, 1.0)).float()
    return torch.cartesian_prod(axis, axis)


def repeated_action_values(
    values: Callable[[Tensor, Tensor], Tensor],
    observation: Tensor,
    *,
    horizon: int,
    resolution: int = 81,
) -> np.ndarray:
    """Evaluate the chunks that repeat one two-dimensional action ``horizon`` times.

    Arguments:
        values: function of observations (B, obs) and chunks (B, 2 h) that returns values (B,).
        observation: the state (obs,).
        horizon: length h of a chunk; with 1 the map covers all chunks.
        resolution: number R of cells along each component.

    Returns:
        values (R, R).
    """
    chunks = action_grid(resolution).repeat(1, horizon).to(observation)
    with torch.no_grad():
        v = values(observation.expand(len(chunks), -1), chunks)
    return v.double().cpu().numpy().reshape(resolution, resolution)


def _action_square(ax: Axes) -> None:
    style.plane(ax, WINDOW)
    ax.add_patch(Rectangle((-1, -1), 2, 2, fc="none", ec=style.MUTED, lw=0.8, alpha=0.7, zorder=4))
    ax.plot(0, 0, "+", color=style.INK, ms=6, mew=0.8, alpha=0.8, zorder=4)


def _draw_exact(ax: Axes, base: np.ndarray, log_weights: np.ndarray, top: float) -> None:
    """Draw the density of the base with its weights, in the colours of the tilted policy."""
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    effective = 1 / float((weights**2).sum())
    drawn = np.random.default_rng(0).choice(len(base), size=4 * len(base), p=weights)
    width = WINDOW / 50 * (4000 / effective) ** (1 / 6)  # as many points as really count
    density = density_of(base[drawn], WINDOW, bandwidth=width)
    _action_square(ax)
    style.density_image(ax, density, WINDOW, style.EMBER, top=top)
    caption = f"exact; ESS {100 * effective / len(base):.2g}%"
    style.heading(ax, "base × exp(τQ)", caption=caption)


def _draw_place(
    ax: Axes, maze: Maze, at: np.ndarray, goal: Array | None, actions: Mapping[str, np.ndarray]
) -> None:
    """Draw the surroundings of ``at``, with the first actions as arrows from there."""
    reach = 1.25 * maze.unit
    draw_maze(ax, maze, (at[0] - reach, at[0] + reach, at[1] - reach, at[1] + reach))
    style.heading(ax, "at this place")
    for samples, hue, alpha in zip(
        actions.values(), (style.BASE, style.TILTED), (0.5, 0.75), strict=True
    ):
        few = samples[:40]
        ax.quiver(
            *np.repeat(at[:, None], len(few), 1),
            *(0.75 * maze.unit * few).T,
            color=hue,
            alpha=alpha,
            angles="xy",
            scale_units="xy",
            scale=1,
            width=0.006,
            zorder=4,
        )
    ax.plot(*at, "o", ms=8, mfc=style.SHEET, mec=style.INK, mew=1.6, zorder=6)
    if goal is not None:
        x, y = checked(goal, "goal", (2,))
        if max(abs(x - at[0]), abs(y - at[1])) < reach:
            ax.add_patch(Circle((x, y), 1.0, fc="none", ec=style.INK, lw=1.3, zorder=5))


def _mean_height(landscape: np.ndarray, actions: np.ndarray) -> float:
    """Compute the mean of the map over actions (N, 2), bilinear between cell centres."""
    places = (np.clip(actions, -1, 1) + 1) / 2 * len(landscape) - 0.5
    return float(map_coordinates(landscape, places.T, order=1, mode="nearest").mean())
