"""How rows follow each other: breaks between rows, and windows within an episode.

An agent with chunks of h actions learns from windows of h consecutive rows.  Such a window means
what it says only if each of its rows, but the last, ends in the state in which the next row begins.
Rows of several environments that were stored in turn, shuffled rows, and files joined without an
end between them break this, and so does a time limit that no array marks.
"""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

Array = NDArray[np.float32]

ROUNDING = 1e-5
"""Largest difference of two observations, relative to the largest one, that counts as rounding."""

FEW = 0.9
"""Fraction of windows within episodes below which a training says it."""


def breaks(observations: Array, next_observations: Array, terminals: Array) -> NDArray[np.bool_]:
    """Mark the rows that end in another state than the next row begins in, without a terminal.

    Arguments:
        observations, next_observations: (N, d).
        terminals: (N,); 1 at the last row of each trajectory.

    Returns:
        (N,); the last row is never marked, as no row follows it.
    """
    scale = np.abs(observations).max(0, initial=0.0)
    apart = np.abs(next_observations[:-1] - observations[1:]) > ROUNDING * scale
    return np.append(apart.any(1) & (terminals[:-1] < 0.5), False)


def windows_within_episodes(terminals: Array, horizon: int) -> int:
    """Count the windows of ``horizon`` consecutive rows that lie within one episode.

    Arguments:
        terminals: (N,); 1 at the last row of each episode.
        horizon: number h of rows in a window.
    """
    return int(np.maximum(episode_lengths(terminals) - horizon + 1, 0).sum())


def check_windows(terminals: Array, horizon: int) -> None:
    """Refuse data from whose windows nothing is learned; say where most windows are of no use.

    Raises:
        ValueError: there are fewer rows than a window has, or no window lies within one episode.
    """
    if len(terminals) < horizon:
        raise ValueError(
            f"data must have at least horizon={horizon} rows, which a window takes, got "
            f"{len(terminals)}"
        )
    windows = len(terminals) - horizon + 1
    within = windows_within_episodes(terminals, horizon)
    longest = int(episode_lengths(terminals).max())
    if not within:
        raise ValueError(
            f"data: none of the {windows} windows of horizon={horizon} rows lies within one "
            f"episode, of which the longest has {longest} rows, so nothing could be learned; the "
            f"horizon must be at most {longest}"
        )
    if within < FEW * windows:
        tqdm.write(
            f"note: {within / windows:.1%} of the windows of horizon={horizon} rows lie within one "
            "episode; nothing is learned from the rest",
            file=sys.stderr,
        )


def note_breaks(
    observations: Array, next_observations: Array, terminals: Array, horizon: int
) -> None:
    """Say where windows would join rows that do not follow each other."""
    broken = breaks(observations, next_observations, terminals).sum()
    if broken and horizon > 1:
        tqdm.write(
            f"note: {broken} rows of the data with terminal 0 end in another state than the next "
            f"row begins in, so that windows of horizon={horizon} rows join what does not belong "
            "together; rows must be in the order of time, with terminals at the ends",
            file=sys.stderr,
        )


def episode_lengths(terminals: Array) -> NDArray[np.int64]:
    """Return the number of rows of each episode, where the last row always ends one."""
    ends = np.append(np.flatnonzero(terminals[:-1] > 0.5), len(terminals) - 1)
    return np.diff(ends, prepend=-1)
