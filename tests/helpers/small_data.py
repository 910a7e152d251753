"""Small datasets that tests generate."""

import numpy as np

from applications.rl import DataConfig, generate

POINTMAZE = "pointmaze-medium-navigate-singletask-task1-v0"
CUBE = "cube-single-play-singletask-task2-v0"


def make_pointmaze(folder, **options):
    """Generate 2500 transitions in the maze, in three episodes; return the path."""
    return generate(
        DataConfig(**{"task": POINTMAZE, "transitions": 2500, "folder": folder} | options)
    )[0]


def edit(path, **changes):
    """Replace arrays of an npz file; ``None`` removes one.  Its manifest is removed."""
    arrays = dict(np.load(path))
    arrays.update(changes)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    path.with_suffix(".json").unlink(missing_ok=True)
    return arrays
