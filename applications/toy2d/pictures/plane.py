"""Pictures of the plane: densities before and after a tilt, paths of particles, the control field.

Functions of arrays or tensors that write a PNG and return its path.  A map on the plane has shape
(R, R), the first index along x and the second along y, as in `exact_tilt.GridTilt`; where there is
none, it is estimated from samples.  Blue is the base, amber the tilt (see ``style``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from applications.common.pictures import style
from applications.common.pictures.arrays import (
    Array,
    check_extent,
    checked,
    checked_density,
    density_of,
)

SHOWN_OUTSIDE = 0.02
"""Share of samples outside the window above which a panel tells it."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer holds what is known of one distribution: samples, a density, or both.

    Arguments:
        samples: Points (N, 2), drawn over the density.
        density: Map (R, R), first index x; estimated from the samples where there is none.
        caption: A few words beside the panel's title, such as its mean reward.
    """

    samples: Array | None = None
    density: Array | None = None
    caption: str = ""


def triptych(
    path: str | Path,
    base: Layer,
    tilted: Layer,
    exact: Layer,
    *,
    extent: float,
    reward: Array | None = None,
    title: str = "A flow, tilted",
    subtitle: str = "",
    shown: int = 1200,
) -> Path:
    """Draw base, tilted and exact densities side by side, with samples and reward contours.

    A panel tells how many of its samples lie outside the window, if those are more than 2 %.

    Arguments:
        path: The PNG to write.
        base: The distribution before.
        tilted: The distribution that the learned flow samples.
        exact: The distribution it should sample; ``tilted`` is coloured on its scale.
        extent: Half-width of the window.
        reward: Its map (R, R), first index x.
        title: Headline.
        subtitle: Line below it.
        shown: Samples drawn in each panel, the first ones.

    Raises:
        ValueError: a shape is wrong, a value not finite, or a layer is empty.
    """
    e = check_extent(extent)
    layers = {"base": base, "tilted": tilted, "exact": exact}
    maps = {name: _layer_map(layer, name, e) for name, layer in layers.items()}
    r = None if reward is None else checked(reward, "reward", ("R", "R"))
    note = "" if r is None else "lines"
    figure, axes = style.sheet(1, 3, (3.9, 3.9), title=title, subtitle=subtitle, note=note)
    heads = {"base": "base", "tilted": "tilted flow", "exact": "exact tilt"}
    hues = {"base": style.BASE, "tilted": style.TILTED, "exact": style.EXACT}
    for ax, (name, layer) in zip(axes[0], layers.items(), strict=True):
        style.plane(ax, e)
        caption = ", ".join(filter(None, (layer.caption, _outside(layer, name, e))))
        style.heading(ax, heads[name], color=hues[name], caption=caption)
        cool = name == "base"
        top = float(maps["base" if cool else "exact"].max())
        style.density_image(ax, maps[name], e, style.ICE if cool else style.EMBER, top=top)
        if r is not None:
            note = style.reward_contours(ax, r, e)
        if layer.samples is not None:
            _dots(ax, checked(layer.samples, f"{name}.samples", ("N", 2))[:shown])
    figure.texts[2].set_text(note)
    return style.save(figure, path)


def particle_paths(
    path: str | Path,
    base: Array,
    tilted: Array,
    *,
    extent: float,
    title: str = "From noise to data",
    subtitle: str = "",
    shown: int = 250,
    highlighted: int = 6,
) -> Path:
    """Draw paths of particles of the base and of the tilted flow, from noise to data.

    Arguments:
        path: The PNG to write.
        base: Trajectories (K+1, N, 2) of the base.
        tilted: Trajectories (L+1, N, 2) of the tilted flow; of the same noise, to compare fates.
        extent: Half-width of the window.
        title: Headline.
        subtitle: Line below it.
        shown: Paths drawn, the first ones.
        highlighted: How many of those are drawn in white, the same ones in both panels.

    Raises:
        ValueError: a shape is wrong, a value not finite, or the numbers of particles differ.
    """
    e = check_extent(extent)
    both = [checked(base, "base", ("K", "N", 2)), checked(tilted, "tilted", ("K", "N", 2))]
    if both[0].shape[1] != both[1].shape[1]:
        sizes = f"{both[0].shape[1]} and {both[1].shape[1]}"
        raise ValueError(f"base and tilted must hold the same number of particles, got {sizes}")
    for name, xs in zip(("base", "tilted"), both, strict=True):
        if len(xs) < 2:
            raise ValueError(f"{name} must hold at least two states along time, got {len(xs)}")
    note = f"white: the same {min(highlighted, both[0].shape[1])} starts in both"
    figure, axes = style.sheet(1, 2, (5.4, 5.4), title=title, subtitle=subtitle, note=note)
    heads = (("base", style.BASE, style.ICE), ("tilted flow", style.TILTED, style.EMBER))
    for ax, states, (name, hue, colors) in zip(axes[0], both, heads, strict=True):
        style.plane(ax, e)
        style.heading(ax, name, color=hue)
        xs = states[:, :shown]
        segments = np.stack([xs[:-1], xs[1:]], 2)  # (K, N, 2, 2), early ones first
        time = np.linspace(0, 1, len(xs) - 1)
        rgba = colors(0.22 + 0.55 * time)
        rgba[:, 3] = 0.16 + 0.44 * time
        lines = list(segments.reshape(-1, 2, 2))
        ax.add_collection(
            LineCollection(lines, colors=rgba.repeat(xs.shape[1], 0), linewidths=0.7, zorder=1)
        )
        ax.scatter(*xs[0].T, s=4, color=style.MUTED, alpha=0.6, linewidths=0, zorder=2)
        ax.scatter(*xs[-1].T, s=7, color=colors(0.85), alpha=0.9, linewidths=0, zorder=3)
        marked = xs[:, :highlighted].swapaxes(0, 1)
        ax.add_collection(
            LineCollection(list(marked), colors=style.INK, linewidths=1.1, alpha=0.85, zorder=4)
        )
        ax.scatter(*marked[:, 0].T, s=16, fc=style.SHEET, ec=style.INK, linewidths=1, zorder=5)
        ax.scatter(*marked[:, -1].T, s=22, color=style.INK, linewidths=0, zorder=5)
    return style.save(figure, path)


def control_field(
    path: str | Path,
    control: Array,
    times: Array,
    *,
    extent: float,
    densities: Array | None = None,
    samples: Array | None = None,
    title: str = "What was learned",
    subtitle: str = "",
    arrows: int = 25,
) -> Path:
    """Draw the learned control u(x, t) as arrows over the tilted density, one panel a time.

    Arrows fade where the density is below a twelfth of its peak, toward where nothing was learned.
    All panels share one scale, compressed (tanh) from about twice the mean of |u| under the
    densities, so that arrows do not tangle; each panel tells sqrt(E|u|²) under its own density.

    Arguments:
        path: The PNG to write.
        control: u on the grid (T, R, R, 2), first spatial index x, at cell centres.
        times: Its times (T,).
        extent: Half-width of the window.
        densities: Tilted densities (T, S, S); or else
        samples: Points of the tilted flow (T, N, 2) from which they are estimated.
        title: Headline.
        subtitle: Line below it.
        arrows: At most about this many arrows along an axis.

    Raises:
        ValueError: a shape is wrong, a value not finite, or not exactly one of ``densities`` and
            ``samples`` is given.
    """
    e = check_extent(extent)
    u = checked(control, "control", ("T", "R", "R", 2))
    t = checked(times, "times", (len(u),))
    if (densities is None) == (samples is None):
        raise ValueError("control_field needs either densities or samples, got both or neither")
    if densities is not None:
        p = checked_density(densities, "densities", (len(u), "S", "S"))
    else:
        x = checked(samples if samples is not None else u, "samples", (len(u), "N", 2))
        p = np.stack([density_of(points, e, resolution=120, bandwidth=e / 28) for points in x])
    note = "arrows share one scale and fade where the tilted density is negligible"
    figure, axes = style.sheet(1, len(u), (3.0, 3.0), title=title, subtitle=subtitle, note=note)
    stride = -(-u.shape[1] // arrows)
    first = (u.shape[1] - 1) % stride // 2
    axis = style.cell_centres(u.shape[1], e)[first::stride]
    where = style.cell_centres(p.shape[1], e)
    fine = np.abs(where[:, None] - style.cell_centres(u.shape[1], e)).argmin(1)
    weights = p / p.sum((1, 2), keepdims=True)
    size = np.linalg.norm(u, axis=3)[:, fine[:, None], fine]
    unit = max(float((weights * size).sum((1, 2)).mean()), 1e-12)
    coarse = np.abs(axis[:, None] - where).argmin(1)
    for ax, u_t, p_t, s_t, w_t, time in zip(axes[0], u, p, size, weights, t, strict=True):
        style.plane(ax, e)
        rms = float(np.sqrt((w_t * s_t**2).sum()))
        style.heading(ax, f"t = {time:g}", caption=f"rms u = {rms:.2f}")
        style.density_image(ax, p_t, e, style.EMBER, top=1.25 * float(p_t.max()))
        shown = u_t[first::stride, first::stride]
        presence = np.clip(p_t[coarse[:, None], coarse] / p_t.max() * 12, 0, 1)
        length = np.linalg.norm(shown, axis=2)
        scale = np.tanh(length / (2 * unit)) / np.maximum(length, 1e-12) * 1.7 * (axis[1] - axis[0])
        rgba = np.ones((*shown.shape[:2], 4)) * 0.97
        rgba[..., 3] = (0.08 + 0.87 * presence) * (length > unit / 40)
        ax.quiver(
            *np.meshgrid(axis, axis, indexing="ij"),
            *np.moveaxis(shown * scale[..., None], 2, 0),
            color=rgba.reshape(-1, 4),
            angles="xy",
            scale_units="xy",
            scale=1,
            width=0.005,
            headwidth=3.6,
            headlength=4,
            headaxislength=3.6,
            minlength=0,
            pivot="mid",
            zorder=3,
        )
    return style.save(figure, path)


def _layer_map(layer: Layer, name: str, extent: float) -> np.ndarray:
    if layer.density is not None:
        return checked_density(layer.density, f"{name}.density")
    if layer.samples is None:
        raise ValueError(f"{name} must hold samples or a density, got neither")
    return density_of(checked(layer.samples, f"{name}.samples", ("N", 2)), extent)


def _outside(layer: Layer, name: str, extent: float) -> str:
    """Say what share of the samples the window leaves out, or nothing for few or none."""
    if layer.samples is None:
        return ""
    points = checked(layer.samples, f"{name}.samples", ("N", 2))
    share = float((np.abs(points) > extent).any(1).mean())
    return f"{share:.0%} outside" if share > SHOWN_OUTSIDE else ""


def _dots(ax: Axes, points: np.ndarray) -> None:
    ax.scatter(
        points[:, 0], points[:, 1], s=2.2, color="#ffffff", alpha=0.4, linewidths=0, zorder=3
    )
