"""The setup of a training: environment, data and options of the agent, before any file changes.

`resolve` turns the names in a `TrainConfig` into objects, and refuses what is unknown or missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from applications.common.errors import RunError
from applications.rl import run_folder
from applications.rl.agents import find_agent
from applications.rl.agents.base import AgentConfig
from applications.rl.agents.chain_kernel import kernel_identity
from applications.rl.agents.presets import preset
from applications.rl.data.dataset import (
    Dataset,
    ShardedDataset,
    check_spaces,
    load_npz,
    load_shards,
    task_environment,
)
from applications.rl.data.manifest import versions
from applications.rl.data.replay import Replay
from applications.rl.data.trajectories import (
    check_windows,
    note_breaks,
    windows_within_episodes,
)
from applications.rl.environments.spaces import Spaces
from applications.rl.environments.tasks import find_task, make_environment
from applications.rl.environments.wrappers import Standard
from applications.rl.training.behaviour import Behaviour, check_behaviours, find_behaviours
from applications.rl.training.config import TrainConfig
from applications.rl.training.weights import DIGEST, Weights, find_weights
from flows.training import checkpoint as checkpoints
from flows.training import choose_device

Factory = Callable[[], gymnasium.Env]
Shards = ShardedDataset | Sequence[Dataset]


@dataclass(frozen=True)
class TrainingSetup:
    """The objects that all seeds of a training share.

    Attributes:
        config: options of the training.
        options: options of the agent, resolved.
        factory: function that makes the environment.
        shards: the data in one or more shards, none if the agent learns without data.
        first: the first shard, or None.
        device: device of agent and replay.
        behaviours: the behaviour that the agent starts from, by seed; empty if none is given.
        weights: the weights that all its networks start from, by seed; empty if none are given.
        checked: the task's own environment, made to check the data, or None; it is not played.
    """

    config: TrainConfig
    options: AgentConfig
    factory: Factory
    shards: Shards
    first: Dataset | None
    device: torch.device
    behaviours: Mapping[int, Behaviour]
    weights: Mapping[int, Weights]
    checked: Standard | None = None

    @cached_property
    def digest(self) -> str:
        """Hash of the first shard in 16 hexadecimal digits, '' without data."""
        if self.first is None:
            return ""
        digest = sha256()
        for name in ("observations", "actions", "rewards", "masks", "terminals"):
            digest.update(np.ascontiguousarray(getattr(self.first, name)).data)
        return digest.hexdigest()[:16]

    def windows(self, data: Dataset) -> float:
        """Return the fraction of the windows in ``data`` that lie within one episode."""
        within = windows_within_episodes(data.terminals, self.options.horizon)
        return within / (len(data) - self.options.horizon + 1)

    def make_replay(self, spaces: Spaces) -> Replay:
        """Make a replay of the first shard, with room for the online transitions."""
        capacity = self.config.online_steps
        if self.first is None:
            return Replay(capacity, *spaces, self.device)
        return Replay.from_dataset(self.first, capacity, self.device)

    def rotation(self, replay: Replay) -> ShardRotation | None:
        """Make the callable that exchanges the shards in ``replay``; None if there is only one."""
        if len(self.shards) < 2:
            return None
        return ShardRotation(replay, self.shards, self.config.shard_every)

    def identity(self, seed: int, spaces: Spaces) -> dict[str, Any]:
        """Return the facts by which a checkpoint belongs to a run; a resume compares them."""
        return run_folder.describe_identity(
            agent=self.config.agent,
            task=self.config.task,
            config=self.options,
            spaces=spaces,
            facts={
                "seed": seed,
                "batch_size": self.config.batch_size,
                "transitions": 0 if self.first is None else len(self.first),
                "data": self.digest,
                "shard_every": self.config.shard_every,
                **({"balanced_sampling": True} if self.config.balanced_sampling else {}),
                **kernel_identity(self.options),
                **self._start_facts(seed),
            },
        )

    def describe(
        self, seed: int, spaces: Spaces, environment: Standard | None = None
    ) -> dict[str, Any]:
        """Return the content of config.json, see `applications.rl.run_folder`.

        Arguments:
            seed: seed of the run.
            spaces: sizes of observations and actions.
            environment: an environment of the run, where one is open in this process.
        """
        known = environment or self.checked
        content = replace(self.config, options=self.options).plain
        for name in ("seeds", "resume", "overwrite", "folder"):
            del content[name]
        first = self.first
        return {
            "task": content.pop("task"),
            "agent": content.pop("agent"),
            "seed": seed,
            **content,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            **self._start_facts(seed),
            **spaces._asdict(),
            "action_low": None if known is None else known.action_low.tolist(),
            "action_high": None if known is None else known.action_high.tolist(),
            "versions": checkpoints.versions() | versions(),
            "dataset": {
                "source": None if first is None else first.source,
                "transitions": 0 if first is None else len(first),
                "shards": len(self.shards),
                "windows_within_episodes": None if first is None else self.windows(first),
                "versions": {} if first is None else dict(first.versions),
            },
        }

    def _start_facts(self, seed: int) -> dict[str, Any]:
        if seed in self.weights:
            return {DIGEST: self.weights[seed].digest}
        if seed not in self.behaviours:
            return {}
        return {
            **self.behaviours[seed].facts,
            "freeze_behaviour": self.config.freeze_behaviour,
        }


def resolve(
    config: TrainConfig, environment: Factory | None = None, dataset: Dataset | None = None
) -> TrainingSetup:
    """Find task, agent, options and device, and load the first shard of the data.

    Arguments:
        config: options of the training.
        environment, dataset: environment and data in place of the task's, see
            `applications.rl.training.train.train`.

    Raises:
        ValueError: a task, agent, preset or device is unknown, the options are of another agent,
            there are no data or fewer rows than a window needs, or the behaviour does not fit.
        FileNotFoundError, CheckpointError: there is no such behaviour, or its file is damaged.
        ImportError: a package that the task needs is not installed.
    """
    expected = find_agent(config.agent).config_class
    options, task = config.options, None
    own_data = dataset is not None or (config.data is not None and config.data.suffix == ".npz")
    if environment is None:
        try:
            task = find_task(config.task)
            environment = partial(make_environment, task)
        except ValueError:
            # Data of one's own need no environment where nothing is played; the task is a name.
            if config.eval_every or config.online_steps or not own_data or options is None:
                raise
            environment = _no_environment
        if options is None and task is not None:
            options = preset(config.agent, task, config.preset)
    if options is None:
        raise ValueError("options must be given where environment is given")
    if type(options) is not expected:
        raise ValueError(
            f"options of agent {config.agent!r} must be a {expected.__name__}, "
            f"got a {type(options).__name__}"
        )
    kernel_identity(options)  # refuse a kernel of one's own before any work
    _check_loggers(config)
    device = choose_device(config.device)
    if config.cuda_graphs and device.type != "cuda":
        raise ValueError(
            f"cuda_graphs must be 0 on device {device}, got {config.cuda_graphs}: it needs cuda"
        )
    if config.precision == "tf32" and device.type != "cuda":
        raise ValueError(
            f"precision must be float32 or bfloat16 on device {device}, got 'tf32': it needs cuda"
        )
    shards: Shards = ()
    if dataset is not None:
        shards = [dataset]
    elif config.use_data and config.data is not None and config.data.suffix == ".npz":
        shards = [load_npz(config.data)]
    elif config.use_data:
        _check_folder(config.data)
        shards = load_shards(find_task(config.task), folder=config.data)
    first = shards[0] if len(shards) else None
    if config.cuda_graphs and len(shards) > 1:
        raise ValueError(
            f"cuda_graphs must be 0 where the data are shards, which the host exchanges, got "
            f"{config.cuda_graphs}; --data names a folder that holds a single file"
        )
    checked = None
    if first is not None:
        check_windows(first.terminals, options.horizon)
        if first is dataset:
            note_breaks(
                first.observations, first.next_observations, first.terminals, options.horizon
            )
        if task is not None:
            checked = task_environment(task)
            check_spaces(first, checked)
    if first is None and config.start_training < options.horizon:
        raise ValueError(
            f"start_training must be at least the horizon, {options.horizon}, where no data are "
            f"used, got {config.start_training}"
        )
    if (
        config.balanced_sampling
        and config.online_steps > 0
        and (config.start_training < options.horizon)
    ):
        raise ValueError(
            f"start_training must be at least the horizon, {options.horizon}, where half of "
            f"a batch is of online transitions, got {config.start_training}"
        )
    behaviours = find_behaviours(config)
    spaces = None if first is None else Spaces(first.observation_dim, first.action_dim)
    check_behaviours(behaviours, config, options, spaces)
    weights = find_weights(config)
    for each in {id(each): each for each in weights.values()}.values():
        each.check(config.agent, options, spaces)
    return TrainingSetup(
        config, options, environment, shards, first, device, behaviours, weights, checked
    )


def _no_environment() -> gymnasium.Env:
    raise RunError("this training has data alone, and no environment")


def _check_loggers(config: TrainConfig) -> None:
    """Refuse loggers whose packages are missing, before a run of the folder is overwritten.

    Raises:
        ImportError: naming the option and the package.
    """
    for asked, module, package in (
        (config.wandb is not None, "wandb", "wandb (0.19.10 or newer)"),
        (config.tensorboard, "torch.utils.tensorboard", "tensorboard"),
    ):
        try:
            _ = import_module(module) if asked else None
        except ImportError as error:
            raise ImportError(f"{package.split()[0]}: needs: pip install {package}") from error


def _check_folder(path: Path | None) -> None:
    """Refuse a path of data that is a file but no .npz file.

    Raises:
        ValueError: the path is a file, or has a suffix and is no folder.
    """
    if path is not None and (path.is_file() or (path.suffix and not path.is_dir())):
        raise ValueError(f"data must be a folder or an .npz file, got {str(path)!r}")


class ShardRotation:
    """Loads one shard of the data after the other into a replay, as a function of the update.

    Shards also rotate online, as in the published code; the collected rows stay.

    Arguments:
        replay: a replay that holds the first shard.
        shards: the shards by number.
        every: number of updates on each shard.
    """

    def __init__(self, replay: Replay, shards: Shards, every: int) -> None:
        self.replay, self.shards, self.every = replay, shards, every
        self.current = 0

    def __call__(self, update: int) -> None:
        """Load the shard of ``update`` into the replay, if it is not there."""
        wanted = update // self.every % len(self.shards)
        if wanted != self.current:
            self.replay.replace_offline(self.shards[wanted])
            self.current = wanted
