"""The folder of a run, one per seed, and how an agent is read back from it.

    config.json      task, agent, seed and all options as they were resolved; versions; the data
    metrics.csv      metrics of the updates (`flows.training.callbacks.CSVLogger`)
    evaluation.csv   step, phase, success, episodes, return, length
    checkpoint.pt    weights and everything that a resume needs
    snapshot.pt      weights whose evaluation beside training has not come yet
    tensorboard/     training and evaluation, if asked for
    wandb.txt        identity of the run at Weights & Biases, if asked for
    worker.json, finished.json, error.txt    of a sweep (`applications.rl.sweep.folders`)

The checkpoint also says what it belongs to, so that it is of use without its folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from applications.common import run_folder as common
from applications.common.run_folder import CONFIG, RunFiles, write_config
from applications.rl.agents import find_agent, make_agent
from applications.rl.agents.base import Agent, AgentConfig
from applications.rl.environments.spaces import Spaces
from applications.rl.renamed import RENAMED
from flows.training import CheckpointError, ensure_writable
from flows.training import checkpoint as checkpoints

__all__ = ["CONFIG", "write_config"]

METRICS = "metrics.csv"
EVALUATION = "evaluation.csv"
CHECKPOINT = "checkpoint.pt"
SNAPSHOT = "snapshot.pt"
TENSORBOARD = "tensorboard"
WANDB = "wandb.txt"

FILES = RunFiles(
    checkpoints=(CHECKPOINT,),
    outputs=(SNAPSHOT, METRICS, EVALUATION),
    marker="offline_steps",
    renamed=RENAMED,
)


@dataclass(frozen=True, eq=False)
class TrainedAgent:
    """A trained agent, read from a checkpoint.

    Attributes:
        agent: the agent, in evaluation mode.
        name: name of the agent, a key of ``AGENTS``.
        task: name of the task it was trained on.
        updates: number of updates done.
        identity: what the checkpoint says it belongs to.
    """

    agent: Agent
    name: str
    task: str
    updates: int
    identity: dict[str, Any]


def claim(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse to write over a run; no file of it changes.

    Arguments:
        folder: the folder of the run.
        resume: whether it may continue a run.
        overwrite: whether it may take the place of a run.

    Raises:
        ValueError: see `applications.common.run_folder.check_free`.
        OSError: the folder cannot be written.
    """
    ensure_writable(folder / CHECKPOINT, "folder")
    common.check_free(folder, FILES, resume=resume, overwrite=overwrite)


def clear(folder: Path) -> None:
    """Remove checkpoint, snapshot, metrics and evaluations of an earlier run."""
    common.clear(folder, FILES)


def describe_identity(
    *, agent: str, task: str, config: AgentConfig, spaces: Spaces, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe what a checkpoint belongs to: enough to make the agent again, and ``facts``.

    Arguments:
        facts: plain values that must be the same at a resume, such as the seed.
    """
    options = {name: _plain(value) for name, value in asdict(config).items()}
    return {
        "agent": agent,
        "task": task,
        **spaces._asdict(),
        **facts,
        **{f"options.{name}": value for name, value in options.items()},
    }


def run_folders(path: Path) -> list[Path]:
    """List the folders with a checkpoint at ``path`` and below, in order."""
    return sorted(file.parent for file in path.rglob(CHECKPOINT))


def load_agent(path: str | Path, device: torch.device | str = "cpu") -> TrainedAgent:
    """Load the agent of a checkpoint file or of a run folder.

    Raises:
        FileNotFoundError: there is none; the message names runs in folders below.
        CheckpointError: the file is damaged, or is no checkpoint of an agent.
    """
    folder = path = Path(path)
    path = path / CHECKPOINT if path.is_dir() else path
    if not path.exists():
        below = run_folders(folder)
        hint = f"; name a run below it, such as {below[0]}" if below else ""
        raise FileNotFoundError(f"checkpoint: there is no {str(path)!r}{hint}")
    state = checkpoints.load(path)
    try:
        identity = state["identity"]
        name = identity["agent"]
        options: dict[str, Any] = {
            key.removeprefix("options."): tuple(value) if isinstance(value, list) else value
            for key, value in identity.items()
            if key.startswith("options.")
        }
        config = find_agent(name).config_class(**options)
        agent = make_agent(config, identity["observation_dim"], identity["action_dim"])
        agent.load_state_dict(state["module"])
        trained = TrainedAgent(
            agent.to(device), name, identity["task"], state["iteration"], identity
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is no checkpoint of an agent of this version: {type(error).__name__}: {error}"
        ) from error
    trained.agent.eval().requires_grad_(False)
    return trained


def full_disk_explained(folder: Path) -> AbstractContextManager[None]:
    """Make the error of a full disk say how to go on.

    Raises:
        OSError: instead, naming the folder of the run and how to go on.
    """
    return common.full_disk_explained(folder, CHECKPOINT)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
