"""Results of runs: evaluations read from run folders and from lists of rows.

A run folder holds ``config.json`` (``agent``, ``task``, ``seed``, options) and ``evaluation.csv``
(``step``, ``phase``, ``success``, ``episodes`` and more, one row an evaluation).  Steps count
offline updates and online environment steps together.  A JSON file holds a list of flat
rows with ``task``, ``agent``, ``seed``, ``step``, ``phase``, ``success``, ``episodes``, as
benchmarks write them.  Both may have ``return``.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHASES = ("offline", "online")
NEEDED = ("step", "phase", "success", "episodes")
Point = tuple[int, int]
"""Step and index of the phase in `PHASES`; pairs sort in the order of the run."""


@dataclass(frozen=True)
class Result:
    """The evaluations of one run.

    Attributes:
        source: folder or file that the run was read from.
        settings: all recorded facts, flat, with dotted names; has agent, task and seed.
        rates: success rate and number of episodes by (step, index of the phase).
        returns: mean return by the same key, NaN where it was not recorded.
    """

    source: str
    settings: Mapping[str, Any]
    rates: Mapping[Point, tuple[float, int]]
    returns: Mapping[Point, float]


def read_results(patterns: Sequence[str]) -> list[Result]:
    """Read all runs that match ``patterns``, each once; some may have no evaluation.

    Arguments:
        patterns: folders, searched to any depth, and JSON files of rows; wildcards are expanded.

    Raises:
        ValueError: nothing was found, or a file is malformed; the message names it.
        OSError: a file cannot be read.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        for path in sorted(map(Path, glob.glob(str(pattern), recursive=True))):
            if path.is_dir():
                folders = {f.parent for f in path.rglob("evaluation.csv")}
                folders |= {f.parent for f in path.rglob("config.json") if _is_run(f.parent)}
                found.update(dict.fromkeys(f.resolve() for f in sorted(folders)))
            elif path.suffix == ".json" and path.name != "config.json":
                found[path.resolve()] = None
    results = [
        result
        for path in found
        for result in ([read_folder(path)] if path.is_dir() else read_rows(path))
    ]
    if not any(result.rates for result in results):
        seen = f", and none of {len(results)} runs has an evaluation yet" if results else ""
        raise ValueError(
            f"no results found under {', '.join(map(repr, patterns)) or 'nothing'}{seen}; expected "
            "folders with config.json and evaluation.csv, or a .json list of rows"
        )
    return results


def read_folder(folder: Path) -> Result:
    """Read the run in ``folder``; a last line that is still being written is left out.

    Raises:
        ValueError: a file is malformed; the message names file, line and value.
        OSError: a file cannot be read.
    """
    path = folder / "config.json"
    config = _json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold an object, got a {type(config).__name__}")
    settings = _flat(config)
    _check_settings(settings, str(path))
    path = folder / "evaluation.csv"
    text = path.read_text(errors="replace") if path.exists() else ""
    complete = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(complete))
    missing = [name for name in NEEDED if name not in (reader.fieldnames or ())]
    if missing and complete:
        raise ValueError(f"{path} must have the columns {', '.join(NEEDED)}, got none of {missing}")
    found = [_evaluation(row, f"{path}, line {reader.line_num}") for row in reader]
    rates, returns = {p: rate for p, rate, _ in found}, {p: value for p, _, value in found}
    return Result(str(folder), settings, rates, returns)


def read_rows(path: Path) -> list[Result]:
    """Read the runs of a JSON list of rows; rows with equal settings belong to one run.

    Raises:
        ValueError: the file holds no such list; the message names the row.
        OSError: the file cannot be read.
    """
    rows = _json(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of rows, got a {type(rows).__name__}")
    runs: dict[tuple[tuple[str, str], ...], tuple[dict[str, Any], dict, dict]] = {}
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where} must be an object, got {row!r}")
        _check_settings(row, where)
        settings = {k: v for k, v in row.items() if k not in (*NEEDED, "hours", "device")}
        settings = {k: v for k, v in settings.items() if k not in ("return", "length")}
        key = tuple(sorted((k, str(v)) for k, v in settings.items()))
        _, rates, returns = runs.setdefault(key, (settings, {}, {}))
        point, rates[point], returns[point] = _evaluation(row, where)
    return [Result(str(path), *run) for run in runs.values()]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"{path} is not JSON: {error}") from None


def _is_run(folder: Path) -> bool:
    """Say whether the folder's config.json describes a run; other programs use that name too."""
    try:
        read_folder(folder)
    except (OSError, ValueError):
        return False
    return True


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _check_settings(settings: Mapping[str, Any], where: str) -> None:
    missing = [name for name in ("task", "agent", "seed") if name not in settings]
    if missing:
        raise ValueError(f"{where}: {missing[0]!r} is missing")
    if type(settings["seed"]) is not int:
        raise ValueError(f"{where}: seed must be an integer, got {settings['seed']!r}")


def _evaluation(row: Mapping[str, Any], where: str) -> tuple[Point, tuple[float, int], float]:
    """Parse step, phase, rate and return of an evaluation; values are numbers or their text."""

    def number(name: str) -> float:
        if name == "success" and row.get(name) == "not told":
            return 0.0  # a remark of the report says to compare returns
        try:
            return float(row[name])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{where}: {name} must be a number, got {row.get(name)!r}") from None

    step, success, episodes = number("step"), number("success"), number("episodes")
    if not (step >= 0 and step.is_integer()):
        raise ValueError(f"{where}: step must be a whole number >= 0, got {row['step']!r}")
    if not 0 <= success <= 1:
        raise ValueError(f"{where}: success must be a rate in [0, 1], got {row['success']!r}")
    if not (episodes >= 1 and episodes.is_integer()):
        raise ValueError(f"{where}: episodes must be a whole number >= 1, got {row['episodes']!r}")
    if row.get("phase") not in PHASES:
        raise ValueError(f"{where}: phase must be offline or online, got {row.get('phase')!r}")
    value = math.nan if row.get("return") is None else number("return")
    return (int(step), PHASES.index(row["phase"])), (success, int(episodes)), value
