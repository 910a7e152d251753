"""Do the agents learn?  Point maze and cube-single, several seeds each, with learning curves.

    python -m benchmarks.rl --suites pointmaze          # three seeds of four agents
    python -m benchmarks.rl                             # everything; hours on two cores

``pointmaze``    BC, FQL, QAM and QAM-F;
``temperature``  QAM with a τ ten times too low and ten times too high;
``kernels``      QAM with the most exact kernel against the published one, at K = 5 and 10;
``online``       QAM offline on five episodes of data, then online;
``paths``        QAM with many evaluations while it learns, by each path of execution in `PATHS`;
                 the paths of a GPU are run where there is one;
``cube``         BC, FQL, QAM and QAM-F on cube-single, and QAM with the most exact kernel.

A stopped run continues from its checkpoint, and a run whose rows are in the record is not repeated.
Each evaluation is a row {task, agent, seed, step, phase, success, episodes, hours, device, preset}
of ``results/rl.json``; ``preset`` names the changes to the preset ``small``, and ``hours`` is the
wall time of the process that finished the run, evaluations included, on a machine that was shared
with others.  The curves are drawn by

    python -m applications.rl report benchmarks/results/rl.json --by agent preset
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from applications.rl import (
    DataConfig,
    TrainConfig,
    Trained,
    find_task,
    generate,
    preset,
    run_folder,
    train,
)
from benchmarks.common.jobs import completed
from benchmarks.common.records import RESULTS
from flows.training import write_json

MAZE = "pointmaze-medium-navigate-singletask-task1-v0"
CUBE = "cube-single-play-singletask-task1-v0"
AGENTS = ("bc", "fql", "qam", "qam-f")
Row = dict[str, str | int | float]

FAST = {"compile": True, "background_eval": True}
PATHS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fast": FAST,
    "fast bfloat16": {**FAST, "precision": "bfloat16"},
    "graph": {"compile": True, "cuda_graphs": 10, "device": "cuda"},
    "graph tf32": {"compile": True, "cuda_graphs": 10, "device": "cuda", "precision": "tf32"},
    "graph bfloat16": {
        "compile": True,
        "cuda_graphs": 10,
        "device": "cuda",
        "precision": "bfloat16",
    },
}
"""Options of each path of execution; every path but ``plain`` trains all seeds stacked."""


@dataclass(frozen=True)
class Experiment:
    """One agent on one task, to be run with several seeds.

    Attributes:
        suite: name of the suite of experiments.
        task, agent: names in `applications.rl`.
        options: options of the agent that differ from the preset ``small``.
        offline, online: number of steps of each phase.
        transitions: size of the data.
        eval_every, episodes: steps between evaluations, and episodes of each.
        path: name of the path of execution, in `PATHS`.
    """

    suite: str
    task: str
    agent: str
    options: Mapping[str, Any] = field(default_factory=dict)
    offline: int = 5000
    online: int = 0
    transitions: int = 300_000
    eval_every: int = 1000
    episodes: int = 25
    path: str = "plain"

    @property
    def preset(self) -> str:
        """Name of the preset, followed by the changes to it."""
        changes = [f"{name}={value}" for name, value in self.options.items()]
        if self.suite == "online":
            changes.append(f"transitions={self.transitions}")
        if self.suite == "paths":
            changes.append(self.path)
        return " ".join(["small", *changes])

    @property
    def device(self) -> str:
        """Device of the training."""
        return PATHS[self.path].get("device", "cpu")

    @property
    def folder(self) -> Path:
        """Folder of the experiment's runs, relative to the folder of the benchmark."""
        return Path(self.task) / self.agent / self.preset.replace(" ", ",")


def experiments() -> list[Experiment]:
    """Return all experiments, in the order in which they are run."""
    maze = [Experiment("pointmaze", MAZE, agent) for agent in AGENTS]
    temperatures = [
        Experiment("temperature", MAZE, "qam", {"inverse_temperature": tau}) for tau in (0.1, 10.0)
    ]
    kernels = [
        Experiment("kernels", MAZE, "qam", {"kernel": kernel, "flow_steps": steps}, offline=3000)
        for steps in (5, 10)
        for kernel in ("moment_matched", "euler_published")
        if (kernel, steps) != ("euler_published", 5)  # the preset itself
    ]
    online = [Experiment("online", MAZE, "qam", offline=3000, online=9000, transitions=5000)]
    paths = [
        Experiment("paths", MAZE, "qam", offline=1500, eval_every=250, path=path) for path in PATHS
    ]
    cube = [
        Experiment(
            "cube", CUBE, agent, offline=30_000, transitions=200_000, eval_every=5000, episodes=20
        )
        for agent in AGENTS
    ]
    cube.append(replace(cube[2], options={"kernel": "moment_matched"}))
    return maze + online + temperatures + kernels + paths + cube


@dataclass(frozen=True)
class BenchmarkConfig:
    """Train the agents, evaluate them, and record every evaluation."""

    suites: tuple[str, ...] = ("pointmaze", "temperature", "kernels", "online", "paths", "cube")
    """Suites of experiments to run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each agent."""
    workers: int = 2
    """Number of processes, one thread each."""
    folder: Path = Path("outputs/benchmark-rl")
    """Folder of data and runs."""
    output: Path = RESULTS / "rl.json"
    """File of the rows; missing rows are added to it."""


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


def train_config(
    config: BenchmarkConfig, experiment: Experiment, seeds: Sequence[int]
) -> TrainConfig:
    """Return the configuration that trains ``seeds`` of an experiment."""
    options = preset(experiment.agent, find_task(experiment.task), "small")
    return TrainConfig(
        task=experiment.task,
        agent=experiment.agent,
        preset="small",
        options=replace(options, **experiment.options),
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
    jobs: list[tuple[Experiment, list[int]]] = []
    for experiment in experiments():
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


def summary(rows: list[Row]) -> str:
    """Return a table of success at the last step: mean and range over the seeds."""
    last: dict[tuple[object, ...], Row] = {}
    for row in rows:
        if key(row) not in last or row["step"] > last[key(row)]["step"]:  # type: ignore[operator]
            last[key(row)] = row
    lines = []
    for group in dict.fromkeys((row["task"], row["agent"], row["preset"]) for row in rows):
        own = [row for row in last.values() if (row["task"], row["agent"], row["preset"]) == group]
        values = [100 * float(row["success"]) for row in own]
        mean, low, high = sum(values) / len(values), min(values), max(values)
        where = f"{group[0]:<46} {group[1]:<6} {group[2]:<40}"
        lines.append(f"{where} {mean:5.1f} % [{low:.0f}, {high:.0f}], {len(values)} seeds")
    return "\n".join(lines)


def main(config: BenchmarkConfig) -> None:
    """Run the missing jobs and print the table."""
    rows: list[Row] = json.loads(config.output.read_text()) if config.output.exists() else []
    jobs = pending(config, rows)
    for experiment in {(job.task, job.transitions): job for job, _ in jobs}.values():
        make_data(config, experiment)
    calls = [(config, *job) for job in jobs]
    for new in completed(run, calls, workers=config.workers, name="runs"):
        rows += new
        write_json(config.output, rows)
    print(summary(rows))


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig, prog="python -m benchmarks.rl", description=__doc__))
