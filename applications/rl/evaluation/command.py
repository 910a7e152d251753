"""The command ``evaluate``: it plays episodes with trained agents, and animates one of them.

The recorded episode is played twice: once to learn its length, and once more, identically, with a
frame at regular steps, because a frame may take half a second where there is no graphics card.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from applications.common.errors import RunError
from applications.rl.agents.base import Agent
from applications.rl.environments.reproducible import episode_seed
from applications.rl.environments.tasks import Task, find_task, make_environment, prepare_mujoco
from applications.rl.evaluation.evaluator import EpisodeEvaluator, Evaluation
from applications.rl.run_folder import TrainedAgent, load_agent, run_folders
from flows.training import choose_device, ensure_writable, replacing

COMMAND_STREAM = 3
"""Number that tells the seeds of these episodes apart from those of training (1 and 2)."""

RENDERING_HELP = (
    "headless rendering needs EGL (apt install libegl1 libgl1, then MUJOCO_GL=egl) or, in "
    "software, OSMesa (apt install libosmesa6, then MUJOCO_GL=osmesa)"
)


@dataclass(frozen=True)
class EvaluateConfig:
    """Play episodes with trained agents and report success with its 95% interval."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, searched to any depth, or checkpoints."""
    agent: str | None = None
    """Agent of your own that the runs hold, as module:Name; its module is imported."""
    task: str | None = None
    """Task to play instead of that of the runs; names, as gym:MODULE:NAME, a module to import."""
    kernel: str | None = None
    """Kernel of your own that the agent has, as module:Name; its module is imported."""
    behaviour: str | None = None
    """Flow policy of your own that is the agent's behaviour, as module:Name; its module is
    imported."""
    episodes: int = 50
    """Episodes for each run."""
    seed: int = 0
    """Seed of the episodes, which differ from the episodes of training and data for any seed."""
    environments: int = 4
    """Environments that play at once; changes no result."""
    workers: int = 0
    """Processes with one environment each that play in their place; changes no result."""
    gif: Path | None = None
    """File for an animation of one episode of the first run."""
    gif_episode: int = 0
    """Number of the animated episode."""
    gif_frames: int = 100
    """Largest number of frames; a frame may take half a second to draw."""
    device: str = "auto"
    """Device of the agent: cpu, cuda, or auto, which is cuda where there is one."""
    threads: int = 0
    """Threads of PyTorch; 0 keeps its default."""

    def __post_init__(self) -> None:
        """Refuse a number of episodes out of range.

        Raises:
            ValueError: ``episodes`` is below 1.
        """
        if self.episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {self.episodes}")


def show_evaluate(config: EvaluateConfig) -> None:
    """Evaluate the runs, print a line for each, and write the animation.

    Raises:
        ValueError: an option is out of range, or a task is unknown.
        FileNotFoundError: a run has no checkpoint.
        CheckpointError: a checkpoint is damaged.
        RunError: no frame could be drawn.
    """
    if not config.runs:
        raise ValueError("runs: name at least one folder of a run, or a checkpoint")
    if config.threads:
        torch.set_num_threads(config.threads)
    prepare_mujoco(render=config.gif is not None)
    device = choose_device(config.device)
    paths = [folder for path in config.runs for folder in run_folders(path) or [path]]
    outside = {"agent": config.agent, "kernel": config.kernel, "behaviour": config.behaviour}
    trained = [load_agent(path, device, **outside) for path in paths]
    if config.gif is not None:
        ensure_writable(config.gif, "gif")
        for run in trained:
            _require_renderer(_task(run, config))
    for path, run in zip(paths, trained, strict=True):
        result = evaluate_trained(run, config)
        print(f"{path} ({run.name} on {run.task}, {run.updates} updates)\n  {result}")
    if config.gif is not None:
        first = trained[0]
        factory = partial(make_environment, _task(first, config), render=True)
        frames = record(
            first.agent,
            factory,
            seed=episode_seed(config.seed, COMMAND_STREAM),
            episode=config.gif_episode,
            most_frames=config.gif_frames,
        )
        write_gif(config.gif, frames)
        print(f"wrote {config.gif} (episode {config.gif_episode}, {len(frames)} pictures)")


def evaluate_trained(trained: TrainedAgent, config: EvaluateConfig) -> Evaluation:
    """Evaluate one agent in its own task, with a progress bar.

    Raises:
        ValueError: the task is unknown, or an option is out of range.
    """
    factory = partial(make_environment, _task(trained, config))
    environments, workers = (min(n, config.episodes) for n in (config.environments, config.workers))
    successes = 0
    with (
        EpisodeEvaluator(factory, environments=environments, workers=workers) as evaluator,
        tqdm(total=config.episodes, desc="episodes", file=sys.stderr, dynamic_ncols=True) as bar,
    ):

        def progress(_: int, success: bool) -> None:
            nonlocal successes
            successes += success
            bar.update(1)
            bar.set_postfix_str(f"success {successes / bar.n:.0%}")

        seed = episode_seed(config.seed, COMMAND_STREAM)
        return evaluator(trained.agent, episodes=config.episodes, seed=seed, progress=progress)


def record(
    agent: Agent,
    factory: Callable[[], gymnasium.Env],
    *,
    seed: int = 0,
    episode: int = 0,
    most_frames: int = 100,
) -> list[np.ndarray]:
    """Record frames (height, width, 3), uint8, of one episode as `EpisodeEvaluator` plays it.

    Arguments:
        agent: the agent that plays.
        factory: function that makes an environment that can render arrays.
        seed: seed of the evaluation.
        episode: number of the episode in that evaluation.
        most_frames: largest number of frames, including the start and the end of the episode.

    Raises:
        ValueError: ``most_frames`` is below 2.
        RunError: the environment cannot be made or draws nothing.
    """
    if most_frames < 2:
        raise ValueError(f"gif_frames must be at least 2, got {most_frames}")
    frames: list[np.ndarray] = []
    stride, step, length = 0, 0, 0

    def watch(environment: gymnasium.Env) -> None:
        nonlocal step
        if stride and (step % stride == 0 or step == length):
            try:
                picture = environment.render()
            except Exception as error:  # each renderer fails in its own way
                raise _rendering_error(error) from error
            if picture is None:
                raise _rendering_error("the environment has no render_mode")
            frames.append(np.asarray(picture, dtype=np.uint8))
        step += 1

    try:
        evaluator = EpisodeEvaluator(factory, environments=1, watch=watch)
    except Exception as error:  # a renderer is often opened with its environment
        raise _rendering_error(error) from error
    with evaluator:
        length = evaluator(agent, episodes=1, first=episode, seed=seed).lengths[0]
        stride, step = math.ceil(length / (most_frames - 1)), 0
        evaluator(agent, episodes=1, first=episode, seed=seed)
    return frames


def write_gif(path: Path, frames: list[np.ndarray], *, per_second: int = 15) -> None:
    """Write frames (height, width, 3) as an animation that repeats, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    images = [Image.fromarray(frame) for frame in frames]
    with replacing(path, "gif") as file:
        images[0].save(
            file,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=1000 // per_second,
            loop=0,
        )


def _task(trained: TrainedAgent, config: EvaluateConfig) -> Task:
    """Find the task to play; a module is imported only if the user names it."""
    return find_task(config.task or trained.task, importing=config.task is not None)


def _require_renderer(task: Task) -> None:
    """Import MuJoCo if the task's environment needs it, which fails without a rendering library.

    Raises:
        RunError: the import failed.
    """
    if task.kind == "gym" and "mujoco" not in str(
        gymnasium.spec(task.environment_id.rpartition(":")[2]).entry_point
    ):
        return
    try:
        importlib.import_module("mujoco")
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        raise _rendering_error(error) from error


def _rendering_error(error: Exception | str) -> RunError:
    said = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return RunError(f"gif: rendering failed ({said}); {RENDERING_HELP}")
