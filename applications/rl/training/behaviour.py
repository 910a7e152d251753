"""The option ``behaviour`` of a training: it finds a behaviour flow, checks it, and hands it over.

``behaviour`` names the folder of a run, of `bc` or of any agent with a behaviour flow.  Its weights
start those of the new agent (`applications.rl.agents.behaviour`), and its mean and deviation of
observations take the place of those of the data, so that the flow sees what it was fitted to.

The checkpoint of the new run holds everything from its first update on.  A resume therefore reads
no behaviour: the folder of the run recorded which one it was.

Or ``behaviour`` is a flow policy from outside this package, ``module:Name`` or an object, which
takes the place of the agent's own flow (`applications.rl.agents.pretrained`).  The checkpoint holds
its weights, and its name, by which it is made again.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from applications.common.run_folder import read_config
from applications.rl import run_folder
from applications.rl.agents import make_agent
from applications.rl.agents.base import Agent, AgentConfig
from applications.rl.agents.behaviour import freeze, start_from
from applications.rl.agents.pretrained import PretrainedActor, check_actor, describe, put_in_place
from applications.rl.environments.spaces import Spaces
from applications.rl.environments.tasks import find_task
from applications.rl.training.config import TrainConfig
from flows import fingerprint
from flows.training import CheckpointError
from flows.training import checkpoint as checkpoints

NORMALISER = ("observation_mean", "observation_deviation")
"""Buffers of an agent by which its networks see observations."""

BEHAVIOUR_MODULE = run_folder.BEHAVIOUR_MODULE

SHARED = ("hidden", "actor_layer_norm", "action_chunking", "observation_scale")
"""Options that an agent must share with the behaviour that it starts from."""


class Behaviour(Protocol):
    """A behaviour flow that agents start from."""

    @property
    def facts(self) -> dict[str, str]:
        """Return the facts that tell which one it is, such as a digest of its weights."""

    def check(self, options: AgentConfig, task: str, spaces: Spaces | None) -> None:
        """Refuse an agent of other sizes, or on another environment."""

    def start(self, agent: Agent) -> None:
        """Put the behaviour into an agent."""


@dataclass(frozen=True)
class Recorded:
    """The behaviour of a run that is resumed, whose checkpoint holds it."""

    digest: str

    @property
    def facts(self) -> dict[str, str]:
        """Return the digest of its weights."""
        return {"behaviour_digest": self.digest}

    def check(self, options: AgentConfig, task: str, spaces: Spaces | None) -> None:
        """Leave the comparison to the checkpoint."""

    def start(self, agent: Agent) -> None:
        """Leave the weights to the checkpoint."""


@dataclass(frozen=True, eq=False)
class Stored:
    """The behaviour flow of another run, read from its checkpoint.

    Attributes:
        source: folder or file that it was read from, for messages.
        identity: facts of the checkpoint, see `applications.rl.run_folder.describe_identity`.
        weights: state of the flow.
        normaliser: mean and deviation of observations, by their names in the agent.
    """

    source: str
    identity: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    normaliser: Mapping[str, Tensor]

    @classmethod
    def load(cls, source: str) -> Stored:
        """Read the behaviour flow of a run, from its folder or checkpoint.

        Raises:
            FileNotFoundError: there is none; the message names runs in folders below.
            CheckpointError: the file is damaged.
            ValueError: it holds no behaviour flow.
        """
        path = run_folder.find_checkpoint(Path(source), "behaviour")
        state = checkpoints.load(path)
        try:
            identity, module = state["identity"], state["module"]
            normaliser = {name: module[name] for name in NORMALISER}
            agent = identity["agent"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"behaviour: {path} is no checkpoint of an agent") from error
        weights = {
            name.removeprefix("behaviour."): value
            for name, value in module.items()
            if name.startswith("behaviour.")
        }
        if BEHAVIOUR_MODULE in identity:
            raise ValueError(
                f"behaviour must name a run with a behaviour flow of this package, got {source!r}, "
                f"whose behaviour is {identity[BEHAVIOUR_MODULE]}: name that"
            )
        if not weights:
            raise ValueError(
                f"behaviour must name a run with a behaviour flow, such as one of bc, got "
                f"{source!r} of agent {agent!r}, which has none"
            )
        return cls(source, identity, weights, normaliser)

    @cached_property
    def facts(self) -> dict[str, str]:
        """Return 16 hexadecimal digits that identify weights and normaliser."""
        return {"behaviour_digest": fingerprint({**self.weights, **self.normaliser})}

    def check(self, options: AgentConfig, task: str, spaces: Spaces | None) -> None:
        """Refuse an agent whose behaviour flow is another network, or sees other numbers.

        Warns where the behaviour was fitted to other data of the same environment.

        Arguments:
            options: options of the agent.
            task: name of its task.
            spaces: sizes of observations and actions; None where they are not known yet.

        Raises:
            ValueError: naming each option that differs, its value, and what was expected.
        """
        stored, own = self.identity, [*SHARED, *["horizon"] * options.action_chunking]
        expected = {name: _plain(stored.get(f"options.{name}")) for name in own}
        got = {name: getattr(options, name) for name in own}
        if spaces is not None:
            expected |= {name: stored.get(name) for name in Spaces._fields}
            got |= spaces._asdict()
        (environment, data), (own_environment, own_data) = map(_home, (stored["task"], task))
        expected["environment"], got["environment"] = environment, own_environment
        wrong = [name for name in expected if expected[name] != got[name]]
        if wrong:
            raise ValueError(
                f"behaviour {self.source} has {_pairs(expected, wrong)}, as the agent must have, "
                f"got {_pairs(got, wrong)}"
            )
        if data != own_data:
            warnings.warn(
                f"behaviour {self.source} was fitted to {data}, the agent learns from {own_data}",
                stacklevel=2,
            )

    def start(self, agent: Agent) -> None:
        """Put weights and normaliser into an agent.

        Raises:
            ValueError: the agent has no behaviour flow, or one of another architecture.
        """
        try:
            start_from(agent, self.weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"behaviour {self.source} does not fit the agent: {reason}") from error
        with torch.no_grad():
            for name, value in self.normaliser.items():
                agent.get_buffer(name).copy_(value)


@dataclass(frozen=True, eq=False)
class Foreign:
    """A flow policy from outside this package.

    Attributes:
        source: see `applications.rl.agents.pretrained.PretrainedActor`.
    """

    source: object

    @cached_property
    def actor(self) -> PretrainedActor:
        """Return the policy, loaded once.

        Raises:
            ValueError: there is no such policy.
        """
        return PretrainedActor(self.source)

    @cached_property
    def facts(self) -> dict[str, str]:
        """Return the name of the policy, and 16 hexadecimal digits that identify its weights."""
        digest = fingerprint(self.actor.state_dict())
        return {"behaviour_digest": digest, BEHAVIOUR_MODULE: describe(self.source)}

    def check(self, options: AgentConfig, task: str, spaces: Spaces | None) -> None:
        """Try the policy at the agent's sizes, where they are known.

        Raises:
            ValueError: see `applications.rl.agents.pretrained.check_actor`.
        """
        if spaces is not None:
            chunk_dim = options.chunk_length * spaces.action_dim
            check_actor(self.actor, spaces.observation_dim, chunk_dim)

    def start(self, agent: Agent) -> None:
        """Put the policy in the place of the agent's behaviour flow.

        Raises:
            ValueError: see `applications.rl.agents.pretrained.put_in_place`.
        """
        put_in_place(agent, self.actor)


def find_behaviours(config: TrainConfig) -> dict[int, Behaviour]:
    """Find the behaviour of each seed; empty if the option is not given.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: see `Stored.load`.
    """
    if config.behaviour is not None and config.behaviour_run(0) is None:
        return dict.fromkeys(config.seeds, Foreign(config.behaviour))
    found: dict[str, Stored] = {}
    result: dict[int, Behaviour] = {}
    for seed in config.seeds:
        source = config.behaviour_run(seed)
        if source is None:
            continue
        recorded = _recorded(config, seed)
        if recorded is None and source not in found:
            found[source] = Stored.load(source)
        result[seed] = recorded or found[source]
    return result


def check_behaviours_exist(config: TrainConfig) -> None:
    """Refuse a behaviour that names no run, without reading one.

    Raises:
        FileNotFoundError: naming what is missing.
    """
    for seed in config.seeds:
        source = config.behaviour_run(seed)
        if source is not None and _recorded(config, seed) is None:
            run_folder.find_checkpoint(Path(source), "behaviour")


def check_behaviours(
    behaviours: Mapping[int, Behaviour],
    config: TrainConfig,
    options: AgentConfig,
    spaces: Spaces | None,
) -> None:
    """Refuse behaviours that do not fit, by what can be known before any file changes.

    Arguments:
        behaviours: the behaviours by seed.
        config: options of the training.
        options: options of the agent.
        spaces: sizes of observations and actions; None where they are not known yet.

    Raises:
        ValueError: see `Behaviour.check` and `hand_over`.
    """
    for behaviour in {id(each): each for each in behaviours.values()}.values():
        behaviour.check(options, config.task, spaces)
    if behaviours:
        hand_over(behaviour, make_agent(options, *(spaces or _spaces(behaviour))), config)


def hand_over(behaviour: Behaviour, agent: Agent, config: TrainConfig) -> None:
    """Put a behaviour into a new agent, and freeze it where the options say so.

    Raises:
        ValueError: the agent has no behaviour flow, one of another architecture, or nothing to
            train beside it.
    """
    behaviour.start(agent)
    if config.freeze_behaviour:
        freeze(agent)


def _spaces(behaviour: Behaviour) -> Spaces:
    identity = behaviour.identity if isinstance(behaviour, Stored) else {}
    return Spaces(*(int(identity.get(name, 1)) for name in Spaces._fields))


def _recorded(config: TrainConfig, seed: int) -> Recorded | None:
    """Return the behaviour of a run that will be resumed; None if the run is new or has another."""
    folder = config.run_folder(seed)
    if not (config.resume and (folder / run_folder.CHECKPOINT).exists()):
        return None
    known = read_config(folder)
    if known.get("behaviour") != config.behaviour or "behaviour_digest" not in known:
        return None
    return Recorded(str(known["behaviour_digest"]))


def _home(task: str) -> tuple[str, str]:
    """Return environment and data of a task; its own name for both if it is not a known one."""
    try:
        found = find_task(task)
    except ValueError:
        return task, task
    return found.environment, found.dataset_name


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _pairs(values: Mapping[str, object], names: list[str]) -> str:
    return ", ".join(f"{name}={values[name]!r}" for name in names)
