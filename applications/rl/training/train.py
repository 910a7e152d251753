"""Training an agent: offline on a task's data, online in its environment, or one after the other.

    train(TrainConfig(task="cube-single-play-singletask-task1-v0", agent="qam"))

Offline, each step is one update on the data.  Online, each is an environment step and an update on
the data and all that came online; see `applications.rl.training.agent_loss`.  Every ``eval_every``
steps, and at the end of each phase, the agent plays episodes of its own; see
`applications.rl.evaluation.evaluator`, and `applications.rl.evaluation.background` for how training
goes on meanwhile.

Everything random comes from the seed: the weights, the batches and noise, the episodes of the
environment, and those of each evaluation, which are new ones at each step.  A run that is killed at
any moment and resumed ends with the same weights and files on a CPU, see `flows.training.trainer`;
of the environment, the running episode is played again up to where it stood.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from applications.rl import run_folder
from applications.rl.agents import make_agent
from applications.rl.agents.base import Agent
from applications.rl.data.dataset import Dataset
from applications.rl.environments.episodes import Episodes
from applications.rl.environments.reproducible import episode_seed
from applications.rl.environments.spaces import Spaces, check_spaces, spaces_of
from applications.rl.errors import RunError
from applications.rl.evaluation.background import BackgroundEvaluator, PendingEvaluation
from applications.rl.evaluation.evaluator import Evaluation, Evaluator
from applications.rl.training.agent_loss import AgentLoss, OnlineCollector
from applications.rl.training.callbacks import (
    ConfigFile,
    EvaluationPoints,
    Evaluations,
    Progress,
    WandbLogger,
)
from applications.rl.training.config import TrainConfig
from applications.rl.training.setup import Factory, TrainingSetup, resolve
from flows import Callback, Trainer, TrainerConfig
from flows.training import CSVLogger, TensorBoardLogger, UpdateGraph, train_stacked

__all__ = ["TrainConfig", "Trained", "show_train", "train"]

EVALUATION_STREAM, ONLINE_STREAM = 1, 2
"""What the seeds of the episodes of evaluations and of the online phase are told apart by."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished run of one seed.

    Attributes:
        seed: of the run.
        folder: where it was written; see `applications.rl.run_folder`.
        agent: in evaluation mode.
        evaluation: the last one, None if there was none in this process.
        seconds: of this process's part, in which other seeds may have been trained too.
    """

    seed: int
    folder: Path
    agent: Agent
    evaluation: Evaluation | None
    seconds: float


SeedRun = Generator[Trainer, None, Trained]
"""The training of a seed as `flows.training.stacked.train_stacked` brings it to its end."""


def train(
    config: TrainConfig,
    *,
    environment: Factory | None = None,
    dataset: Dataset | None = None,
    callbacks: Sequence[Callback] = (),
) -> list[Trained]:
    """Train one agent per seed, and write each into a folder of its own.

    A seed that fails is named on the standard error stream; the others are trained all the same,
    and then its error is raised, or the first one of several.

    Arguments:
        config: the options.
        environment: makes the environment, instead of the task's own; ``config.options`` must then
            be given, and ``config.task`` is but a name unless the task's data are to be found.
        dataset: the data, instead of the task's own.
        callbacks: more of them, see ``flows.training.callbacks``; they are told of every seed.

    Raises:
        ValueError: an unknown task or agent, an option out of range, an environment and data that
            do not belong together, or a folder that holds a run already; before any file changes.
        ImportError: a package that the task needs is not installed.
        OSError: a file cannot be written, such as on a full disk; the last checkpoint is kept.
        CheckpointError: resuming from a file that is damaged or of another run.
        TrainingDiverged: a loss became NaN; the last good checkpoint is kept.
        RunError: the seeds that are trained together do not fit the device, or an evaluation in
            another process failed.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    setup = resolve(config, environment, dataset)
    if setup.device.type == "cuda":
        exact = config.precision == "float32"
        torch.set_float32_matmul_precision("highest" if exact else "high")
    evaluator = None
    try:
        if config.eval_every:
            workers = min(config.workers, config.eval_episodes)
            environments = min(config.environments, config.eval_episodes)
            kind: type[Evaluator | BackgroundEvaluator] = (
                BackgroundEvaluator if config.background_eval else Evaluator
            )
            evaluator = kind(setup.factory, environments=environments, workers=workers)
            if setup.first is not None:
                check_spaces(evaluator.spaces, setup.first, "the data")
        for seed in config.seeds:
            run_folder.claim(
                _folder(config, seed), resume=config.resume, overwrite=config.overwrite
            )
        ended: list[Trained | Exception] = []
        size = config.together or (1 if setup.device.type == "cpu" else len(config.seeds))
        for start in range(0, len(config.seeds), size):
            seeds = config.seeds[start : start + size]
            begun = [_train_seed(setup, seed, evaluator, callbacks) for seed in seeds]
            ended += _all_of(begun, UpdateGraph(config.graph) if config.graph else None)
    finally:
        if evaluator is not None:
            evaluator.close()
    for result in ended:
        if isinstance(result, Exception):
            raise result
    return [result for result in ended if isinstance(result, Trained)]


def show_train(config: TrainConfig) -> None:
    """Train, and say how it ended and what can be done next."""
    for run in train(config):
        end = "" if run.evaluation is None else f": {run.evaluation}"
        print(f"seed {run.seed}{end}\nwrote {run.folder} ({run.seconds:.0f} s)")
    print(f"\nnext: python -m applications.rl evaluate {config.path}/*")
    if config.eval_every:  # else there is nothing to report
        print(f"      python -m applications.rl report {config.path}")


def _folder(config: TrainConfig, seed: int) -> Path:
    return config.path / f"seed{seed}"


def _all_of(begun: Sequence[SeedRun], launcher: UpdateGraph | None) -> list[Trained | Exception]:
    """`train_stacked`, with advice where the runs do not fit."""
    try:
        return train_stacked(begun, ahead=launcher)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"{len(begun)} seeds together do not fit the device; --together with a smaller number "
            f"trains fewer at a time, --resume continues: {error}"
        ) from error


def _train_seed(
    setup: TrainingSetup,
    seed: int,
    evaluator: Evaluator | BackgroundEvaluator | None,
    callbacks: Sequence[Callback],
) -> SeedRun:
    try:
        if not setup.config.online_steps:
            assert setup.first is not None  # there are no updates without data or steps
            spaces = Spaces(setup.first.observation_dim, setup.first.action_dim)
            return (yield from _run(setup, seed, spaces, None, evaluator, callbacks))
        with closing(Episodes(setup.factory, episode_seed(seed, ONLINE_STREAM))) as episodes:
            spaces = spaces_of(episodes.env)
            if setup.first is not None:
                check_spaces(spaces, setup.first, "the data")
            return (yield from _run(setup, seed, spaces, episodes, evaluator, callbacks))
    except Exception as error:
        if len(setup.config.seeds) > 1:
            tqdm.write(f"seed {seed} failed: {error}", file=sys.stderr)
        raise


def _run(
    setup: TrainingSetup,
    seed: int,
    spaces: Spaces,
    episodes: Episodes | None,
    evaluator: Evaluator | BackgroundEvaluator | None,
    callbacks: Sequence[Callback],
) -> SeedRun:
    started = time.perf_counter()
    config, options = setup.config, setup.options
    agent = make_agent(config.agent, options, *spaces, seed=seed).to(setup.device)
    if setup.first is not None:
        agent.fit_normalizer(torch.as_tensor(setup.first.observations))
    replay = setup.make_replay(spaces)
    objective = AgentLoss(
        replay,
        config.schedule,
        batch_size=config.batch_size,
        acting=None if episodes is None else OnlineCollector(episodes, replay),
        before_sampling=setup.rotation(replay),
        compiled=config.compile,
    )
    folder = _folder(config, seed)
    if not config.resume:  # what a resume finds stays until its checkpoint is accepted
        for name in (run_folder.CHECKPOINT, run_folder.SNAPSHOT):
            (folder / name).unlink(missing_ok=True)
    content = setup.describe(seed, spaces)
    evaluations = None
    if evaluator is not None:
        evaluations = _evaluations(folder, config, seed, evaluator)
    trainer = Trainer(
        agent,
        objective,
        TrainerConfig(
            iterations=config.schedule.updates,
            lr=options.lr,
            lr_schedule="constant",
            ema_decay=0,
            grad_clip=options.grad_clip,
            autocast=config.precision == "bfloat16",
            seed=seed,
            checkpoint_every=config.checkpoint_every,
        ),
        callbacks=_callbacks(config, seed, folder, content, evaluations, callbacks),
        checkpoint=folder / run_folder.CHECKPOINT,
        identity=run_folder.describe_identity(
            agent=config.agent,
            task=config.task,
            config=options,
            spaces=spaces,
            facts={
                "seed": seed,
                "batch_size": config.batch_size,
                "transitions": 0 if setup.first is None else len(setup.first),
                "data": setup.digest,
                "shard_every": config.shard_every,
            },
        ),
    )
    with run_folder.full_disk_explained(folder):
        yield from trainer.training(resume=config.resume)
    latest = None if evaluations is None else evaluations.latest
    return Trained(seed, folder, agent.eval(), latest, time.perf_counter() - started)


def _evaluations(
    folder: Path, config: TrainConfig, seed: int, evaluator: Evaluator | BackgroundEvaluator
) -> Evaluations:
    def evaluate(agent: Agent, step: int, phase: str) -> Evaluation | PendingEvaluation:
        path = (EVALUATION_STREAM, step, int(phase == "online"))
        return evaluator(agent, episodes=config.eval_episodes, seed=episode_seed(seed, *path))

    return Evaluations(folder, config.schedule, config.eval_every, evaluate)


def _callbacks(
    config: TrainConfig,
    seed: int,
    folder: Path,
    content: dict[str, Any],
    evaluations: Evaluations | None,
    others: Sequence[Callback],
) -> list[Callback]:
    """Those of a run; the bar comes after what it shows, the caller's own at the end."""
    result: list[Callback] = [
        ConfigFile(folder, content),
        CSVLogger(folder / run_folder.METRICS, every=config.log_every),
    ]
    if evaluations is not None:
        result.append(evaluations)
    if config.tensorboard:
        # Two writers, two folders: each hides what the other wrote before it in its own.
        events = folder / run_folder.TENSORBOARD
        result.append(TensorBoardLogger(events / "training", every=config.log_every))
        if evaluations is not None:
            points = TensorBoardLogger(events / "evaluation", every=1)
            result.append(EvaluationPoints(evaluations, points))
    if config.wandb is not None:
        name = f"{config.task}/{config.agent}/seed{seed}"
        identity = folder / run_folder.WANDB
        every = config.log_every
        result.append(WandbLogger(config.wandb, name, identity, content, every, evaluations))
    bar = Progress(f"{config.agent} seed {seed}", config.schedule, evaluations)
    return [*result, bar, *others]
