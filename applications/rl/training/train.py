"""Training an agent: offline on a task's data, online in its environment, or one after the other.

    train(TrainConfig(task="cube-single-play-singletask-task1-v0", agent="qam"))

Offline, each step is one update on the data.  Online, each step is an environment step and an
update on the data and all online transitions; see `applications.rl.training.phases`.  Every
``eval_every`` steps, and at the end of each phase, the agent plays episodes for an evaluation; see
`applications.rl.evaluation.evaluator`, and `applications.rl.evaluation.background` for how training
goes on meanwhile.

Everything random comes from the seed: the weights, the batches and noise, the episodes of the
environment, and the episodes of each evaluation, which are new ones at each step.  A run that is
killed at any moment and resumed ends with the same weights and files on a CPU, see
`flows.training.trainer`; the environment plays its running episode again up to where it stood.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from applications.common.errors import RunError
from applications.rl import run_folder
from applications.rl.agents import make_agent
from applications.rl.agents.base import Agent
from applications.rl.agents.chain_kernel import own_kernel
from applications.rl.data.dataset import Dataset
from applications.rl.environments.episodes import Episodes
from applications.rl.environments.reproducible import episode_seed
from applications.rl.environments.spaces import Spaces, check_spaces, spaces_of
from applications.rl.environments.wrappers import Standard
from applications.rl.evaluation.background import BackgroundEvaluator
from applications.rl.evaluation.evaluator import EpisodeEvaluator, Evaluation
from applications.rl.training.agent_loss import AgentLoss
from applications.rl.training.behaviour import hand_over
from applications.rl.training.callbacks import training_callbacks
from applications.rl.training.config import TrainConfig
from applications.rl.training.evaluations import Evaluations
from applications.rl.training.online import OnlineCollector
from applications.rl.training.setup import Factory, TrainingSetup, resolve
from flows import Callback, Trainer, TrainerConfig
from flows.training import UpdateGraph, check_callbacks, train_stacked

__all__ = ["TrainConfig", "Trained", "show_train", "train"]

ONLINE_STREAM = 2
"""Number that tells the seeds of online episodes apart from those of other episodes of a run."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished run of one seed.

    Attributes:
        seed: seed of the run.
        folder: folder of the run; see `applications.rl.run_folder`.
        agent: the agent in evaluation mode.
        evaluation: the last evaluation, None if there was none in this process.
        seconds: wall time in this process, during which other seeds may have been trained too.
        stopped: message of the callback that stopped the training, None if it ran to its end.
    """

    seed: int
    folder: Path
    agent: Agent
    evaluation: Evaluation | None
    seconds: float
    stopped: str | None = None


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
        environment: function that makes the environment, in place of the task's own;
            ``config.options`` must then be given, and ``config.task`` is only a name unless the
            task's data are to be found.  Data of your own need none where nothing is played
            (``eval_every=0``, ``online_steps=0``): the task is then any name.
        dataset: the data, in place of the task's own.
        callbacks: additional callbacks, see ``flows.training.callbacks``; they are called for every
            seed.  One that raises `flows.training.StopTraining` ends the training of its seed with
            a checkpoint and an evaluation.

    Returns:
        the runs in the order of the seeds.

    Raises:
        ValueError: an unknown task or agent, an option out of range, an environment and data that
            do not belong together, a behaviour that does not fit, or a folder that holds a run
            already; before any file changes.
        ImportError: a package that the task needs is not installed.
        OSError: a file cannot be written, such as on a full disk; the last checkpoint is kept.
        CheckpointError: resuming from a file that is damaged or of another run.
        TrainingDiverged: a loss became NaN; the last good checkpoint is kept.
        RunError: another process trains a run in one of the folders, the stacked seeds do not fit
            the device, or an evaluation in another process failed.
    """
    check_callbacks(callbacks)
    setup = resolve(config, environment, dataset)
    ended: list[Trained | Exception] = []
    with ExitStack() as stack:
        stack.enter_context(_process_settings(config, setup.device))
        evaluator = _make_evaluator(setup)
        if evaluator is not None:
            stack.callback(evaluator.close)
            if setup.first is not None:
                check_spaces(evaluator.spaces, setup.first, "the data")
        for seed in config.seeds:
            run_folder.claim(
                config.run_folder(seed), resume=config.resume, overwrite=config.overwrite
            )
        for seed in config.seeds:
            stack.enter_context(run_folder.locked(config.run_folder(seed)))
        size = config.stacked or (1 if setup.device.type == "cpu" else len(config.seeds))
        for start in range(0, len(config.seeds), size):
            seeds = config.seeds[start : start + size]
            ended += _train_seeds(setup, seeds, evaluator, callbacks)
    for result in ended:
        if isinstance(result, Exception):
            raise result
    return [result for result in ended if isinstance(result, Trained)]


def show_train(config: TrainConfig) -> None:
    """Train as the command ``train``: print how each run ended and which command comes next."""
    for run in train(config):
        end = "" if run.evaluation is None else f": {run.evaluation}"
        end += "" if run.stopped is None else f"; stopped: {run.stopped}"
        print(f"seed {run.seed}{end}\nwrote {run.folder} ({run.seconds:.0f} s)")
    own = f" --agent {config.agent}" if ":" in config.agent else ""
    kernel = None if config.options is None else own_kernel(config.options)
    own += f" --kernel {kernel}" if kernel else ""
    if config.behaviour is not None and config.behaviour_run(0) is None:
        own += f" --behaviour {config.behaviour_name}"
    own += f" --task {config.task}" if config.task.count(":") > 1 else ""
    print(f"\nnext: python -m applications.rl evaluate {config.path}/*{own}")
    if config.eval_every:  # else there is nothing to report
        print(f"      python -m applications.rl report {config.path}")


@contextmanager
def _process_settings(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Set threads and precision of matrix products for a training, and restore them after it."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        if config.threads:
            torch.set_num_threads(config.threads)
        if device.type == "cuda":
            exact = config.precision == "float32"
            torch.set_float32_matmul_precision("highest" if exact else "high")
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def _make_evaluator(setup: TrainingSetup) -> EpisodeEvaluator | BackgroundEvaluator | None:
    """Open the environments of the evaluations; None if the training evaluates nothing."""
    config = setup.config
    if not config.eval_every:
        return None
    kind: type[EpisodeEvaluator | BackgroundEvaluator] = (
        BackgroundEvaluator if config.background_eval else EpisodeEvaluator
    )
    return kind(
        setup.factory,
        environments=min(config.environments, config.eval_episodes),
        workers=min(config.workers, config.eval_episodes),
    )


def _train_seeds(
    setup: TrainingSetup,
    seeds: Sequence[int],
    evaluator: EpisodeEvaluator | BackgroundEvaluator | None,
    callbacks: Sequence[Callback],
) -> list[Trained | Exception]:
    """Train some seeds at a time: a single one by a plain loop, several ones stacked."""
    runs = [SeedRun(setup, seed, evaluator, callbacks) for seed in seeds]
    graph = _update_graph(setup.config)
    if len(runs) == 1 and graph is None:
        try:
            return [runs[0].train()]
        except Exception as error:
            return [error]
    try:
        return train_stacked([run.steps() for run in runs], update_graph=graph)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"{len(seeds)} stacked seeds do not fit the device; --stacked with a smaller number "
            f"trains fewer at a time, --resume continues: {error}"
        ) from error


def _update_graph(config: TrainConfig) -> UpdateGraph | None:
    return UpdateGraph(config.cuda_graphs) if config.cuda_graphs else None


class SeedRun:
    """The training of one seed: it makes the agent and its trainer, and trains it to the end.

    Arguments:
        setup: environment, data and options, shared by all seeds.
        seed: seed of the run.
        evaluator: plays the evaluations, or None.
        callbacks: additional callbacks.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        seed: int,
        evaluator: EpisodeEvaluator | BackgroundEvaluator | None,
        callbacks: Sequence[Callback],
    ) -> None:
        self.setup, self.seed, self.folder = setup, seed, setup.config.run_folder(seed)
        self.callbacks = callbacks
        self.environment: Standard | None = None
        if isinstance(evaluator, EpisodeEvaluator):
            self.environment = evaluator.environment
        self.evaluations: Evaluations | None = None
        if evaluator is not None:
            self.evaluations = Evaluations.of_run(setup.config, seed, evaluator)

    def train(self) -> Trained:
        """Train to the end; raises what `train` raises."""
        started = time.perf_counter()
        with self._trainer() as trainer:
            trainer.fit(resume=self.setup.config.resume)
        return self._trained(trainer, started)

    def steps(self) -> Generator[Trainer, None, Trained]:
        """Train step by step, as `flows.training.train_stacked` asks for it."""
        started = time.perf_counter()
        with self._trainer() as trainer:
            yield from trainer.training(resume=self.setup.config.resume)
        return self._trained(trainer, started)

    def _trained(self, trainer: Trainer, started: float) -> Trained:
        agent = trainer.module.eval()
        assert isinstance(agent, Agent)
        latest = None if self.evaluations is None else self.evaluations.latest
        seconds = time.perf_counter() - started
        return Trained(self.seed, self.folder, agent, latest, seconds, trainer.stopped)

    @contextmanager
    def _trainer(self) -> Iterator[Trainer]:
        """Yield the trainer, ready to start; name the seed and explain a full disk if it fails."""
        config, first = self.setup.config, self.setup.first
        try:
            with ExitStack() as stack:
                episodes = None
                if config.online_steps:
                    seed = episode_seed(self.seed, ONLINE_STREAM)
                    episodes = Episodes(self.setup.factory, seed)
                    stack.callback(episodes.close)
                    spaces = spaces_of(episodes.env)
                    if first is not None:
                        check_spaces(spaces, first, "the data")
                else:
                    assert first is not None  # there are no updates without data or steps
                    spaces = Spaces(first.observation_dim, first.action_dim)
                stack.enter_context(run_folder.full_disk_explained(self.folder))
                yield self._make_trainer(spaces, episodes)
        except Exception as error:
            if len(config.seeds) > 1:
                tqdm.write(f"seed {self.seed} failed: {error}", file=sys.stderr)
            raise

    def _make_trainer(self, spaces: Spaces, episodes: Episodes | None) -> Trainer:
        setup, config, options = self.setup, self.setup.config, self.setup.options
        agent = make_agent(options, *spaces, seed=self.seed).to(setup.device)
        if setup.first is not None:
            agent.fit_normalizer(torch.as_tensor(setup.first.observations))
        if self.seed in setup.behaviours:
            behaviour = setup.behaviours[self.seed]
            if setup.first is None:  # the sizes were not known before
                behaviour.check(options, config.task, spaces)
            hand_over(behaviour, agent, config)
        if self.seed in setup.weights:
            weights = setup.weights[self.seed]
            if setup.first is None:  # as above
                weights.check(config.agent, options, spaces)
            weights.start(agent)
        replay = setup.make_replay(spaces)
        collector = None
        if episodes is not None:
            random_steps = config.start_training - 1 if config.balanced_sampling else 0
            collector = OnlineCollector(episodes, replay, random_steps=random_steps)
        loss = AgentLoss(
            replay,
            config.phases,
            batch_size=config.batch_size,
            collector=collector,
            balanced=config.balanced_sampling,
            before_sampling=setup.rotation(replay),
            compiled=config.compile,
        )
        if not config.resume:  # what a resume finds stays until its checkpoint is accepted
            run_folder.clear(self.folder)
        return Trainer(
            agent,
            loss,
            TrainerConfig(
                iterations=config.phases.updates,
                lr=options.lr,
                lr_schedule="constant",
                ema_decay=0,
                grad_clip=options.grad_clip,
                autocast=config.precision == "bfloat16",
                seed=self.seed,
                checkpoint_every=config.checkpoint_every,
            ),
            callbacks=[
                *training_callbacks(
                    config,
                    self.seed,
                    setup.describe(
                        self.seed, spaces, self.environment if episodes is None else episodes.env
                    ),
                    self.evaluations,
                ),
                *self.callbacks,
            ],
            checkpoint=self.folder / run_folder.CHECKPOINT,
            identity=setup.identity(self.seed, spaces),
            identity_defaults=run_folder.option_defaults(options),
        )
