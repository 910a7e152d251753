"""Runs of the experiments: their data, their training, and the rows of their evaluations."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from applications.rl import (
    AgentConfig,
    DataConfig,
    TrainConfig,
    Trained,
    find_task,
    generate,
    preset,
    run_folder,
    train,
)
from benchmarks.common.records import RESULTS
from benchmarks.rl.experiments import PATHS, Experiment, experiments

Row = dict[str, str | int | float]


@dataclass(frozen=True)
class BenchmarkConfig:
    """Train the agents, evaluate them, and record every evaluation."""

    suites: tuple[str, ...] = ("pointmaze", "temperature", "kernels", "online", "paths", "cube")
    """Suites of experiments to run."""
    agents: tuple[str, ...] = ()
    """Agents to run, all of the suites if not given."""
    tasks: tuple[str, ...] = ()
    """Tasks to run, by the beginning of their names; all of the suites if not given."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each agent."""
    workers: int = 2
    """Number of processes, one thread each."""
    folder: Path = Path("outputs/benchmark-rl")
    """Folder of data and runs."""
    output: Path = RESULTS / "rl.json"
    """File of the rows, to which missing ones are added; for the suite ``agents`` the same name
    with _agents at its end, so rl_agents.json."""

    @property
    def record(self) -> Path:
        """File of the rows.

        Raises:
            ValueError: the suite ``agents`` is run together with others.
        """
        if "agents" not in self.suites:
            return self.output
        if len(self.suites) > 1:
            raise ValueError(f"suites must be agents alone, or without it, got {self.suites}")
        return self.output.with_name(f"{self.output.stem}_agents{self.output.suffix}")


def data_folder(config: BenchmarkConfig, experiment: Experiment) -> Path:
    """Return the folder of the data of an experiment."""
    return config.folder / f"data-{experiment.transitions}"


def make_data(config: BenchmarkConfig, experiment: Experiment) -> None:
    """Make the data of an experiment unless they exist."""
    generate(
        DataConfig(
            task=experiment.task,
            transitions=experiment.transitions,
            workers=config.workers,
            folder=data_folder(config, experiment),
        )
    )


def behaviour_folder(config: BenchmarkConfig, experiment: Experiment) -> Path:
    """Return the run of ``bc`` whose behaviour the agents of the suite ``agents`` start from."""
    cloned = replace(experiment, agent="bc", behaviour=False, options={})
    return config.folder / cloned.folder / "seed0"


def agent_options(experiment: Experiment) -> AgentConfig:
    """Return the options of the agent: those of the preset ``small``, with the changes."""
    options = preset(experiment.agent, find_task(experiment.task), "small")
    return replace(options, **experiment.options)


def train_config(
    config: BenchmarkConfig, experiment: Experiment, seeds: Sequence[int]
) -> TrainConfig:
    """Return the configuration that trains ``seeds`` of an experiment."""
    return TrainConfig(
        task=experiment.task,
        agent=experiment.agent,
        preset="small",
        options=agent_options(experiment),
        seeds=tuple(seeds),
        offline_steps=experiment.offline,
        online_steps=experiment.online,
        start_training=1000,
        data=data_folder(config, experiment),
        eval_every=experiment.eval_every,
        eval_episodes=experiment.episodes,
        checkpoint_every=500,
        log_every=100,
        folder=config.folder / experiment.folder,
        resume=True,
        threads=1,
        behaviour=behaviour_folder(config, experiment) if experiment.behaviour else None,
        stacked=len(seeds),
        **{"device": "cpu", **PATHS[experiment.path]},
    )


def run(config: BenchmarkConfig, experiment: Experiment, seeds: Sequence[int]) -> list[Row]:
    """Train or continue ``seeds`` of an experiment; return a row for each evaluation."""
    ended = train(train_config(config, experiment, seeds))
    return [row for trained in ended for row in read_rows(experiment, trained)]


def read_rows(experiment: Experiment, trained: Trained) -> list[Row]:
    """Return a row for each evaluation of a finished run."""
    with (trained.folder / run_folder.EVALUATION).open(newline="") as file:
        found = list(csv.DictReader(file))
    return [
        {
            "task": experiment.task,
            "agent": experiment.agent,
            "seed": trained.seed,
            "step": int(row["step"]),
            "phase": row["phase"],
            "success": float(row["success"]),
            "episodes": int(row["episodes"]),
            "hours": trained.seconds / 3600,
            "device": experiment.device,
            "preset": experiment.preset,
        }
        for row in found
    ]


def key(row: Row) -> tuple[object, ...]:
    """Return the columns that identify the run of a row."""
    return tuple(row[name] for name in ("task", "agent", "preset", "seed"))


def pending(config: BenchmarkConfig, rows: list[Row]) -> list[tuple[Experiment, list[int]]]:
    """Return the missing jobs: an experiment, and the seeds that one process trains."""
    done = {key(row) for row in rows}
    chosen = [
        e
        for e in experiments()
        if e.agent in (config.agents or (e.agent,)) and e.task.startswith(config.tasks or ("",))
    ]
    jobs: list[tuple[Experiment, list[int]]] = []
    for experiment in chosen:
        if experiment.suite not in config.suites:
            continue
        if experiment.device == "cuda" and not torch.cuda.is_available():
            continue
        about = (experiment.task, experiment.agent, experiment.preset)
        seeds = [seed for seed in config.seeds if (*about, seed) not in done]
        if experiment.path != "plain":
            jobs += [(experiment, seeds)] if seeds else []
        else:
            jobs += [(experiment, [seed]) for seed in seeds]
    return jobs
