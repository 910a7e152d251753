"""Reading npz files from outside: as data, never as code, and checked before use.

OGBench's layout has one row per *state*.  A trajectory of T transitions has T + 1 rows, of which
the last has terminal 1 and an action without a next state:

    observations  s0 s1 s2 s3 s4 | s0 s1 ...
    actions       a0 a1 a2 a3 a4 | a0 a1 ...
    terminals      0  0  0  0  1 |  0  0 ...

`transitions` converts it to one row per transition; the terminal moves to the last transition.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from applications.rl.data.manifest import DataError

Arrays = dict[str, NDArray[Any]]

ACTION_TOLERANCE = 1e-5
"""Largest distance of an action from [−1, 1] that counts as rounding."""
_FLAGS = ("terminals", "masks", "timeouts", "truncations", "episode_terminals")
_WHOLE = "button_states"
_MATRICES = ("observations", "next_observations", "actions", "qpos", "qvel", "button_states")


def read_arrays(path: Path, required: Sequence[str]) -> Arrays:
    """Read named arrays of an npz file, checked, as float32 (``button_states`` as int64).

    Arguments:
        path: the file.
        required: names of arrays that the file must hold.

    Raises:
        DataError: as `open_arrays`, or an array fails `check_arrays`.
        FileNotFoundError: there is no such file.
    """
    return check_arrays(open_arrays(path, required), str(path))


def open_arrays(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> Arrays:
    """Read named arrays of an npz file as they are.

    Arguments:
        path: the file.
        required: names of arrays that the file must hold.
        optional: names of arrays that are read where the file holds them.

    Raises:
        DataError: the file is truncated, damaged or not npz; holds pickled objects; or lacks an
            array.
        FileNotFoundError: there is no such file.
    """
    try:
        archive = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # the reader of a damaged archive fails in many ways
        raise DataError(f"{path} is truncated, damaged or not an npz file: {error}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DataError(f"{path} holds a single array, expected an npz file")
    with archive:
        missing = [name for name in required if name not in archive]
        if missing:
            raise DataError(f"{path} lacks {', '.join(missing)}; it has {', '.join(archive.files)}")
        names = [*required, *(name for name in optional if name in archive)]
        return {name: _read(archive, name, path) for name in names}


def _read(archive: np.lib.npyio.NpzFile, name: str, path: Path) -> NDArray[Any]:
    try:
        return archive[name]
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise DataError(
                f"{path} was refused: {name!r} holds pickled objects, and reading them could run "
                "code; expected plain numbers"
            ) from None
        raise DataError(f"{path} is damaged at {name!r}: {error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{path} is truncated or damaged at {name!r}: {error}") from error


def check_arrays(arrays: Mapping[str, NDArray[Any]], source: str) -> Arrays:
    """Check arrays and return them as float32 (``button_states`` as int64).

    Arguments:
        arrays: observations (N, d), actions (N, d_a) and other arrays of N rows, by name.
        source: file or name that the arrays come from, for messages.

    Raises:
        DataError: an array does not hold numbers, has another shape, no rows, NaN or infinity; an
            action is outside [−1, 1]; or terminals or masks are other than 0 and 1.
    """
    rows = len(arrays["observations"]) if arrays["observations"].ndim else 0
    if rows == 0:
        raise DataError(f"{source} has no rows of observations")
    return {name: _check(name, array, rows, source) for name, array in arrays.items()}


def _check(name: str, array: NDArray[Any], rows: int, source: str) -> NDArray[Any]:
    dimensions = 2 if name in _MATRICES else 1
    if array.ndim != dimensions or len(array) != rows:
        expected = f"({rows}, d)" if dimensions == 2 else f"({rows},)"
        raise DataError(f"{source}: {name} has the shape {array.shape}, expected {expected}")
    kinds = "fiub" if dimensions == 1 or name == _WHOLE else "fi" if "obs" in name else "f"
    if array.dtype.kind not in kinds:
        expected = "numbers" if "u" in kinds else "floating point"
        raise DataError(f"{source}: {name} has the type {array.dtype}, expected {expected}")
    if name == _WHOLE:
        return array.astype(np.int64, copy=False)
    array = array.astype(np.float32, copy=False)
    bad = ~np.isfinite(array)
    if bad.any():
        row = int(bad.reshape(rows, -1).any(1).argmax())
        raise DataError(f"{source}: {name} has NaN or infinity in row {row}: {array[row]}")
    if name == "actions" and (np.abs(array) > 1.0 + ACTION_TOLERANCE).any():
        row = int((np.abs(array) > 1.0 + ACTION_TOLERANCE).any(1).argmax())
        raise DataError(
            f"{source}: actions must be in [-1, 1], got {array[row]} in row {row}; rescale them by "
            "2 * (action - low) / (high - low) - 1, with the bounds of the environment's actions, "
            "or save these bounds beside them as action_low and action_high"
        )
    if name in _FLAGS and not np.isin(array, (0.0, 1.0)).all():
        row = int((~np.isin(array, (0.0, 1.0))).argmax())
        raise DataError(f"{source}: {name} must be 0 or 1, got {array[row]} in row {row}")
    return array


def transitions(arrays: Mapping[str, NDArray[Any]], source: str) -> Arrays:
    """Convert one row per state to one row per transition; see the module docstring.

    Arguments:
        arrays: observations, terminals and other arrays in OGBench's layout.
        source: file or name that the arrays come from, for messages.

    Returns:
        the arrays without the last row of each trajectory, with next_observations added.

    Raises:
        DataError: no trajectory has a transition.
    """
    ends = arrays["terminals"] > 0.5
    # The last row ends the last trajectory even if the file was cut off there.
    ends[-1] = True
    starts = ~ends
    if not starts.any():
        raise DataError(f"{source} holds no transition: every row is the end of a trajectory")
    found = {name: array[starts] for name, array in arrays.items()}
    found["next_observations"] = arrays["observations"][1:][starts[:-1]]
    found["terminals"] = ends[1:][starts[:-1]].astype(np.float32)
    return found
