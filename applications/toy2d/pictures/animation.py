"""A GIF of the flow in motion: base and tilted particles side by side from noise to data.

Frames are composed as arrays of colour indices rather than drawn by matplotlib, which makes fifty
of them in about a second and lets the file keep one exact palette: the left half uses the
base's colours, the right half the tilt's colours, the foot greys.  Everything is a brightness in
[0, 1] until then: the density of all particles (a blurred histogram) glows, the first few hundred
particles shine as points, and the reward's contour lines lie faintly over both,

    brightness = max(glow, points),    brightness += contour (1 - brightness).
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, to_rgb
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter

from applications.common.pictures import style
from applications.common.pictures.arrays import Array, check_extent, checked, density_of
from flows.training import replacing

SIDE, MARGIN, HEAD, FOOT = 320, 16, 40, 44
HUES, GREYS = 48, 31
"""Pixels of a panel and of the space around; colours of a ramp (2·48 + 31 + 1 unused = 128)."""


def flow_animation(
    path: str | Path,
    base: Array,
    tilted: Array,
    *,
    extent: float,
    times: Array | None = None,
    reward: Array | None = None,
    frames: int = 48,
    seconds: float = 3.6,
    hold: float = 1.6,
    shown: int = 500,
    names: tuple[str, str] = ("base", "tilted flow"),
) -> Path:
    """Write a looping GIF of particles of the base and of the tilted flow from t = 0 to 1.

    Arguments:
        path: The GIF to write.
        base: Trajectories (K+1, N, 2) of the base; a few thousand particles make a smooth glow.
        tilted: Trajectories (K+1, M, 2) of the tilted flow, at the same times.
        extent: Half-width of the window.
        times: Times (K+1,), increasing; uniform from 0 to 1 unless given.
        reward: Its map (R, R), first index x, drawn as contours.
        frames: Frames, at most: the states nearest to as many uniform times.
        seconds: Duration of the motion.
        hold: Additional duration of the last frame.
        shown: Particles drawn as points, the first ones.
        names: Titles of the panels.

    Raises:
        ValueError: a shape is wrong, a value not finite, the numbers of states differ or are below
            two, or the times do not increase.
        OSError: the file cannot be written.
    """
    e = check_extent(extent)
    both = [checked(base, "base", ("K", "N", 2))]
    both.append(checked(tilted, "tilted", (len(both[0]), "N", 2)))
    states = len(both[0])
    if states < 2 or frames < 2:
        raise ValueError(f"base must hold and frames be at least 2, got {states} and {frames}")
    t = np.linspace(0, 1, states) if times is None else checked(times, "times", (states,))
    if not (np.diff(t) > 0).all():
        raise ValueError(f"times must increase, got {t}")
    contour = np.zeros((SIDE, SIDE)) if reward is None else _contour(reward, e)
    uniform = np.linspace(t[0], t[-1], min(frames, states))
    chosen = np.unique(np.abs(t - uniform[:, None]).argmin(1))
    still = _still(names)
    images = []
    for k in chosen:
        done = float((t[k] - t[0]) / (t[-1] - t[0]))
        canvas = still.copy()
        for j, xs in enumerate(both):
            light = _panel(xs[k], e, shown, done)
            light += contour * (1 - light)
            left = MARGIN + j * (SIDE + MARGIN)
            inside = (slice(HEAD, HEAD + SIDE), slice(left, left + SIDE))
            canvas[inside] = j * HUES + np.rint(light * (HUES - 1)).astype(np.uint8)
        _foot(canvas, float(t[k]), done)
        image = Image.fromarray(canvas)  # of mode L until it has a palette
        image.putpalette(_palette())
        images.append(image)
    step = max(20, round(1000 * seconds / len(images) / 10) * 10)
    durations = [step] * (len(images) - 1) + [step + round(1000 * hold)]
    with replacing(path) as file:
        images[0].save(
            file,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=durations,
            loop=0,
            optimize=False,
        )
    return Path(path)


def _palette() -> bytes:
    """Make 256 RGB colours: of the base, of the tilt, and greys from the sheet to ink."""
    ramps = [_ramp(style.ICE), _ramp(style.EMBER)]
    ends = np.array([to_rgb(style.SHEET), to_rgb(style.INK)])
    ramps.append(ends[0] + np.linspace(0, 1, GREYS)[:, None] * (ends[1] - ends[0]))
    return np.rint(np.concatenate(ramps) * 255).astype(np.uint8).tobytes()


def _ramp(colors: Colormap) -> np.ndarray:
    return np.asarray(colors(np.linspace(0, 1, HUES)))[:, :3]


def _panel(points: np.ndarray, extent: float, shown: int, done: float) -> np.ndarray:
    """Compute the brightness (SIDE, SIDE), row 0 at the top, of particles (N, 2)."""
    blur = extent / (16 + 16 * done)  # noise is wider than data
    glow = density_of(points, extent, resolution=SIDE // 2, bandwidth=blur)
    glow = 0.66 * (glow / max(glow.max(), 1e-12)) ** 0.8
    dots = np.clip(gaussian_filter(_splat(points[:shown], extent), 0.8) * 4.5, 0, 1)
    light = np.maximum(glow.repeat(2, 0).repeat(2, 1), dots)
    return light.T[::-1].copy()


def _splat(points: np.ndarray, extent: float) -> np.ndarray:
    """Share points (N, 2) among their four nearest pixels (SIDE, SIDE), so that they glide."""
    place = (points / extent + 1) / 2 * SIDE - 0.5
    corner = np.floor(place).astype(int)
    part = place - corner
    image = np.zeros((SIDE, SIDE))
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        x, y = corner[:, 0] + i, corner[:, 1] + j
        inside = (x >= 0) & (x < SIDE) & (y >= 0) & (y < SIDE)
        share = np.abs(1 - i - part[:, 0]) * np.abs(1 - j - part[:, 1])
        np.add.at(image, (x[inside], y[inside]), share[inside])
    return np.minimum(image, 1)


def _contour(reward: Array, extent: float) -> np.ndarray:
    """Compute the brightness (SIDE, SIDE), row 0 at the top, of contours of ``reward`` (R, R)."""
    figure = Figure(figsize=(1, 1), dpi=SIDE, facecolor="black")
    canvas = FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    style.reward_contours(ax, checked(reward, "reward", ("R", "R")), extent, width=0.22)
    ax.set(xlim=(-extent, extent), ylim=(-extent, extent))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., 0] / 255 * 0.4


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def _write(canvas: np.ndarray, at: tuple[int, int], text: str, ramp: tuple[int, int]) -> None:
    """Write ``text`` with its baseline's left end ``at`` (x, y), in colours from ``ramp``."""
    mask = Image.new("L", canvas.shape[::-1])
    bold = ramp[0] < 2 * HUES
    ImageDraw.Draw(mask).text(at, text, 255, _font(15 if bold else 13, bold=bold), anchor="ls")
    light = np.asarray(mask) / 255
    inked = light > 0
    canvas[inked] = ramp[0] + np.rint(light[inked] * ramp[1]).astype(np.uint8)


def _still(names: tuple[str, str]) -> np.ndarray:
    """Draw the part of all frames that does not move: indices (height, width)."""
    canvas = np.full((HEAD + SIDE + FOOT, 3 * MARGIN + 2 * SIDE), 2 * HUES, dtype=np.uint8)
    for j, name in enumerate(names):
        left = MARGIN + j * (SIDE + MARGIN)
        _write(canvas, (left, HEAD - 14), name, (j * HUES, round((0.66, 0.8)[j] * HUES)))
        canvas[HEAD - 1 : HEAD + SIDE + 1, left - 1 : left + SIDE + 1] = 2 * HUES + GREYS // 7
    return canvas


def _foot(canvas: np.ndarray, t: float, done: float) -> None:
    """Draw the time and a bar of progress, in place."""
    middle = HEAD + SIDE + FOOT // 2
    _write(canvas, (MARGIN, middle + 5), f"t = {t:.2f}", (2 * HUES, GREYS - 1))
    left, right = MARGIN + 76, canvas.shape[1] - MARGIN
    canvas[middle - 1 : middle + 1, left:right] = 2 * HUES + GREYS // 5
    head = left + round(done * (right - left))
    canvas[middle - 1 : middle + 1, left:head] = 2 * HUES + GREYS - 1
