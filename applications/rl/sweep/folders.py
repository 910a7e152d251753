"""What the folder of a run tells while a sweep goes on; also across machines that share it.

Beside the files of `applications.rl.run_folder`, a worker of a sweep writes

    worker.json      the attempt, host, node and process that have the run, or had it last
    finished.json    settings, updates and hours of a run that is done
    error.txt        traceback of the last failure, until the run is done

A run whose finished.json has the settings of the plan is left alone.  In any other case it is
handed to training, which continues it, finds it done, or refuses it as one of other settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
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
"""Bytes at the end of a table that surely hold its last two lines."""
Row = dict[str, Any]


def settings(config: TrainConfig) -> dict[str, Any]:
    """What a finished run must have in common with the plan, as JSON gives it back."""
    shared = {k: v for k, v in asdict(config).items() if k not in (*EXECUTION_OPTIONS, "seeds")}
    return json.loads(json.dumps(shared, default=str))


@dataclass(frozen=True)
class Work:
    """What is left of a plan.

    Attributes:
        jobs: without the runs that are finished.
        states: of the runs that are over before anything starts: finished, or refused.
        configs: how each run is trained.
    """

    jobs: tuple[Job, ...]
    states: Mapping[Run, State]
    configs: Mapping[Run, TrainConfig]

    @classmethod
    def of(cls, plan: Plan) -> Work:
        """What the folders say that is left."""
        configs = {run: job.config for job in plan.jobs for run in job.runs}
        states = {run: State("done") for run in configs if is_finished(run, configs[run])}
        states |= {run: State("failed", note) for run, note in plan.refused.items()}
        left = [(job, [run for run in job.runs if run not in states]) for job in plan.jobs]
        configs |= dict.fromkeys(plan.refused, plan.jobs[0].config)
        return cls(tuple(job.only(runs) for job, runs in left if runs), states, configs)

    def updates(self, job: Job) -> int:
        """Updates that a job has still to do."""
        whole = job.config.phases.updates
        return sum(max(0, whole - updates_done(run.folder)) for run in job.runs)


def write_finished(folder: Path, config: TrainConfig, hours: float | None) -> None:
    """Note that the run in ``folder`` is done.

    Arguments:
        hours: of the process that trained it to its end; None if it was found done.
    """
    (folder / ERROR).unlink(missing_ok=True)
    if hours is None:  # it may be known from before
        hours = read_json(folder / FINISHED).get("hours")
    content = {"settings": settings(config), "updates": config.phases.updates, "hours": hours}
    write_json(folder / FINISHED, content)


def is_finished(run: Run, config: TrainConfig) -> bool:
    """Whether the run is done and was what it is to be."""
    return read_json(run.folder / FINISHED).get("settings") == settings(config)


def started(run: Run, attempt: str) -> bool:
    """Whether a worker has begun this attempt at the run."""
    return read_json(run.folder / WORKER).get("attempt") == attempt


def updates_done(folder: Path) -> int:
    """Updates by the last row of the metrics, of which there is one in ``log_every``."""
    last = _last_line(folder / run_folder.METRICS).partition(",")[0]
    return int(last) if last.isdecimal() else 0


def latest_success(folder: Path) -> float | None:
    """Success of the last evaluation, None before the first."""
    cells = _last_line(folder / run_folder.EVALUATION).split(",")
    try:
        return float(cells[2])
    except (IndexError, ValueError):  # none yet, or the header
        return None


def checkpoint_stamp(job: Job) -> tuple[int, ...]:
    """Changes when a run of the job has written another checkpoint."""
    paths = [run.folder / run_folder.CHECKPOINT for run in job.runs]
    return tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in paths)


def rows(run: Run) -> list[Row]:
    """A row for each evaluation of a finished run, as benchmarks write them.

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
    """Write the rows of ``finished`` into ``path`` beside those of other runs that it has.

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
    """The object in ``path``, empty if there is none or it cannot be read."""
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
    """The last complete line of a table that another process may be writing; '' if none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return text[: text.rfind("\n") + 1].rstrip("\n").rpartition("\n")[2]
