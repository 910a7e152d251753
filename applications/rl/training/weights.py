"""The option ``weights`` of a training: all networks of a trained agent start another training.

``weights`` names the folder of a run of the agent.  Its networks, target networks, running states,
and its mean and deviation of observations are the first ones of the new agent; the optimiser, the
replay, the random numbers and the count of steps are new.  So training goes on from an agent on
other data, on another task of equal sizes, or in another phase.

The checkpoint of the new run holds everything from its first update on.  A resume therefore does
not read the weights again: the folder of the run recorded which ones they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from applications.common.run_folder import read_config
from applications.rl import run_folder
from applications.rl.agents import make_agent
from applications.rl.agents.base import Agent, AgentConfig
from applications.rl.environments.spaces import Spaces
from applications.rl.training.behaviour import SHARED
from applications.rl.training.config import TrainConfig
from flows import fingerprint
from flows.training import CheckpointError
from flows.training import checkpoint as checkpoints

DIGEST = "weights_digest"


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of a trained agent, or only their digest where a run is resumed.

    Attributes:
        source: folder or file of the run, for messages.
        digest: 16 hexadecimal digits that identify them.
        identity: facts of the checkpoint, see `applications.rl.run_folder.describe_identity`.
        module: state of the agent; None where a resumed checkpoint holds what became of it.
    """

    source: str
    digest: str
    identity: Mapping[str, Any] = field(default_factory=dict)
    module: Mapping[str, Tensor] | None = None

    @classmethod
    def load(cls, source: str) -> Weights:
        """Read the weights of a run, from its folder or checkpoint.

        Raises:
            FileNotFoundError: there is none; the message names runs in folders below.
            CheckpointError: the file is damaged, or is no checkpoint of an agent.
            ValueError: a part of the agent is from outside this package.
        """
        path = run_folder.find_checkpoint(Path(source), "weights")
        state = checkpoints.load(path)
        identity, module = state.get("identity"), state.get("module")
        if (
            not isinstance(identity, dict)
            or not isinstance(module, dict)
            or "agent" not in identity
        ):
            raise CheckpointError(f"weights: {path} is no checkpoint of an agent")
        if run_folder.BEHAVIOUR_MODULE in identity:
            raise ValueError(
                f"weights must name a run with a behaviour flow of this package, got {source!r}, "
                f"whose behaviour is {identity[run_folder.BEHAVIOUR_MODULE]}"
            )
        return cls(source, fingerprint(module), identity, module)

    def check(self, agent: str, options: AgentConfig, spaces: Spaces | None) -> None:
        """Refuse weights of another agent, of other sizes, or for other numbers as inputs.

        Arguments:
            agent: name of the agent that is to start from them.
            options: its options.
            spaces: sizes of observations and actions; None where they are not known yet.

        Raises:
            ValueError: naming each fact that differs, its value, and what was expected.
        """
        if self.module is None:
            return
        names = [*SHARED, *["horizon"] * options.action_chunking]
        stored = {**run_folder.option_defaults(options), **self.identity}
        has = {"agent": stored["agent"]} | {name: stored.get(f"options.{name}") for name in names}
        got: dict[str, object] = {"agent": agent} | {name: getattr(options, name) for name in names}
        if spaces is not None:
            has |= {name: stored.get(name) for name in Spaces._fields}
            got |= spaces._asdict()
        plain = {
            name: list(value) if isinstance(value, tuple) else value for name, value in got.items()
        }
        wrong = [name for name in has if has[name] != plain[name]]
        if wrong:
            expected = ", ".join(f"{name}={has[name]!r}" for name in wrong)
            values = ", ".join(f"{name}={plain[name]!r}" for name in wrong)
            raise ValueError(
                f"weights {self.source} has {expected}, as the agent must have, got {values}"
            )
        sizes = spaces or Spaces(*(int(stored[name]) for name in Spaces._fields))
        self.start(make_agent(options, *sizes))

    def start(self, agent: Agent) -> None:
        """Put the weights into an agent.

        Raises:
            ValueError: the agent has other networks.
        """
        if self.module is None:
            return
        try:
            agent.load_state_dict(self.module)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"weights {self.source} do not fit the agent: {reason}") from error


def find_weights(config: TrainConfig) -> dict[int, Weights]:
    """Find the weights that each seed starts from; empty if the option is not given.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: see `Weights.load`.
    """
    found: dict[str, Weights] = {}
    result: dict[int, Weights] = {}
    for seed in config.seeds:
        source = config.weights_run(seed)
        if source is None:
            continue
        recorded = _recorded(config, seed)
        if recorded is None and source not in found:
            found[source] = Weights.load(source)
        result[seed] = recorded or found[source]
    return result


def check_weights_exist(config: TrainConfig) -> None:
    """Refuse weights that name no run, without reading one.

    Raises:
        FileNotFoundError: naming what is missing.
    """
    for seed in config.seeds:
        source = config.weights_run(seed)
        if source is not None and _recorded(config, seed) is None:
            run_folder.find_checkpoint(Path(source), "weights")


def _recorded(config: TrainConfig, seed: int) -> Weights | None:
    """Return the weights of a run that will be resumed; None if the run is new or had others."""
    folder = config.run_folder(seed)
    if not (config.resume and (folder / run_folder.CHECKPOINT).exists()):
        return None
    known = read_config(folder)
    if known.get("weights") != str(config.weights) or DIGEST not in known:
        return None
    return Weights(str(config.weights), str(known[DIGEST]))
