"""The plan says before the work what is done, what is left, and how long it should take.

Times of an update are read from the records of `benchmarks.speed`.  Stacked seeds on a GPU were
measured in TF32 with one and with eight seeds; other numbers of seeds, and other precisions, are
taken to grow in the same proportion, linearly.  Times of the experts and the environment were
measured on one core (AMD, 2026).  They are estimates: a busy or slower machine takes longer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from applications.rl.report.published import OFFLINE_STEPS
from benchmarks.common.records import RESULTS
from benchmarks.reproduce.config import EVERY, ReproduceConfig

EXPERT = 330.0
"""Transitions a second that an expert makes on one core."""
FILES = 25_000.0
"""Transitions a second that are compressed, checked and read."""
ENVIRONMENT = 380.0
"""Steps a second of the scene on one core."""
ACT = 0.006
"""Seconds in which a published policy chooses 16 chunks of actions on one core."""
LIMIT, CHUNK, ROWS = 750, 5, 16
"""Steps of the longest episode, and of a chunk of actions; rows of a batch of observations."""
PROCESS = 8.0
"""Seconds in which a process starts with its environment."""
COMPILE = {"cuda": 75.0, "cpu": 45.0}
"""Seconds in which a loss is compiled, and recorded as a CUDA graph."""
QUICK_UPDATE = 0.03
"""Seconds of an update of one tiny agent on one core."""
AIM = 15.0
"""Minutes for which the plan says which published step can be reached."""


@dataclass(frozen=True)
class Plan:
    """Holds the estimated seconds of the parts of a run.

    Attributes:
        data: making the data.
        start: what a training takes before its first update, in each call.
        step: one update of all seeds of a task.
        evaluation: one evaluation of one seed in which no episode succeeds early.
        seeds, tasks: number of seeds and of tasks.
    """

    data: float
    start: float
    step: float
    evaluation: float
    seeds: int
    tasks: int

    def training(self, updates: int) -> float:
        """Return the seconds of ``updates`` of a task with the last evaluations of its seeds.

        Earlier evaluations are played in the background.
        """
        return self.start + updates * self.step + self.closing

    @property
    def closing(self) -> float:
        """Return the seconds of the last evaluation of each seed, which a training waits for."""
        return self.seeds * self.evaluation

    def whole(self, updates: int) -> float:
        """Return the seconds of everything, with ``updates`` of each task."""
        return self.data + self.tasks * self.training(updates)

    def reachable(self, seconds: float) -> int:
        """Return the last published step that all tasks reach in so many seconds, 0 if none."""
        steps = range(EVERY, OFFLINE_STEPS + 1, EVERY)
        return max((step for step in steps if self.whole(step) <= seconds), default=0)


def estimate(config: ReproduceConfig) -> Plan:
    """Estimate the seconds of a run on this machine."""
    rows = 1.1 * config.size
    workers = config.training(config.tasks[0]).workers
    players = max(1, workers)
    episodes = 1 if config.quick else config.episodes
    rounds = -(-episodes // players)
    together = 1 if workers else min(4, episodes)  # environments of one process take turns
    blocks = -(-players // ROWS)
    chunk = CHUNK / ENVIRONMENT + blocks * (0.0 if config.quick else ACT) / together
    return Plan(
        data=PROCESS + rows / (EXPERT * config.cores) + rows / FILES,
        start=2 * PROCESS + (0.0 if config.quick else COMPILE["cuda" if config.on_gpu else "cpu"]),
        step=step_seconds(config),
        evaluation=rounds * LIMIT / CHUNK * chunk,
        seeds=len(config.seeds),
        tasks=len(config.tasks),
    )


def step_seconds(config: ReproduceConfig) -> float:
    """Return the seconds of an update of all seeds together, as recorded on an H200 or one core."""
    seeds = len(config.seeds)
    if config.quick:
        return QUICK_UPDATE * seeds
    if not config.on_gpu:
        return seeds * _recorded("speed.json", "update, compiled", 1)
    one = _recorded("speed_h200_tf32.json", "update, graph, tf32", 1)
    eight = _recorded("speed_h200_tf32.json", "update, graph, tf32", 8)
    if config.exactness == "bfloat16":
        alone = _recorded("speed_h200_bfloat16.json", "update, graph, bfloat16", 1)
    else:
        alone = one
    return alone * (1 + (seeds - 1) * (eight / one - 1) / 7)


def _recorded(file: str, name: str, seeds: int) -> float:
    rows: list[dict[str, Any]] = json.loads((RESULTS / file).read_text())
    found = [row for row in rows if (row["name"], row["seeds"]) == (name, seeds)]
    return float(found[0]["ms_per_update"]) / 1000


def show(config: ReproduceConfig, *, has_data: bool, done: dict[int, int]) -> str:
    """Return the plan as a text.

    Arguments:
        config: the options.
        has_data: whether the data are complete.
        done: updates done by number of the task.
    """
    plan = estimate(config)
    where = torch.cuda.get_device_name() if config.on_gpu else "the CPU"
    seeds = f"{len(config.seeds)} seed" + "s" * (len(config.seeds) > 1)
    lines = [
        f"{'QAM, tiny (a trial)' if config.quick else 'QAM, published size'}, on {where} "
        f"({config.exactness}), {config.cores} cores; {seeds}, {config.last} updates",
        f"{'part':<44}{'minutes':>8}",
    ]
    left = 0.0 if has_data else plan.data
    lines.append(_line(f"data: {config.size} transitions", None if has_data else plan.data))
    for number in config.tasks:
        missing = config.last - done.get(number, 0)
        seconds = plan.training(missing) if missing else None
        left += seconds or 0.0
        lines.append(
            _line(f"task {number}: {missing} updates, {1 / plan.step:.3g} a second", seconds)
        )
    lines.append(_line("left", left))
    if not config.quick:
        step = plan.reachable(60 * AIM)
        reach = (
            f"step {step} of the published curves" if step else "no step of the published curves"
        )
        lines.append(f"from the beginning, all tasks reach {reach} in {AIM:.0f} minutes")
    pieces = f"stops after {config.minutes:g} minutes" if config.minutes else "runs to the end"
    lines.append(f"this call {pieces}; the same command continues")
    return "\n".join(lines)


def _line(name: str, seconds: float | None) -> str:
    return f"{name:<44}{'done' if seconds is None else f'{seconds / 60:.1f}':>8}"
