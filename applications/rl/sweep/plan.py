"""The plan of a sweep: its runs, how they are packed into jobs, and how long they take.

A run is one seed of one agent on one task; its folder is the one that `train` would write,
``FOLDER/TASK/AGENT/seedN``.  A job is the work of one worker: some seeds of one agent on one task.
Jobs are ordered by their seeds first, so that a sweep that is stopped half-way has some seeds of
every task rather than every seed of some.

Cost.  Where a job makes r updates a second and D devices hold D/g jobs at a time (each taking g of
a device), jobs start in order, each as soon as there is room; the sweep takes until the last job
ends.  Device-hours count the shares of devices that jobs take, without idle time.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from applications.rl.agents import find_agent
from applications.rl.agents.base import AgentConfig
from applications.rl.agents.behaviour import has_behaviour
from applications.rl.agents.chain_kernel import kernel_identity
from applications.rl.agents.domains import DOMAINS
from applications.rl.agents.presets import preset
from applications.rl.environments.tasks import ENVIRONMENTS, TASK_NUMBERS, find_task
from applications.rl.report.published import SPARSE
from applications.rl.training.behaviour import check_behaviours_exist
from applications.rl.training.config import TrainConfig, folder_name
from applications.rl.training.weights import check_weights_exist

PUBLISHED = "published"
"""Word that stands for the tasks of the published table."""


@dataclass(frozen=True)
class Run:
    """One seed of an agent on a task.

    Attributes:
        task, agent, seed: task, agent and seed of the run.
        folder: folder of the run.
    """

    task: str
    agent: str
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.task} {self.agent} seed {self.seed}"


@dataclass(frozen=True)
class Job:
    """The work of one worker: it trains the seeds of ``config``."""

    config: TrainConfig

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs of the job, one for every seed."""
        config = self.config
        return tuple(
            Run(config.task, config.agent, seed, config.path / f"seed{seed}")
            for seed in config.seeds
        )

    def only(self, runs: Iterable[Run]) -> Job:
        """Return a job of some of the runs."""
        return Job(replace(self.config, seeds=tuple(run.seed for run in runs)))


@dataclass(frozen=True)
class State:
    """The state of a run in a sweep.

    Attributes:
        name: ``submitted`` (also while it runs), ``done`` or ``failed``.
        note: reason of a failure, one line.
        attempt: identifier of the submission.
        deaths: number of workers that the run has lost in this sweep.
    """

    name: str = "submitted"
    note: str = ""
    attempt: str = ""
    deaths: int = 0


@dataclass(frozen=True)
class Plan:
    """The jobs of a sweep, and the runs that cannot start.

    Attributes:
        jobs: jobs in the order in which they start.
        refused: runs of tasks that do not exist, with the error of the task's name.
    """

    jobs: tuple[Job, ...]
    refused: Mapping[Run, str]

    @property
    def runs(self) -> tuple[Run, ...]:
        """All runs, with the refused ones at the end."""
        return (*(run for job in self.jobs for run in job.runs), *self.refused)


def published_tasks() -> tuple[str, ...]:
    """List the 50 tasks of the published table: five goals in each of ten domains."""
    return tuple(
        f"{domain}{'-sparse' * (domain in SPARSE)}-{ENVIRONMENTS[domain].kinds[0]}-singletask-"
        f"task{number}-v0"
        for domain in DOMAINS
        for number in TASK_NUMBERS
    )


def make_plan(
    setting: TrainConfig,
    *,
    tasks: Sequence[str],
    agents: Sequence[str],
    seeds: Sequence[int],
    seeds_per_job: int,
    folder: Path,
    kernel: str | None = None,
) -> Plan:
    """Plan the runs of agents × tasks × seeds.

    Arguments:
        setting: options that all runs share; its task, agent, seeds and folder are replaced.
        tasks: names of tasks; ``published`` stands for `published_tasks`.
        agents: names of agents.
        seeds: seeds of each agent and task.
        seeds_per_job: number of seeds of one (agent, task) that one worker trains.
        folder: folder that holds the folders of the tasks.
        kernel: kernel of all agents; None for that of their presets.

    Raises:
        ValueError: an agent, preset or kernel is unknown, an agent has no kernel, a name is there
            twice, or no task exists.
        FileNotFoundError: there is no run at the behaviour of a task.
    """
    for name in agents:
        known = {option.name for option in fields(find_agent(name).config_class)}
        if kernel is not None and "kernel" not in known:
            raise ValueError(f"kernel must not be given with agent {name!r}, which has none")
    named: list[str] = []
    unknown: dict[str, str] = {}
    for word in tasks:
        for name in published_tasks() if word == PUBLISHED else (word,):
            try:
                task = find_task(name)
            except ValueError as error:
                unknown[name] = " ".join(str(error).split())
            else:
                named.append(task.name)
                for agent in agents:
                    kernel_identity(_options(agent, task.name, setting.preset, kernel))
    for what, names in (("agents", agents), ("tasks", named)):
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"{what}: {twice[0]!r} is there twice")
    if not agents or not named:
        raise ValueError(next(iter(unknown.values()), "tasks and agents: name at least one"))

    settings = {agent: _setting(setting, agent) for agent in agents}

    def jobs(names: Sequence[str]) -> list[Job]:
        return [
            Job(
                replace(
                    settings[agent],
                    task=task,
                    agent=agent,
                    seeds=tuple(seeds[start : start + seeds_per_job]),
                    folder=folder.absolute() / folder_name(task) / folder_name(agent),
                    options=None
                    if kernel is None or task in unknown
                    else _options(agent, task, setting.preset, kernel),
                )
            )
            for start in range(0, len(seeds), seeds_per_job)
            for task in names
            for agent in agents
        ]

    planned = jobs(named)
    for job in planned:
        check_behaviours_exist(job.config)
        check_weights_exist(job.config)
    refused = {run: unknown[run.task] for job in jobs([*unknown]) for run in job.runs}
    return Plan(tuple(planned), refused)


def _setting(setting: TrainConfig, agent: str) -> TrainConfig:
    """Return the setting for an agent: without a behaviour if the agent has no behaviour flow."""
    if setting.behaviour is None or has_behaviour(agent):
        return setting
    return replace(setting, behaviour=None, freeze_behaviour=False)


def _options(agent: str, task: str, source: str, kernel: str | None) -> AgentConfig:
    """Return the options of an agent for a task, with another kernel if one is given.

    Raises:
        ValueError: the preset is unknown, or the kernel is no name of one.
    """
    options: Any = preset(agent, find_task(task), source)  # of which not all have a kernel
    return options if kernel is None else replace(options, kernel=kernel)


def slots(devices: float, share: float) -> int:
    """Count the jobs that run at a time on ``devices`` if each takes a ``share`` of a device."""
    if share >= 1:
        return int(devices // share)
    return int(devices) * int(1 / share + 1e-9)  # a job does not lie across two devices


def makespan(seconds: Sequence[float], places: int) -> float:
    """Compute when the last job ends if jobs start in order, each in the first free place."""
    ends = [0.0] * places
    for duration in seconds:
        heapq.heappush(ends, heapq.heappop(ends) + duration)
    return max(ends)


def duration(seconds: float) -> str:
    """Write a duration in two units: 42 s, 3 min 20 s, 5 h 10 min, 3 d 4 h."""
    seconds = round(seconds)
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    for (name, size), (lower, small) in pairwise(units):
        if seconds >= size:
            rest = seconds % size // small
            return f"{seconds // size} {name}" + (f" {rest} {lower}" if rest else "")
    return f"{seconds} s"
