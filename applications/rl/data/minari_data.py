"""Checked arrays of Minari datasets, which must be on this machine."""

from __future__ import annotations

import numpy as np

from applications.rl.data.manifest import DataError
from applications.rl.data.npz import Arrays, check_arrays
from applications.rl.environments.spaces import bounded_vector_space, vector_space


def minari_arrays(name: str) -> Arrays:
    """Read the transitions of a Minari dataset; see `applications.rl.data.dataset.load_minari`.

    Returns:
        the arrays of a dataset by name, and the bounds of its actions, ``action_low`` and
        ``action_high`` (d_a,).

    Raises:
        DataError: the package or the dataset is missing, its spaces are not boxes of one
            dimension, its actions are not bounded, or its arrays fail `check_arrays`.
    """
    try:
        import minari

        data = minari.load_dataset(name)
    except ImportError as error:
        raise DataError(
            f"the Minari dataset {name!r} needs the package: pip install 'minari[hdf5]' ({error})"
        ) from error
    except Exception as error:  # missing and damaged datasets raise many things
        raise DataError(
            f"no usable Minari dataset {name!r} on this machine "
            f"({type(error).__name__}: {error}); get it by: minari download {name}"
        ) from error
    source = f"Minari dataset {name!r}"
    try:
        vector_space(data.observation_space, "observation_space")
        actions = bounded_vector_space(data.action_space, "action_space")
    except ValueError as error:
        raise DataError(f"{source}: {error}") from error
    episodes = [
        (np.asarray(e.observations, np.float32), np.asarray(e.actions), e.rewards, e.terminations)
        for e in data.iterate_episodes()
    ]
    ends = [np.arange(len(rewards)) == len(rewards) - 1 for _, _, rewards, _ in episodes]
    low, high = (bound.astype(np.float32) for bound in (actions.low, actions.high))
    recorded = np.concatenate([actions for _, actions, *_ in episodes])
    arrays = {
        "observations": np.concatenate([states[:-1] for states, *_ in episodes]),
        "next_observations": np.concatenate([states[1:] for states, *_ in episodes]),
        "actions": (2.0 * (recorded - low) / (high - low) - 1.0).astype(np.float32),
        "rewards": np.concatenate([rewards for _, _, rewards, _ in episodes]),
        "masks": 1.0 - np.concatenate([terminated for *_, terminated in episodes]),
        "terminals": np.concatenate(ends),
    }
    return check_arrays(arrays, source) | {"action_low": low, "action_high": high}
