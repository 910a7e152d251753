"""The experiments of the benchmark: which agent learns which task, with which options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from applications.rl import AGENTS
from applications.rl.agents.behaviour import has_behaviour

MAZE = "pointmaze-medium-navigate-singletask-task1-v0"
CUBE = "cube-single-play-singletask-task1-v0"
SCENE = "scene-sparse-play-singletask-task1-v0"
PUZZLE = "puzzle-3x3-sparse-play-singletask-task1-v0"
FIRST = ("bc", "fql", "qam", "qam-f")
"""Agents of the suites ``pointmaze`` and ``cube``."""

LEADING = tuple(a for a in ("qam", "trqam", "sqam", "rql", "fql", "qam-x") if a in AGENTS)
"""Agents of the suite ``agents`` on all four tasks."""
ONLINE = ("rlpd",)
"""Agents that learn online alone, and are not in the suite ``agents``."""

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
        behaviour: start from the behaviour that the first seed of ``bc`` has cloned on the task.
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
    behaviour: bool = False

    @property
    def preset(self) -> str:
        """Name of the preset, followed by the changes to it."""
        changes = [f"{name}={value}" for name, value in self.options.items()]
        if self.suite == "online":
            changes.append(f"transitions={self.transitions}")
        if self.suite == "paths":
            changes.append(self.path)
        if self.behaviour:
            changes.insert(0, "behaviour")
        return " ".join(["small", *changes])

    @property
    def device(self) -> str:
        """Device of the training."""
        return PATHS[self.path].get("device", "cpu")

    @property
    def folder(self) -> Path:
        """Folder of the experiment's runs, relative to the folder of the benchmark."""
        suite = ["agents"] if self.suite == "agents" else []
        return Path(*suite, self.task, self.agent, self.preset.replace(" ", ","))


def experiments() -> list[Experiment]:
    """Return all experiments, in the order in which they are run."""
    maze = [Experiment("pointmaze", MAZE, agent) for agent in FIRST]
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
        for agent in FIRST
    ]
    cube.append(replace(cube[2], options={"kernel": "moment_matched"}))
    return maze + online + temperatures + kernels + paths + cube + comparison()


def comparison() -> list[Experiment]:
    """Return the suite ``agents``: all agents on two tasks, the leading ones on two more.

    All have equal numbers of updates.  ``bc`` comes first on each task, for the others start from
    what its first seed has cloned.
    """
    maze = Experiment("agents", MAZE, "bc", eval_every=500)
    cube = Experiment(
        "agents", CUBE, "bc", offline=20_000, transitions=200_000, eval_every=2500, episodes=20
    )
    everything = ("bc", *LEADING, *(a for a in AGENTS if a not in ("bc", *LEADING, *ONLINE)))
    return [
        replace(task, agent=agent, behaviour=agent != "bc" and has_behaviour(agent))
        for task, agents in (
            (maze, everything),
            (cube, everything),
            (replace(cube, task=SCENE), ("bc", *LEADING)),
            (replace(cube, task=PUZZLE), ("bc", *LEADING)),
        )
        for agent in agents
    ]
