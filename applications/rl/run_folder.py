"""The folder of a run, one per seed, and how an agent is read back from it.

    config.json      task, agent, seed and all options as they were resolved; versions; the data
    metrics.csv      metrics of the updates (`flows.training.CSVLogger`)
    evaluation.csv   step, phase, success, episodes, return, length
    checkpoint.pt    weights and everything that a resume needs
    snapshot.pt      weights whose evaluation beside training has not come yet
    tensorboard/     training and evaluation, if asked for
    wandb.txt        identity of the run at Weights & Biases, if asked for
    worker.json, finished.json, error.txt    of a sweep (`applications.rl.sweep.folders`)

The checkpoint also says what it belongs to, so that it is of use without its folder.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from applications.common import lock
from applications.common import run_folder as common
from applications.common.objects import is_reference
from applications.common.run_folder import CONFIG, RunFiles, write_config
from applications.rl.agents import AgentLike, UntrustedAgentError, find_agent, make_agent
from applications.rl.agents.base import Agent, AgentConfig
from applications.rl.agents.chain_kernel import own_kernel
from applications.rl.agents.pretrained import PretrainedActor, put_in_place
from applications.rl.environments.spaces import Spaces
from applications.rl.training.config import TrainConfig
from flows import __version__
from flows.training import CheckpointError, ensure_writable
from flows.training import checkpoint as checkpoints

__all__ = ["CONFIG", "write_config"]

METRICS = "metrics.csv"
EVALUATION = "evaluation.csv"
CHECKPOINT = "checkpoint.pt"
SNAPSHOT = "snapshot.pt"
BEHAVIOUR_MODULE = "behaviour_module"
"""Fact of a checkpoint that names a flow policy from outside this package, its behaviour."""
TENSORBOARD = "tensorboard"
WANDB = "wandb.txt"

FILES = RunFiles(
    checkpoints=(CHECKPOINT,),
    outputs=(SNAPSHOT, METRICS, EVALUATION),
    marker="offline_steps",
    renamed=TrainConfig.renamed,
)


@dataclass(frozen=True, eq=False)
class TrainedAgent:
    """A trained agent, read from a checkpoint.

    Attributes:
        agent: the agent, in evaluation mode.
        name: name of the agent, short or ``module:Name``.
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


def locked(folder: Path) -> AbstractContextManager[None]:
    """Keep other trainings out of a folder while the body runs.

    Raises:
        RunError: another process trains the run.
    """
    return lock.locked(folder, holder="another training")


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


def option_defaults(config: AgentConfig) -> dict[str, Any]:
    """Return the facts of an identity that a checkpoint of before an option existed stands for."""
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(config)
    }
    return {
        f"options.{name}": _plain(value) for name, value in defaults.items() if value is not MISSING
    }


def run_folders(path: Path) -> list[Path]:
    """List the folders with a checkpoint at ``path`` and below, in order."""
    return sorted(file.parent for file in path.rglob(CHECKPOINT))


def find_checkpoint(path: Path, option: str = "checkpoint") -> Path:
    """Return the checkpoint file at ``path``, which is the file or the folder of a run.

    Arguments:
        path: the file or folder.
        option: the option that named it, for the message.

    Raises:
        FileNotFoundError: there is none; the message names runs in folders below.
    """
    file = path / CHECKPOINT if path.is_dir() else path
    if not file.exists():
        below = run_folders(path)
        hint = f"; name a run below it, such as {below[0]}" if below else ""
        raise FileNotFoundError(f"{option}: there is no {str(file)!r}{hint}")
    return file


def load_agent(
    path: str | Path,
    device: torch.device | str = "cpu",
    *,
    agent: AgentLike | None = None,
    kernel: str | None = None,
    behaviour: object = None,
) -> TrainedAgent:
    """Load the agent of a checkpoint file or of a run folder.

    A checkpoint is data: loading it imports no module that it names.  An agent from outside this
    package is loaded only if the program has imported its module, or if ``agent`` names it, and so
    is a kernel from outside, which ``kernel`` names.

    Arguments:
        path: the checkpoint, or the folder of a run.
        device: where the agent is put.
        agent: the agent from outside this package that the checkpoint may hold, as ``module:Name``
            (its module is imported), as its class, or by options of it.
        kernel: the kernel from outside this package that the agent may have, as ``module:Name``.
        behaviour: the flow policy from outside this package that is the agent's behaviour, as
            ``module:Name`` or the object itself.

    Raises:
        FileNotFoundError: there is none; the message names runs in folders below.
        CheckpointError: the file is damaged, is no checkpoint of an agent, or holds an agent from
            outside this package whose module is not imported.
        ValueError: there is no such ``agent``.
    """
    path = find_checkpoint(Path(path))
    allowed = None if agent is None else find_agent(agent)
    state = checkpoints.load(path)
    try:
        identity = state["identity"]
        name = identity["agent"]
        options: dict[str, Any] = {
            key.removeprefix("options."): tuple(value) if isinstance(value, list) else value
            for key, value in identity.items()
            if key.startswith("options.")
        }
        config_class = _stored_agent(path, name, allowed).config_class
        _check_options(path, state, config_class, options)
        config = config_class(**options)
        _check_kernel(path, config, kernel)
        made = make_agent(config, identity["observation_dim"], identity["action_dim"])
        _restore_behaviour(path, made, identity.get(BEHAVIOUR_MODULE), behaviour)
        _check_networks(path, state, made)
        made.load_state_dict(state["module"])
        trained = TrainedAgent(
            made.to(device), name, identity["task"], state["iteration"], identity
        )
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is no checkpoint of an agent of this version: {type(error).__name__}: "
            f"{' '.join(str(error).split())}; it was written by {checkpoints.writer(state)}"
        ) from error
    trained.agent.eval().requires_grad_(False)
    return trained


def _stored_agent(path: Path, name: str, allowed: type[Agent] | None) -> type[Agent]:
    """Return the class that a checkpoint names, without importing a module for it.

    Arguments:
        allowed: the class that the user has named, which may lie in another module by now.

    Raises:
        CheckpointError: the name is of an agent from outside that is neither allowed nor imported.
        ValueError: there is no agent of that name.
    """
    class_name = name.partition(":")[2]  # none where the name is a short one
    if allowed is not None and class_name == allowed.__qualname__:
        return allowed
    try:
        return find_agent(name, importing=False)
    except UntrustedAgentError as error:
        raise CheckpointError(
            f"{path}: {error}; if you trust it, name it: --agent {name}, or in Python "
            f"agent={name!r}"
        ) from error


def _check_options(
    path: Path,
    state: Mapping[str, Any],
    config_class: type[AgentConfig],
    options: Mapping[str, Any],
) -> None:
    """Refuse options that the agent does not have, as those of another version may be.

    Raises:
        CheckpointError: naming the options and the version that wrote them.
    """
    unknown = sorted({*options} - {field.name for field in fields(config_class)})
    if unknown:
        raise CheckpointError(
            f"{path} has options that {config_class.__name__} of version {__version__} does not "
            f"have: {', '.join(unknown)}; it was written by {checkpoints.writer(state)}"
        )


def _check_networks(path: Path, state: Mapping[str, Any], agent: Agent) -> None:
    """Refuse weights of other networks than those of the agent.

    Raises:
        CheckpointError: naming the networks and the version that wrote them.
    """
    stored = {name.partition(".")[0] for name in state["module"]}
    own = {name.partition(".")[0] for name in agent.state_dict()}
    if stored != own:
        raise CheckpointError(
            f"{path} has other networks or buffers than the agent of version {__version__}: it "
            f"lacks {_listed(own - stored)}, and has {_listed(stored - own)} besides; it was "
            f"written by {checkpoints.writer(state)}"
        )


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _check_kernel(path: Path, config: AgentConfig, allowed: str | None) -> None:
    """Refuse a kernel that only the checkpoint names, for importing its module runs its code.

    Raises:
        CheckpointError: the kernel is from outside this package, and neither allowed nor imported.
    """
    named = own_kernel(config)
    if named not in (None, allowed) and str(named).partition(":")[0] not in sys.modules:
        raise CheckpointError(
            f"{path}: the kernel {named!r} is not part of this package, and its module is not "
            "imported unasked, for that runs its code; if you trust it, name it: "
            f"--kernel {named}, or in Python kernel={named!r}"
        )


def _restore_behaviour(path: Path, agent: Agent, named: str | None, given: object) -> None:
    """Make the behaviour of an agent that comes from outside this package again.

    Raises:
        CheckpointError: only the checkpoint names it, and its module is not imported.
        ValueError: there is no such flow policy.
    """
    if named is None:
        return
    if given is None and not is_reference(named):
        raise CheckpointError(
            f"{path}: the behaviour is {named}: give it again, in Python as behaviour="
        )
    if given is None and named.partition(":")[0] not in sys.modules:
        raise CheckpointError(
            f"{path}: the behaviour {named!r} is not part of this package, and its module is not "
            "imported unasked, for that runs its code; if you trust it, name it: "
            f"--behaviour {named}, or in Python behaviour={named!r}"
        )
    put_in_place(agent, PretrainedActor(named if given is None else given))


def full_disk_explained(folder: Path) -> AbstractContextManager[None]:
    """Make the error of a full disk say how to go on.

    Raises:
        OSError: instead, naming the folder of the run and how to go on.
    """
    return common.full_disk_explained(folder, CHECKPOINT)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
