"""Checked arrays of your own data with rewards, from npz files.

A file holds one row per transition or, as OGBench's, one row per state:

*Transitions.*  Each row has ``next_observations``, or the file marks time limits: ``timeouts``
(D4RL), ``truncations`` (Gymnasium) or ``episode_terminals`` (d3rlpy, which marks ends of both
kinds).  Such a row is recorded around one call of ``step``, so that ``terminals`` are true ends.
Without ``next_observations`` the next row has the next observation.  It is unknown at the end of a
trajectory: a row that a time limit cut is left out, and a row that truly ended is kept, for its
mask is 0 and its next observation is never read.

*States.*  Without both, the last row of a trajectory is the state that it ends in, see
`applications.rl.data.npz`.  A trajectory truly ended if its last row or the row before has mask 0.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from applications.rl.data.manifest import DataError
from applications.rl.data.npz import (
    ACTION_TOLERANCE,
    Arrays,
    check_arrays,
    open_arrays,
    transitions,
)
from applications.rl.data.trajectories import breaks

REQUIRED = ("observations", "actions", "rewards", "terminals")
CUTS = ("timeouts", "truncations", "episode_terminals")
"""Names of arrays that mark the rows at which a time limit cut an episode."""
BOUNDS = ("action_low", "action_high")
"""Names of the bounds of the recorded actions, where these are not in [−1, 1]."""
SMALL = 0.75
"""Actions that stay below this fraction of [−1, 1] may not have been rescaled."""


def npz_arrays(path: Path) -> Arrays:
    """Read the transitions of an npz file with rewards; see
    `applications.rl.data.dataset.load_npz`.

    A line on the standard error stream says what was assumed in place of a missing array.

    Returns:
        the arrays of a dataset by name, and ``action_low`` and ``action_high`` (d_a,) if the file
        has them.

    Raises:
        DataError: the file is damaged or does not hold the required arrays.
        FileNotFoundError: there is no such file.
    """
    source, assumed = str(path), list[str]()
    arrays = open_arrays(path, REQUIRED, ("masks", "next_observations", *CUTS, *BOUNDS))
    bounds = {name: arrays.pop(name) for name in BOUNDS if name in arrays}
    if bounds:
        arrays["actions"], bounds = rescaled(arrays["actions"], bounds, source)
    arrays = check_arrays(arrays, source)
    largest = float(np.abs(arrays["actions"]).max())
    if not bounds and 0.0 < largest < SMALL:
        assumed.append(
            f"no action_low and action_high, so its actions, at most {largest:.3g} in magnitude, "
            "are fractions of the environment's bounds"
        )
    cuts = [name for name in CUTS if name in arrays]
    cut = _join_cuts(arrays, cuts, assumed)
    by_state = "next_observations" not in arrays and not cuts
    _complete_masks(arrays, assumed, by_state=by_state, cuts=cuts)
    arrays["terminals"] = np.maximum(arrays["terminals"], cut)
    rows = len(cut)
    if by_state:
        arrays = transitions(arrays, source)
        assumed.append(
            f"no next_observations, so its {rows} rows are states, the last of each "
            f"trajectory only where it ends: {len(arrays['rewards'])} transitions"
        )
    elif "next_observations" not in arrays:
        arrays = _following(arrays, source)
        assumed.append(
            f"no next_observations, so each is that of the next row, and rows at a time limit, "
            f"whose next one is unknown, are left out: {len(arrays['rewards'])} of {rows} rows"
        )
    elif arrays["next_observations"].shape != arrays["observations"].shape:
        raise DataError(
            f"{path}: next_observations has the shape {arrays['next_observations'].shape}, "
            f"expected that of observations, {arrays['observations'].shape}"
        )
    else:
        _end_at_breaks(arrays, assumed)
    if assumed:
        print(f"note: {path} has {'; '.join(assumed)}", file=sys.stderr)
    # The transition after the last row, in a replay, never continues its trajectory.
    arrays["terminals"] = np.append(arrays["terminals"][:-1], np.float32(1.0))
    return arrays | bounds


def rescaled(
    actions: NDArray[Any], bounds: dict[str, NDArray[Any]], source: str
) -> tuple[NDArray[Any], Arrays]:
    """Map actions in units of their own to [−1, 1].

    Arguments:
        actions: (N, d_a), in [low, high].
        bounds: ``action_low`` and ``action_high``, each (d_a,) or a number.
        source: file or name that the arrays come from, for messages.

    Returns:
        the actions in [−1, 1], and the bounds, each (d_a,) float32.

    Raises:
        DataError: a bound is missing, has another shape or is not finite, the bounds are not in
            order, or an action lies outside.
    """
    missing = [name for name in BOUNDS if name not in bounds]
    if missing:
        raise DataError(f"{source} lacks {missing[0]}, the other bound of its actions")
    width = actions.shape[1:]
    try:
        low, high = (np.broadcast_to(bounds[name], width).astype(np.float32) for name in BOUNDS)
    except ValueError:
        shapes = " and ".join(str(bounds[name].shape) for name in BOUNDS)
        raise DataError(
            f"{source}: action_low and action_high have the shapes {shapes}, expected {width}"
        ) from None
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise DataError(
            f"{source}: action_low must be below action_high, both finite, got {low} and {high}"
        )
    fractions = 2.0 * (actions - low) / (high - low) - 1.0
    outside = (np.abs(fractions) > 1.0 + ACTION_TOLERANCE).any(-1)
    if outside.any():
        row = int(outside.argmax())
        raise DataError(
            f"{source}: actions must be in [{low}, {high}], its action_low and action_high, got "
            f"{actions[row]} in row {row}"
        )
    return fractions.astype(np.float32), {"action_low": low, "action_high": high}


def _join_cuts(arrays: Arrays, names: list[str], assumed: list[str]) -> NDArray[np.float32]:
    """Take the arrays that mark time limits out of ``arrays``, and return them as one array.

    Some recorders mark every end in ``terminals``, and in ``timeouts`` or ``truncations`` those
    that are only time limits.  They are known by this: no time limit without a terminal.  Their
    ``terminals`` are changed to true ends.
    """
    ends = arrays["terminals"]
    cuts = {name: arrays.pop(name) for name in names}
    cut = np.max([np.zeros_like(ends), *cuts.values()], axis=0)
    limits = [values for name, values in cuts.items() if name != "episode_terminals"]
    limit = np.max([np.zeros_like(ends), *limits], axis=0)
    if limit.any() and (limit <= ends).all():
        arrays["terminals"] = ends - limit
        assumed.append(
            f"a terminal at each of its {limit.sum():.0f} time limits, which are no true ends"
        )
    return cut


def _complete_masks(arrays: Arrays, assumed: list[str], *, by_state: bool, cuts: list[str]) -> None:
    """Add ``masks`` where they are missing; of rows that are states, put them at transitions."""
    ends = arrays["terminals"]
    if "masks" in arrays:
        if by_state:  # the mask of the state that a trajectory ends in is that of its last step
            masks = arrays["masks"]
            ended = np.append((ends[1:] > 0.5) & (masks[1:] < 0.5), False)
            arrays["masks"] = np.where(ended, np.float32(0.0), masks)
        return
    ended = np.append(ends[1:], np.float32(0.0)) if by_state else ends
    arrays["masks"] = 1.0 - ended
    limits = f"its {' and '.join(cuts)} are not" if cuts else "no time limits"
    assumed.append(f"no masks, so its {ends.sum():.0f} terminals are true ends, {limits}")


def _end_at_breaks(arrays: Arrays, assumed: list[str]) -> None:
    """End a trajectory at each row whose next observation is not that of the next row."""
    broken = breaks(arrays["observations"], arrays["next_observations"], arrays["terminals"])
    arrays["terminals"] = np.maximum(arrays["terminals"], broken.astype(np.float32))
    if broken.any():
        assumed.append(
            f"{broken.sum()} rows (the first is row {broken.argmax()}) with terminal 0 whose next "
            "observation is not that of the next row (shuffled rows, rows of several environments "
            "in turn, or time limits that are not marked?), so a trajectory ends at each"
        )


def _following(arrays: Arrays, source: str) -> Arrays:
    """Add the next observations of rows that are transitions; leave out rows whose next is unknown.

    Raises:
        DataError: no row is left.
    """
    ends = arrays["terminals"] > 0.5
    ends[-1] = True
    kept = ~ends | (arrays["masks"] < 0.5)
    if not kept.any():
        raise DataError(f"{source} holds no transition: every row is cut by a time limit")
    states = arrays["observations"]
    after = np.where(ends[:, None], states, np.roll(states, -1, axis=0))
    last = ends | np.append(~kept[1:], True)
    arrays = arrays | {"next_observations": after, "terminals": last.astype(np.float32)}
    return {name: array[kept] for name, array in arrays.items()}
