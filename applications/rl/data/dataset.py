"""Datasets of transitions: published by OGBench, your own, or from Minari.

A row is one transition (s, a, r, mask, terminal, s').  ``terminals`` marks the last transition of
each trajectory, whatever ended it.  ``masks`` is 0 only where the episode *truly* ended, so that
nothing is bootstrapped from s'.  In OGBench's single tasks only success ends an episode: r and mask
are functions of s (since OGBench 1.2.0).  Actions are clipped to ±(1 − 10⁻⁵) as in the published
protocol, and observations are not normalised.

Data are searched in a folder: the argument, ``$OGBENCH_DATA``, or ``~/.ogbench/data``, where
OGBench puts them.  There, the dataset ``puzzle-4x4-play-v0`` is either one file,
``puzzle-4x4-play-v0.npz``, or a folder of shards: ``puzzle-4x4-play-v0/``,
``puzzle-4x4-play-100m-v0/``, or the given folder itself, with files like
``puzzle-4x4-play-v0-000.npz``.  The 100M data are too large for memory, so that `load_shards` reads
one shard at a time.  Where there are several of these, the first in this order is taken, except
that for the datasets in `LARGE`, whose published figures used the 100M data, those come first.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
from numpy.typing import NDArray

from applications.common.errors import RunError
from applications.rl.data.download import obtain
from applications.rl.data.manifest import DataError, verify
from applications.rl.data.minari_data import minari_arrays
from applications.rl.data.npz import read_arrays, transitions
from applications.rl.data.own_data import npz_arrays
from applications.rl.data.relabel import positions, task_rewards
from applications.rl.data.trajectories import ROUNDING
from applications.rl.environments.tasks import Task, find_task, make_environment
from applications.rl.environments.wrappers import Standard

CLIP = 1.0 - 1e-5
"""Dataset actions are clipped to ±CLIP."""
LARGE = ("cube-quadruple-play-v0", "puzzle-4x4-play-v0")
"""Datasets for which the published runs used the 100M shards."""

Split = Literal["train", "val"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A table of N transitions; all arrays are float32.

    Attributes:
        observations, next_observations: (N, d).
        actions: (N, d_a), in [−CLIP, CLIP].
        rewards: (N,).
        masks: (N,); 0 where nothing may be bootstrapped from the next observation.
        terminals: (N,); 1 at the last transition of each trajectory.
        source: file or name that the data come from.
        versions: versions of the packages that made the data, as far as a manifest says.
        action_low, action_high: (d_a,), bounds of the actions in the units in which they were
            recorded, where the data say them.
    """

    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    masks: NDArray[np.float32]
    terminals: NDArray[np.float32]
    next_observations: NDArray[np.float32]
    source: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    action_low: NDArray[np.float32] | None = None
    action_high: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.observations)

    @property
    def observation_dim(self) -> int:
        """Size d of an observation."""
        return self.observations.shape[1]

    @property
    def action_dim(self) -> int:
        """Size d_a of an action."""
        return self.actions.shape[1]


@dataclass(frozen=True)
class ShardedDataset:
    """A dataset in one or more files (shards), which are loaded one at a time.

    ``len`` is the number of files; indexing loads one, and iterating loads one after the other.

    Attributes:
        task: task for which the rewards are computed.
        paths: the files, in order.
    """

    task: Task
    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Dataset:
        return load_file(self.task, self.paths[index])

    def __iter__(self) -> Iterator[Dataset]:
        return (self[index] for index in range(len(self)))


def data_folder(folder: Path | None = None) -> Path:
    """Return ``folder``, or the default folder of data; see the module docstring."""
    return Path(folder or os.environ.get("OGBENCH_DATA") or "~/.ogbench/data").expanduser()


def load_dataset(
    task: Task, *, folder: Path | None = None, download: bool = True, split: Split = "train"
) -> Dataset:
    """Load the data of a task.

    Arguments:
        task: a task from `applications.rl.environments.tasks.find_task`.
        folder: folder to search, see `data_folder`.
        download: whether OGBench's data are downloaded if they are missing.
        split: training or validation data.

    Raises:
        DataError: there are no data (the message says where they would be, where they are
            published, and how to make them), the data are damaged, they are in several shards, or
            they do not fit the environment.
    """
    shards = load_shards(task, folder=folder, download=download, split=split)
    if len(shards) > 1:
        raise DataError(
            f"the data of {task.name!r} are in {len(shards)} shards in {shards.paths[0].parent}; "
            "load them one at a time by load_shards, or name a folder that holds a single file"
        )
    return shards[0]


def load_shards(
    task: Task, *, folder: Path | None = None, download: bool = True, split: Split = "train"
) -> ShardedDataset:
    """Find the data of a task as files that are loaded one at a time; see `load_dataset`.

    Raises:
        DataError: there are no data.
    """
    if task.kind == "gym":
        raise DataError(
            f"task {task.name!r} has no data of its own; give yours by --data FILE.npz (load_npz), "
            "or learn without by --no-use-data --offline-steps 0"
        )
    if task.kind == "minari":
        return ShardedDataset(task, (Path(task.dataset_name),))
    paths = find_files(task, folder=folder, split=split)
    if not paths:
        paths = [data_folder(folder) / _file_name(task, split)]
        obtain(task, paths[0], allowed=download)
    return ShardedDataset(task, tuple(paths))


def find_files(task: Task, *, folder: Path | None = None, split: Split = "train") -> list[Path]:
    """Find the files of a task's data in the folder, in order; empty if there are none.

    The module docstring says which files are taken where there are several.
    """
    place, name = data_folder(folder), task.dataset_name
    large = f"{name.replace('-v0', '-100m-v0')}/*.npz"
    patterns = [_file_name(task, split), f"{name}/*.npz", large, f"{name}-*.npz"]
    for pattern in [large, *patterns] if name in LARGE else patterns:
        found = [path for path in sorted(place.glob(pattern)) if path.is_file()]
        found = [path for path in found if path.stem.endswith("-val") == (split == "val")]
        if found:
            return found
    return []


def load_file(task: Task, path: Path) -> Dataset:
    """Load one file of data in OGBench's layout, with rewards and masks for ``task``.

    For a ``gym:`` task the file is one for `load_npz`; for a ``minari:`` task the path is ignored.

    Raises:
        DataError: the file is damaged, differs from its manifest, or does not fit the
            environment.
        FileNotFoundError: there is no such file.
    """
    if task.kind == "minari":
        return load_minari(task.dataset_name)
    env = task_environment(task)
    if task.kind == "gym":
        data = load_npz(path)
    else:
        made_by = verify(path)
        required = ["observations", "actions", "terminals", *positions(task)]
        arrays = transitions(read_arrays(path, required), str(path))
        data = _dataset(arrays | task_rewards(task, env, arrays), str(path), made_by)
    check_spaces(data, env)
    return data


def load_npz(path: Path) -> Dataset:
    """Load your own data: an npz file with observations, actions, rewards and terminals.

    With ``next_observations`` each row is a transition, and terminals mark the last transition of
    each trajectory.  Without, the layout is OGBench's: the row with terminal 1 is the state that a
    trajectory ends in, and its action and reward are ignored.  ``masks`` is 0 where an episode
    truly ended.  Without ``masks``, every terminal counts as a true end, and time limits are those
    that ``timeouts``, ``truncations`` or ``episode_terminals`` mark; see
    `applications.rl.data.own_data`.  A trajectory also ends at a row whose next observation is not
    that of the next row.  A line on the standard error stream says all that was assumed.

    Arguments:
        path: the file.  Actions must be in [−1, 1], as fractions of the environment's bounds
            (`applications.rl.environments.wrappers.Standard`), or between ``action_low`` and
            ``action_high`` (d_a,), if the file has these.

    Raises:
        DataError: the file is damaged or does not hold these arrays.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    made_by = verify(path)
    return _dataset(npz_arrays(path), str(path), made_by)


def load_minari(name: str) -> Dataset:
    """Load a Minari dataset of this machine by name.

    The bounds of its action space map actions to [−1, 1]; masks are 0 where an episode terminated,
    and 1 where it was truncated.

    Raises:
        DataError: the package or the dataset is missing, its spaces are not boxes of one
            dimension, or its arrays fail `applications.rl.data.npz.check_arrays`; or its spaces are
            not those of its environment, where this can be made (see `check_spaces`).
    """
    data = _dataset(minari_arrays(name), f"minari:{name}", {})
    try:
        env = task_environment(find_task(data.source))
    except (ValueError, RunError, ImportError):  # without its environment data are of use too
        return data
    check_spaces(data, env)
    return data


def check_spaces(data: Dataset, env: gymnasium.Env) -> None:
    """Check that ``data`` belong to ``env``: sizes of the spaces, and units of the actions.

    A warning says where the actions seem to be in the units of ``env`` instead of [−1, 1], and
    where they were recorded in narrower bounds than those of ``env``, as behind a wrapper.

    Raises:
        DataError: a size differs, or actions were recorded in wider bounds than those of ``env``,
            which would clip them or take them for smaller ones.
    """
    known = getattr(env.spec, "id", None) or env
    for name, found, space in (
        ("observations", data.observation_dim, env.observation_space),
        ("actions", data.action_dim, env.action_space),
    ):
        if space.shape != (found,):
            raise DataError(
                f"{data.source}: {name} have {found} components, but those of the environment "
                f"{known} have the shape {space.shape}"
            )
    if isinstance(env, Standard):
        _check_units(data, env.action_low, env.action_high, f"the environment {known}")


def _check_units(data: Dataset, low: NDArray[Any], high: NDArray[Any], whose: str) -> None:
    """Compare the units of the actions in ``data`` with bounds (d_a,); see `check_spaces`."""
    bounds = f"the bounds of {whose} are {low} and {high}"
    if data.action_low is None or data.action_high is None:
        inside = (data.actions.min(0) >= low) & (data.actions.max(0) <= high)
        if inside.all() and ((low > -1.0) | (high < 1.0)).any():
            warnings.warn(
                f"{data.source}: actions look unscaled: all are in [{data.actions.min():.3g}, "
                f"{data.actions.max():.3g}], and {bounds}; they are taken as fractions of these; "
                "if they are not, save action_low and action_high beside them",
                stacklevel=3,
            )
        return
    recorded = f"actions were recorded in {data.action_low} to {data.action_high}, but {bounds}"
    wider = (data.action_low < low - ROUNDING) | (data.action_high > high + ROUNDING)
    if wider.any():
        raise DataError(
            f"{data.source}: {recorded}, so that an action would not be what it was; name the "
            "environment that takes them, or convert them to its units"
        )
    if not np.allclose([data.action_low, data.action_high], [low, high], atol=ROUNDING):
        warnings.warn(
            f"{data.source}: {recorded}; as behind a wrapper that rescales, -1 and 1 are taken as "
            "the bounds of both",
            stacklevel=3,
        )


@functools.lru_cache(maxsize=2)
def task_environment(task: Task) -> Standard:
    """Return the environment that data of a task are checked against; it takes seconds, once."""
    return make_environment(task)


def _dataset(
    arrays: Mapping[str, NDArray[Any]], source: str, made_by: Mapping[str, str]
) -> Dataset:
    return Dataset(
        observations=arrays["observations"],
        actions=np.clip(arrays["actions"], -CLIP, CLIP),
        rewards=arrays["rewards"],
        masks=arrays["masks"],
        terminals=arrays["terminals"],
        next_observations=arrays["next_observations"],
        source=source,
        versions=made_by,
        action_low=arrays.get("action_low"),
        action_high=arrays.get("action_high"),
    )


def _file_name(task: Task, split: Split) -> str:
    return f"{task.dataset_name}{'-val' if split == 'val' else ''}.npz"
