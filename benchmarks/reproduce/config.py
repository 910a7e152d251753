"""This file defines the options of `benchmarks.reproduce` and the trainings they stand for."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from applications.rl import TrainConfig, find_task, preset
from applications.rl.report.published import OFFLINE_STEPS
from benchmarks.common.records import RESULTS
from flows.training import choose_device

AGENT, METHOD = "qam", "QAM"
"""The agent's name here and in the published table."""
PUBLISHED_TRANSITIONS = 1_000_000
"""Transitions of the published data of scene-play."""
PUBLISHED_EPISODES = 50
"""Episodes of a published evaluation."""
EVERY = 50_000
"""Updates between two points of the published curves."""
GRAPH = 10
"""Updates in a CUDA graph."""
QUICK_STEPS, QUICK_EVERY, QUICK_TRANSITIONS = 40, 20, 2000
RECORD = RESULTS / "reproduce.json"


@dataclass(frozen=True)
class ReproduceConfig:
    """Train the published QAM on tasks of the scene, and compare with the published success.

    The same command continues what is unfinished, until data, trainings and evaluations are done.
    """

    tasks: tuple[int, ...] = (1, 2)
    """Numbers of the tasks of the scene, from 1 to 5; rewards are sparse, as published."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each task, trained together; the published runs have 12."""
    steps: int = 100_000
    """Updates of each training, a multiple of 50000, the distance of the published points."""
    transitions: int = PUBLISHED_TRANSITIONS
    """Transitions of the data, which OGBench's experts make; fewer are another setting."""
    episodes: int = PUBLISHED_EPISODES
    """Episodes of an evaluation of one seed."""
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """Precision of matrix products: auto is bfloat16 on a GPU and float32 on a CPU."""
    minutes: float = 0.0
    """Minutes after which this call stops with checkpoints, so that the next one continues; 0 sets
    no limit."""
    dry_run: bool = False
    """Print the plan with the estimated times, and do nothing."""
    quick: bool = False
    """Try the whole path with tiny networks, few transitions and few updates; no reproduction."""
    workers: int = 0
    """Processes that make the data and play the evaluations; 0 stands for one per core."""
    device: str = "auto"
    """Device of the training: cpu, cuda, or auto, which is cuda where there is one."""
    folder: Path = Path("outputs/reproduce")
    """Folder of data and runs; --quick has a folder of its own in it."""
    output: Path = RECORD
    """File of the rows; --quick writes into its folder unless another file is named."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            ValueError: naming the option, its value and what was expected.
        """
        if not self.tasks or not {*self.tasks} <= {1, 2, 3, 4, 5}:
            raise ValueError(f"tasks must be numbers from 1 to 5, got {self.tasks}")
        if not self.seeds:
            raise ValueError("seeds must hold at least one number, got none")
        if not 0 < self.steps <= OFFLINE_STEPS or self.steps % EVERY:
            raise ValueError(
                f"steps must be a multiple of {EVERY} up to {OFFLINE_STEPS}, got {self.steps}"
            )
        for name, least in (("transitions", 1000), ("episodes", 1), ("workers", 0), ("minutes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def home(self) -> Path:
        """Return the folder that holds data, runs and times."""
        return self.folder / ("quick" if self.quick else "full")

    @property
    def data(self) -> Path:
        """Return the folder that holds the data."""
        return self.home / f"data-{self.size}"

    @property
    def record(self) -> Path:
        """Return the file of the rows, which for a quick run is never the committed record."""
        return self.home / RECORD.name if self.quick and self.output == RECORD else self.output

    @property
    def size(self) -> int:
        """Return the number of transitions of the training data."""
        return min(self.transitions, QUICK_TRANSITIONS) if self.quick else self.transitions

    @property
    def every(self) -> int:
        """Return the number of updates between two evaluations."""
        return QUICK_EVERY if self.quick else EVERY

    @property
    def last(self) -> int:
        """Return the number of updates of a finished training."""
        return QUICK_STEPS if self.quick else self.steps

    @property
    def cores(self) -> int:
        """Return the number of processes that play at a time."""
        if self.workers:
            return self.workers
        if hasattr(os, "sched_getaffinity"):  # on Linux: the cores of this process
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1

    @property
    def on_gpu(self) -> bool:
        """Say whether the training runs on a GPU."""
        return choose_device(self.device).type == "cuda"

    @property
    def exactness(self) -> Literal["float32", "tf32", "bfloat16"]:
        """Return the precision of matrix products, with ``auto`` resolved."""
        if self.precision != "auto":
            return self.precision
        return "bfloat16" if self.on_gpu else "float32"

    def task(self, number: int) -> str:
        """Return the name of a task."""
        return f"scene-sparse-play-singletask-task{number}-v0"

    def differences(self) -> list[str]:
        """Return what makes these runs a trial, not a reproduction of the published ones."""
        found = ["tiny networks and a few updates"] if self.quick else []
        if self.size < PUBLISHED_TRANSITIONS:
            found.append(f"{self.size} instead of {PUBLISHED_TRANSITIONS} transitions")
        return found

    def training(self, number: int) -> TrainConfig:
        """Return the training of all seeds of a task."""
        task = self.task(number)
        name = "small" if self.quick else "published"
        options = preset(AGENT, find_task(task), name)
        if self.quick:
            options = replace(options, hidden=(32, 32), flow_steps=3)
        players = self.cores - 1 if self.cores > 2 else 0
        return TrainConfig(
            task=task,
            agent=AGENT,
            preset=name,
            options=options,
            seeds=self.seeds,
            stacked=len(self.seeds),
            offline_steps=self.last,
            batch_size=32 if self.quick else 256,
            data=self.data,
            eval_every=self.every,
            eval_episodes=1 if self.quick else self.episodes,
            workers=min(players, 16),
            background_eval=True,
            checkpoint_every=self.every if self.quick else 5000,
            log_every=self.every if self.quick else 500,
            folder=self.home / f"runs-{self.size}" / task,
            resume=True,
            device=self.device,
            threads=1 if self.quick else 0,
            compile=not self.quick,
            cuda_graphs=GRAPH if self.on_gpu else 0,
            precision=self.exactness,
        )
