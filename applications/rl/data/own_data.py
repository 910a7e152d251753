"""Checked arrays of your own data with rewards, from npz files and Minari datasets."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from applications.rl.data.manifest import DataError
from applications.rl.data.npz import Arrays, check_arrays, read_arrays, transitions


def npz_arrays(path: Path) -> Arrays:
    """Read the transitions of an npz file with rewards; see
    `applications.rl.data.dataset.load_npz`.

    A line on the standard error stream says what was assumed in place of a missing array.

    Raises:
        DataError: the file is damaged or does not hold the required arrays.
        FileNotFoundError: there is no such file.
    """
    required = ("observations", "actions", "rewards", "terminals")
    arrays = read_arrays(path, required, ("masks", "next_observations"))
    ends, assumed = arrays["terminals"], []
    by_state = "next_observations" not in arrays
    if "masks" not in arrays:
        ended = np.append(ends[1:], np.float32(0.0)) if by_state else ends
        arrays["masks"] = 1.0 - ended
        assumed.append(f"no masks, so its {ends.sum():.0f} terminals are true ends, no time limits")
    if by_state:
        arrays = transitions(arrays, str(path))
        assumed.append(
            f"no next_observations, so its {len(ends)} rows are states, the last of each "
            f"trajectory only where it ends: {len(arrays['rewards'])} transitions"
        )
    if arrays["next_observations"].shape != arrays["observations"].shape:
        raise DataError(
            f"{path}: next_observations has the shape {arrays['next_observations'].shape}, "
            f"expected that of observations, {arrays['observations'].shape}"
        )
    if assumed:
        print(f"note: {path} has {'; '.join(assumed)}", file=sys.stderr)
    # The transition after the last row, in a replay, never continues its trajectory.
    arrays["terminals"] = np.append(arrays["terminals"][:-1], np.float32(1.0))
    return arrays


def minari_arrays(name: str) -> Arrays:
    """Read the transitions of a Minari dataset; see `applications.rl.data.dataset.load_minari`.

    Raises:
        DataError: the package or the dataset is missing, its spaces are not boxes of one
            dimension, or its arrays fail `check_arrays`.
    """
    try:
        import minari

        data = minari.load_dataset(name)
        low, high = data.action_space.low, data.action_space.high
        episodes = [
            (np.asarray(e.observations), np.asarray(e.actions), e.rewards, e.terminations)
            for e in data.iterate_episodes()
        ]
    except ImportError as error:
        raise DataError(
            f"the Minari dataset {name!r} needs the package: pip install 'minari[hdf5]' ({error})"
        ) from error
    except Exception as error:  # missing and damaged datasets raise many things
        raise DataError(
            f"no usable Minari dataset {name!r} on this machine "
            f"({type(error).__name__}: {error}); get it by: minari download {name}"
        ) from error
    ends = [np.arange(len(rewards)) == len(rewards) - 1 for _, _, rewards, _ in episodes]
    arrays = {
        "observations": np.concatenate([states[:-1] for states, *_ in episodes]),
        "next_observations": np.concatenate([states[1:] for states, *_ in episodes]),
        "actions": np.concatenate([actions for _, actions, *_ in episodes]),
        "rewards": np.concatenate([rewards for _, _, rewards, _ in episodes]),
        "masks": 1.0 - np.concatenate([terminated for *_, terminated in episodes]),
        "terminals": np.concatenate(ends),
    }
    arrays["actions"] = 2.0 * (arrays["actions"] - low) / (high - low) - 1.0
    return check_arrays(arrays, f"Minari dataset {name!r}")
