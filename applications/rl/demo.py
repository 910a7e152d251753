"""Everything once, on a small machine: data, a clone, its tilt toward a critic, and pictures.

In OGBench's medium point maze the data are shortest paths between random places, with noise.  A
flow cloned from them (BC) moves like the data and so reaches the task's goal by chance; the same
flow tilted toward exp(τ Q) (QAM) goes there.  Both are trained with the preset ``small``, which for
this maze is a recipe of its own (`applications.rl.agents.presets`), and judged by the same
episodes.

The folder holds the data, a run folder for each agent, ``report.json`` (flat), and the pictures
``maze.png`` (where both policies go), ``actions.png`` (what they do at one state, and what the
critic prefers there) and the learning curves.
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
"""Seed of the episodes that both agents are judged by, other than those seen in training."""
CLOUD = 4096
"""Chunks drawn at the state of the picture of actions."""


@dataclass(frozen=True)
class DemoConfig:
    """Make point-maze data, train a clone and its tilt by a critic, and compare them."""

    folder: Path = Path("outputs/rl-demo")
    """Where data, runs, report and pictures are written."""
    transitions: int = 300_000
    """Transitions of the data."""
    updates: int = 4000
    """Updates of each agent."""
    episodes: int = 50
    """Episodes by which both are judged."""
    seed: int = 0
    """Seed of data and agents."""
    workers: int = 2
    """Processes that make the data."""
    quick: bool = False
    """A few hundred updates, to see that everything works."""
    resume: bool = False
    """Continue where an earlier demonstration was interrupted."""

    @property
    def data(self) -> Path:
        """Folder of the data, of which each number of transitions and each seed has its own."""
        return self.folder / f"data-{self.transitions}-{self.seed}"

    @property
    def sized(self) -> DemoConfig:
        """These options, or small ones if ``quick``."""
        if not self.quick:
            return self
        return replace(self, transitions=20_000, updates=200, episodes=4)


class Paths(gymnasium.Wrapper):
    """An environment that remembers where each of its episodes went.

    Attributes:
        paths: positions (T, 2) by episode, the first that after the reset.
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
        """Take a step and note where it led."""
        result = self.env.step(action)
        self.paths[-1].append(np.array(result[0][:2]))
        return result


def run_demo(config: DemoConfig) -> dict[str, str | int | float]:
    """Run it, print the table, write the pictures; returns what report.json holds.

    Raises:
        ValueError, OSError, CheckpointError, TrainingDiverged: as data and training do.
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
    print(f"\n3. Both are judged by the same {config.episodes} episodes.")
    judged: dict[str, Evaluation] = {}
    paths: dict[str, list[np.ndarray]] = {}
    for name, agent in agents.items():
        judged[name], paths[name] = play(config, agent)
        print(f"  {name:<4}{judged[name]}")
    environment = make_environment(task)
    _, info = environment.reset(seed=EPISODE_SEED)
    maze, goal = Maze.from_environment(environment), np.asarray(info["goal"])[:2]
    environment.close()
    pictures = [
        draw_maze(config, maze, goal, judged, paths),
        draw_actions(config, maze, goal, agents, paths["qam"][0][len(paths["qam"][0]) // 3]),
    ]
    report: dict[str, str | int | float] = {"task": TASK, "episodes": config.episodes}
    for name, found in judged.items():
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
    """The agent of that name, trained or resumed."""
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
    """Episodes of ``agent``: how they ended, and where they went."""
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
    judged: dict[str, Evaluation],
    paths: dict[str, list[np.ndarray]],
) -> Path:
    """Where both policies go."""
    return trajectories(
        config.folder / "maze.png",
        maze,
        paths,
        start=paths["bc"][0][0],
        goal=goal,
        reached={name: found.successes for name, found in judged.items()},
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
    """What behaviour and tilt do at ``position``, and what the critic prefers there."""
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
