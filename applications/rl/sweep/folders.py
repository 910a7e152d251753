"""The state of runs in a sweep, read from their folders, which machines may share.

In addition to the files of `applications.rl.run_folder`, a worker of a sweep writes

    worker.json      attempt, host, node and process of the worker that has the run, or had it last
    finished.json    settings, updates and hours of a finished run
    error.txt        traceback of the last failure, until the run is finished

A run whose finished.json has the settings of the plan is left alone.  Any other run is handed to
training, which continues it, finds it finished, or refuses it because of other settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from applications.rl import run_folder
from applications.rl.report.results import PHASES, read_folder
from applications.rl.sweep.plan import Job, Plan, Run, State
from applications.rl.training.config import EXECUTION_OPTIONS, TrainConfig
from flows.training import write_json

WORKER = "worker.json"
FINISHED = "finished.json"
ERROR = "error.txt"
TAIL = 8192
"""Number of bytes at the end of a table that always contain its last two lines."""
FIXED = ("preset", "batch_size", "shard_every", "behaviour", "freeze_behaviour", "weights")
"""Options that a resume of a run must share with its checkpoint, beside those of the agent."""
Row = dict[str, Any]


def settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that a finished run must share with the plan, as JSON reads them."""
    shared = {k: v for k, v in config.plain.items() if k not in (*EXECUTION_OPTIONS, "seeds")}
    return json.loads(json.dumps(shared, default=str))


@dataclass(frozen=True)
class Work:
    """The remaining work of a plan.

    Attributes:
        jobs: jobs without the finished runs.
        states: states of the runs that end before anything starts: finished or refused ones.
        configs: options of the training of each run.
    """

    jobs: tuple[Job, ...]
    states: Mapping[Run, State]
    configs: Mapping[Run, TrainConfig]

    @classmethod
    def of(cls, plan: Plan) -> Work:
        """Read the remaining work of ``plan`` from the folders of its runs."""
        configs = {run: job.config for job in plan.jobs for run in job.runs}
        states = {run: State("done") for run in configs if is_finished(run, configs[run])}
        states |= {run: State("failed", note) for run, note in plan.refused.items()}
        left = [(job, [run for run in job.runs if run not in states]) for job in plan.jobs]
        configs |= dict.fromkeys(plan.refused, plan.jobs[0].config)
        return cls(tuple(job.only(runs) for job, runs in left if runs), states, configs)

    def updates(self, job: Job) -> int:
        """Count the updates that a job still has to do."""
        whole = job.config.phases.updates
        return sum(max(0, whole - progress(run, job.config)) for run in job.runs)


def write_finished(folder: Path, config: TrainConfig, hours: float | None) -> None:
    """Write finished.json of a run.

    Arguments:
        folder: folder of the run.
        config: options of its training.
        hours: wall time of the process that finished the run; None if it was found finished.
    """
    (folder / ERROR).unlink(missing_ok=True)
    if hours is None:  # an earlier process may have noted it
        hours = read_json(folder / FINISHED).get("hours")
    content = {"settings": settings(config), "updates": config.phases.updates, "hours": hours}
    write_json(folder / FINISHED, content)


def is_finished(run: Run, config: TrainConfig) -> bool:
    """Say whether the run is finished with the settings of ``config``."""
    return read_json(run.folder / FINISHED).get("settings") == settings(config)


def is_other(run: Run, config: TrainConfig) -> bool:
    """Say whether the folder holds a run of other settings, which a resume refuses."""
    stored, wanted = dict(read_json(run.folder / run_folder.CONFIG)), settings(config)
    if config.options is not None and isinstance(stored.get("options"), dict):
        defaults = run_folder.option_defaults(config.options)  # of options of a later version
        stored["options"] = {
            name: stored["options"].get(name, defaults.get(f"options.{name}"))
            for name in {**wanted["options"], **stored["options"]}
        }
    names = FIXED if wanted["options"] is None else (*FIXED, "options")
    return any(name in stored and stored[name] != wanted[name] for name in names)


def progress(run: Run, config: TrainConfig) -> int:
    """Return the number of updates of the run with the settings of ``config``."""
    return 0 if is_other(run, config) else updates_done(run.folder)


def started(run: Run, attempt: str) -> bool:
    """Say whether a worker has begun this attempt at the run."""
    return read_json(run.folder / WORKER).get("attempt") == attempt


def updates_done(folder: Path) -> int:
    """Return the number of updates in the last row of the metrics, at most ``log_every`` behind."""
    last = _last_line(folder / run_folder.METRICS).partition(",")[0]
    return int(last) if last.isdecimal() else 0


def latest_success(folder: Path) -> float | None:
    """Return the success rate of the last evaluation, None before the first."""
    cells = _last_line(folder / run_folder.EVALUATION).split(",")
    try:
        return float(cells[2])
    except (IndexError, ValueError):  # none yet, or the header
        return None


def checkpoint_stamp(job: Job) -> tuple[int, ...]:
    """Return the times of the checkpoints of a job, which change with each new checkpoint."""
    paths = [run.folder / run_folder.CHECKPOINT for run in job.runs]
    return tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in paths)


def rows(run: Run) -> list[Row]:
    """Make a row for each evaluation of a finished run, in the format of the benchmarks.

    Raises:
        ValueError: a file of the run is damaged.
        OSError: a file cannot be read.
    """
    result = read_folder(run.folder)
    return [
        {
            "task": run.task,
            "agent": run.agent,
            "seed": run.seed,
            "step": step,
            "phase": PHASES[phase],
            "success": success,
            "episodes": episodes,
            "return": result.returns[step, phase],
            "hours": read_json(run.folder / FINISHED).get("hours"),
            "device": result.settings.get("device"),
            "preset": result.settings.get("preset"),
        }
        for (step, phase), (success, episodes) in sorted(result.rates.items())
    ]


def collect(path: Path, finished: Iterable[Run]) -> list[Row]:
    """Write the rows of finished runs into ``path``, and keep its rows of other runs.

    Raises:
        ValueError: ``path`` or a file of a run is damaged.
        OSError: a file cannot be read or written.
    """
    new = {(run.task, run.agent, run.seed): rows(run) for run in finished}
    collected = [row for row in _read_rows(path) if _key(row) not in new]
    collected += [row for key in new for row in new[key]]
    collected.sort(key=lambda row: [str(part).rjust(9) for part in _key(row)])  # seed 2, seed 10
    write_json(path, collected, "results")
    return collected


def read_json(path: Path) -> Mapping[str, Any]:
    """Read the JSON object in ``path``; empty if there is none or it cannot be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"results: {path} is not JSON: {error}") from None
    if not (isinstance(content, list) and all(isinstance(row, dict) for row in content)):
        raise ValueError(f"results: {path} must hold a list of rows")
    return content


def _key(row: Row) -> tuple[Any, ...]:
    return row.get("task"), row.get("agent"), row.get("seed")


def _last_line(path: Path) -> str:
    """Read the last complete line of a table that another process may be writing; '' if none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return text[: text.rfind("\n") + 1].rstrip("\n").rpartition("\n")[2]
