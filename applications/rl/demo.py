"""The command ``demo``: data, a cloned policy, its tilt toward a critic, and figures, in minutes.

In OGBench's medium point maze the data are shortest paths between random places, with noise.  A
flow cloned from them (BC) moves like the data and so reaches the task's goal by chance; the flow
tilted toward exp(τ Q) (QAM) goes there.  Both are trained with the preset ``small``, which has a
recipe for this maze (`applications.rl.agents.presets`), and evaluated on the same episodes.

The folder holds the data, a run folder for each agent, ``report.json`` (flat), and the figures
``maze.png`` (trajectories of both policies), ``actions.png`` (their actions at one state, and the
critic's preference there) and the learning curves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from applications.rl.agents.bc import BC
from applications.rl.agents.qam import QAM
from applications.rl.data.generate import DataConfig, generate
from applications.rl.environments.tasks import find_task, make_environment
from applications.rl.evaluation.evaluator import Evaluation, evaluate
from applications.rl.report.action_pictures import action_distribution, repeated_action_values
from applications.rl.report.command import ReportConfig, show_report
from applications.rl.report.maze_pictures import Maze, trajectories
from applications.rl.training.config import TrainConfig
from applications.rl.training.train import train
from flows.training import ensure_writable, versions, write_json

TASK = "pointmaze-medium-navigate-singletask-task1-v0"
AGENTS = ("bc", "qam")
EPISODE_SEED = 1_000_003
"""Seed of the episodes on which both agents are evaluated; training sees other episodes."""
CLOUD = 4096
"""Number of chunks drawn at the state of ``actions.png``."""


@dataclass(frozen=True)
class DemoConfig:
    """Make point-maze data, train a clone and its tilt by a critic, and compare them."""

    folder: Path = Path("outputs/rl-demo")
    """Folder to write data, runs, report and figures to."""
    transitions: int = 300_000
    """Number of transitions of the data."""
    updates: int = 4000
    """Number of updates of each agent."""
    episodes: int = 50
    """Number of episodes on which both agents are evaluated."""
    seed: int = 0
    """Seed of data and agents."""
    workers: int = 2
    """Number of processes that make the data."""
    quick: bool = False
    """Train for a few hundred updates only, to see that everything works."""
    resume: bool = False
    """Continue where an earlier demonstration was interrupted."""

    @property
    def data(self) -> Path:
        """Folder of the data, a different one for each number of transitions and seed."""
        return self.folder / f"data-{self.transitions}-{self.seed}"

    @property
    def sized(self) -> DemoConfig:
        """These options, reduced to small numbers if ``quick``."""
        if not self.quick:
            return self
        return replace(self, transitions=20_000, updates=200, episodes=4)


class Paths(gymnasium.Wrapper):
    """Wraps an environment and records the positions in each of its episodes.

    Attributes:
        paths: positions (T, 2) by episode, beginning with the position after the reset.
    """

    def __init__(self, env: gymnasium.Env, paths: list[list[np.ndarray]]) -> None:
        super().__init__(env)
        self.paths = paths

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """Begin a new path."""
        observation, info = self.env.reset(**options)
        self.paths.append([np.array(observation[:2])])
        return observation, info

    def step(self, action: Any) -> Any:
        """Take a step and record the new position."""
        result = self.env.step(action)
        self.paths[-1].append(np.array(result[0][:2]))
        return result


def run_demo(config: DemoConfig) -> dict[str, str | int | float]:
    """Run the demonstration: print the table, write the figures, return the content of report.json.

    Raises:
        ValueError, OSError, CheckpointError, TrainingDiverged: see `generate` and `train`.
    """
    started = perf_counter()
    config = config.sized
    ensure_writable(config.folder / "report.json", "folder")
    task = find_task(TASK)
    print(f"1. Data: shortest paths in {task.environment}, to goals everywhere.")
    generate(
        DataConfig(
            task=TASK,
            transitions=config.transitions,
            workers=config.workers,
            seed=config.seed,
            folder=config.data,
        )
    )
    print("\n2. A clone of the data (bc), and its tilt toward a critic (qam).")
    agents = {name: train_one(config, name) for name in AGENTS}
    print(f"\n3. Both are evaluated on the same {config.episodes} episodes.")
    evaluations: dict[str, Evaluation] = {}
    paths: dict[str, list[np.ndarray]] = {}
    for name, agent in agents.items():
        evaluations[name], paths[name] = play(config, agent)
        print(f"  {name:<4}{evaluations[name]}")
    environment = make_environment(task)
    _, info = environment.reset(seed=EPISODE_SEED)
    maze, goal = Maze.from_environment(environment), np.asarray(info["goal"])[:2]
    environment.close()
    pictures = [
        draw_maze(config, maze, goal, evaluations, paths),
        draw_actions(config, maze, goal, agents, paths["qam"][0][len(paths["qam"][0]) // 3]),
    ]
    report: dict[str, str | int | float] = {"task": TASK, "episodes": config.episodes}
    for name, found in evaluations.items():
        low, high = found.interval
        report |= {
            f"success_{name}": found.success,
            f"success_{name}_low": low,
            f"success_{name}_high": high,
            f"length_{name}": found.mean_length,
        }
    report |= {"updates": config.updates, "transitions": config.transitions, "seed": config.seed}
    report |= {"torch": versions()["torch"], "seconds": perf_counter() - started}
    write_json(config.folder / "report.json", report)
    print("\n4. Learning curves.")
    show_report(ReportConfig(runs=(str(config.folder / "runs"),), folder=config.folder))
    for path in (config.folder / "report.json", *pictures):
        print(f"wrote {path}")
    return report


def train_one(config: DemoConfig, name: str) -> torch.nn.Module:
    """Train or resume one agent by name."""
    options = TrainConfig(
        task=TASK,
        agent=name,
        preset="small",
        seeds=(config.seed,),
        offline_steps=config.updates,
        data=config.data,
        eval_every=max(1, config.updates // 4),
        eval_episodes=min(20, config.episodes),
        checkpoint_every=max(1, config.updates // 8),
        log_every=max(1, config.updates // 40),
        folder=config.folder / "runs" / name,
        resume=config.resume,
        overwrite=not config.resume,
        threads=1,
    )
    return train(options)[0].agent


def play(config: DemoConfig, agent: Any) -> tuple[Evaluation, list[np.ndarray]]:
    """Play episodes with ``agent``; return the evaluation and the positions of each episode."""
    task, seen = find_task(TASK), []  # type: ignore[var-annotated]
    found = evaluate(
        agent,
        lambda: Paths(make_environment(task), seen),
        episodes=config.episodes,
        seed=EPISODE_SEED,
        environments=1,
    )
    return found, [np.stack(path) for path in seen[: config.episodes]]


def draw_maze(
    config: DemoConfig,
    maze: Maze,
    goal: np.ndarray,
    evaluations: dict[str, Evaluation],
    paths: dict[str, list[np.ndarray]],
) -> Path:
    """Draw the trajectories of both policies."""
    return trajectories(
        config.folder / "maze.png",
        maze,
        paths,
        start=paths["bc"][0][0],
        goal=goal,
        reached={name: found.successes for name, found in evaluations.items()},
        title="A flow policy in a maze, before and after its tilt toward exp(τ Q)",
        subtitle=f"{TASK}, {config.updates} updates on {config.transitions} transitions",
    )


def draw_actions(
    config: DemoConfig,
    maze: Maze,
    goal: np.ndarray,
    agents: dict[str, Any],
    position: np.ndarray,
) -> Path:
    """Draw the actions of behaviour and tilt at ``position``, and the critic's preference."""
    agent = agents["qam"]
    assert isinstance(agent, QAM)
    observation = torch.as_tensor(position, dtype=torch.float32)
    generator = torch.Generator().manual_seed(config.seed)
    rows = observation.expand(CLOUD, -1)
    noise = agent.act_noise(CLOUD, generator)
    tilted = agent.act(rows, noise)
    behaviour = _behaviour(agents["bc"], rows, noise)
    tau = agent.config.inverse_temperature

    def value(observations: Tensor, chunks: Tensor) -> Tensor:
        return tau * agent.target_critic(agent.normalize(observations), chunks).mean(0)

    with torch.no_grad():
        log_weights = value(rows, behaviour.flatten(1))
    return action_distribution(
        config.folder / "actions.png",
        behaviour[:, 0],
        tilted[:, 0],
        repeated_action_values(value, observation, horizon=agent.chunk_length),
        log_weights=log_weights,
        maze=maze,
        position=position,
        goal=goal,
        names=("bc", "qam"),
        title="What to do at a place on the way: the first action of the chunk",
        subtitle=f"{CLOUD} chunks of {agent.chunk_length} actions each",
    )


def _behaviour(agent: Any, rows: Tensor, noise: dict[str, Tensor]) -> Tensor:
    assert isinstance(agent, BC)
    return agent.act(rows, noise)
