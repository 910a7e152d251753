"""Making data: ``python -m applications.rl data --task NAME --transitions N --workers W``.

The episodes are written to files of about two thousand transitions each in the folder
``NAME.parts``; see `applications.rl.data.episode_files`.  A generation that was killed therefore
continues with the missing files, and the result is bitwise the same for any number of workers and
any interruptions.  At the end the episode files are joined to ``NAME.npz`` and ``NAME-val.npz`` (a
tenth as many episodes more) in OGBench's layout, with a manifest.

More transitions with the same seed begin with the same episodes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from applications.rl.data.dataset import data_folder
from applications.rl.data.episode_files import (
    SPLITS,
    EpisodeFile,
    can_generate,
    collector_class,
    concatenate,
    plan_files,
    save_arrays,
    write_missing,
)
from applications.rl.data.manifest import (
    DataError,
    manifest_path,
    read_manifest,
    verify,
    versions,
    write_manifest,
)
from applications.rl.data.npz import read_arrays
from applications.rl.data.relabel import positions, success_fractions
from applications.rl.environments.tasks import Task, find_task
from flows.training import write_json

ASSEMBLING = "assembling"
"""File in the folder of episode files that marks ``NAME.npz`` as made from them."""


@dataclass(frozen=True)
class DataConfig:
    """Make a dataset with OGBench's experts, or point-maze data with shortest paths."""

    task: str = "pointmaze-medium-navigate-singletask-task1-v0"
    """Task to make data for; tasks that differ only in goal and reward share the data."""
    transitions: int = 1_000_000
    """Transitions of the training file; the validation file has a tenth as many episodes more."""
    workers: int = 1
    """Processes; the data are the same for any number."""
    seed: int = 0
    """Seed of all episodes."""
    folder: Path | None = None
    """Folder to write to; $OGBENCH_DATA or ~/.ogbench/data, where training looks, if not given."""
    overwrite: bool = False
    """Delete finished or unfinished data of that name instead of refusing to write."""


def run_data(config: DataConfig) -> None:
    """Make the data and print a summary, as the command ``data``.

    Raises:
        ValueError, OSError, RunError: see `generate`.
    """
    data, manifest = generate(config)
    counts = ", ".join(f"{manifest['transitions'][split]} ({split})" for split in SPLITS)
    print(f"\n{manifest['dataset']}: transitions {counts}; seed {manifest['seed']}")
    print("training states that meet the goal of")
    for name, fraction in manifest["success_fraction"].items():
        print(f"  {name}  {fraction:8.4%}")
    print(f"\nwrote {data}\nwrote {_validation(data)}\nwrote {manifest_path(data)}")


def generate(config: DataConfig) -> tuple[Path, dict[str, Any]]:
    """Make the data that ``config`` describes, or find them finished.

    Returns:
        path of the training file, and the manifest.

    Raises:
        ValueError: the task is unknown or has no expert here, or an option is out of range.
        DataError: the folder holds other data of that name and ``overwrite`` is not set, or
            finished data are damaged.
        OSError: the folder cannot be written, or is full; finished episodes are kept.
        RunError: a worker was killed; finished episodes are kept.
    """
    task = find_task(config.task)
    _validate(config, task)
    plan: dict[str, Any] = {
        "dataset": task.dataset_name,
        "seed": config.seed,
        "transitions": config.transitions,
        "protocol": collector_class(task).protocol(task),
        "versions": versions(),
    }
    data = data_folder(config.folder) / f"{task.dataset_name}.npz"
    folder = data.with_suffix(".parts")
    if config.overwrite:
        _discard(data)
    elif (finished := _finished(data, plan)) is not None:
        return data, finished
    files = list(plan_files(config.transitions, plan["protocol"]["episode"]))
    _claim(folder, plan)
    write_missing(folder, files, task, seed=config.seed, workers=config.workers)
    _refuse_others(data)  # another program may have written it meanwhile
    (folder / ASSEMBLING).touch()
    manifest = _assemble(data, folder, files, task, plan)
    shutil.rmtree(folder)
    return data, manifest


def _validate(config: DataConfig, task: Task) -> None:
    for name, value in (("transitions", config.transitions), ("workers", config.workers)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if config.seed < 0:
        raise ValueError(f"seed must be at least 0, got {config.seed}")
    if not can_generate(task):
        raise ValueError(
            f"no expert here can make data for {task.name!r}: there are experts for cube, scene "
            "and puzzle (play, noisy) and pointmaze (navigate, stitch)"
        )


def _assemble(
    data: Path, folder: Path, files: Sequence[EpisodeFile], task: Task, plan: Mapping[str, Any]
) -> dict[str, Any]:
    """Join the episode files, then write the manifest, whose presence marks complete data."""
    names = ["observations", "actions", "terminals", "qvel", *positions(task)]
    fractions: dict[str, float] = {}
    for split, target in zip(SPLITS, (data, _validation(data)), strict=True):
        paths = [folder / file.name for file in files if file.split == split]
        arrays = concatenate([read_arrays(path, names) for path in paths])
        arrays["terminals"] = arrays["terminals"].astype(bool)
        if split == "train":
            fractions = success_fractions(task, arrays)
        save_arrays(target, arrays, compressed=True)
    content = {
        **plan,
        "transitions": {s: sum(f.transitions for f in files if f.split == s) for s in SPLITS},
        "episodes": {s: sum(len(f.lengths) for f in files if f.split == s) for s in SPLITS},
        "success_fraction": fractions,
    }
    return write_manifest(data, content, [data, _validation(data)])


def _validation(data: Path) -> Path:
    return data.with_name(f"{data.stem}-val.npz")


def _claim(folder: Path, plan: Mapping[str, Any]) -> None:
    """Make the folder of episode files, or check that its files belong to this plan.

    Raises:
        DataError: the files belong to another plan.
    """
    path = folder / "plan.json"
    if not path.exists():
        write_json(path, plan)
        return
    try:
        difference = _difference(json.loads(path.read_text()), plan)
    except (AttributeError, json.JSONDecodeError):
        difference = "its plan is unreadable"
    if difference:
        raise DataError(
            f"{folder} holds episodes of an unfinished dataset that was made with other options "
            f"({difference}); finish it, delete the folder, or use --overwrite"
        )


def _finished(data: Path, plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of finished data of this plan; ``None`` if there are no such data.

    Raises:
        DataError: there are other data of that name.
    """
    manifest = read_manifest(data)
    if manifest is None:
        _refuse_others(data)
    if manifest is None or not data.exists():
        return None
    found = {**manifest, "transitions": manifest.get("transitions", {}).get("train")}
    found["versions"] = plan["versions"]  # `verify` warns of other physics, the data stay valid
    if difference := _difference(found, plan):
        raise DataError(
            f"{data} exists and was made with other options ({difference}); move it, or use "
            "--overwrite"
        )
    for path in (data, _validation(data)):
        verify(path)
    shutil.rmtree(data.with_suffix(".parts"), ignore_errors=True)
    return manifest


def _refuse_others(data: Path) -> None:
    """Refuse to write over files without a manifest, unless a killed generation left them.

    Raises:
        DataError: there are such files.
    """
    if (data.with_suffix(".parts") / ASSEMBLING).exists():
        return
    for path in (data, _validation(data)):
        if path.exists():
            raise DataError(f"{path} exists and was not made here; move it, or use --overwrite")


def _discard(data: Path) -> None:
    for path in (manifest_path(data), data, _validation(data)):
        path.unlink(missing_ok=True)
    shutil.rmtree(data.with_suffix(".parts"), ignore_errors=True)


def _difference(found: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{key} is {found.get(key)!r}, asked for {value!r}"
        for key, value in plan.items()
        if found.get(key) != value
    )
