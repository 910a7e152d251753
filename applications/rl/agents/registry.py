"""Agents by name: short names of those of this package, ``module:Name`` for all others.

An agent of one's own needs no registration.  In Python its class or a configuration is enough; on
the command line, ``module:Name`` imports the module and takes the class.  A name that was read from
a file must not do that, for importing a module runs its code: such a name is looked up with
``importing=False``, which takes the module only if the program has imported it already.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch

from applications.rl.agents.bam import BAM
from applications.rl.agents.base import Agent
from applications.rl.agents.bc import BC
from applications.rl.agents.cgql import CGQL
from applications.rl.agents.cgql_linex import CGQLLinex
from applications.rl.agents.cgql_mse import CGQLMSE
from applications.rl.agents.dac import DAC
from applications.rl.agents.dsrl import DSRL
from applications.rl.agents.fawac import FAWAC
from applications.rl.agents.fbrac import FBRAC
from applications.rl.agents.fedit import FEdit
from applications.rl.agents.fql import FQL
from applications.rl.agents.ifql import IFQL
from applications.rl.agents.options import AgentConfig
from applications.rl.agents.qam import QAM
from applications.rl.agents.qam_e import QAME
from applications.rl.agents.qam_f import QAMF
from applications.rl.agents.qsm import QSM
from applications.rl.agents.rebrac import ReBRAC
from applications.rl.agents.rlpd import RLPD
from applications.rl.agents.rql import RQL
from applications.rl.agents.sqam import SQAM
from applications.rl.agents.trqam import TRQAM

AGENTS: dict[str, type[Agent]] = {
    "bc": BC,
    "qam": QAM,
    "qam-e": QAME,
    "qam-f": QAMF,
    "fql": FQL,
    "ifql": IFQL,
    "bam": BAM,
    "fawac": FAWAC,
    "fbrac": FBRAC,
    "trqam": TRQAM,
    "sqam": SQAM,
    "cgql": CGQL,
    "cgql-mse": CGQLMSE,
    "cgql-linex": CGQLLinex,
    "rql": RQL,
    "fedit": FEdit,
    "dsrl": DSRL,
    "qsm": QSM,
    "dac": DAC,
    "rebrac": ReBRAC,
    "rlpd": RLPD,
}
"""The agents that have a short name."""

AgentLike = str | type[Agent] | AgentConfig
"""An agent as a short name, as ``module:Name``, as its class, or by options of its own."""


class UntrustedAgentError(ValueError):
    """A file names an agent whose module is not imported."""


def find_agent(agent: AgentLike, *, importing: bool = True) -> type[Agent]:
    """Return the class of an agent.

    Arguments:
        agent: see `AgentLike`.
        importing: import the module of ``module:Name``; otherwise it must be imported already.

    Raises:
        ValueError: there is no such agent, or options that belong to none.
        UntrustedAgentError: the module is not imported, and ``importing`` is False.
    """
    if isinstance(agent, AgentConfig):
        found = getattr(type(agent), "agent_class", None)
        if found is None:
            raise ValueError(f"no agent has config_class = {type(agent).__name__}")
        return found
    if isinstance(agent, type):
        return agent
    if agent in AGENTS:
        return AGENTS[agent]
    module_name, _, name = agent.partition(":")
    if not (module_name and name):
        raise ValueError(
            f"agent must be one of {', '.join(AGENTS)}, or module:Name of one of your own, "
            f"got {agent!r}"
        )
    module = _imported(module_name)
    if module is None and not importing:
        raise UntrustedAgentError(
            f"the agent {agent!r} is not part of this package, and its module is not imported "
            "unasked, for that runs its code"
        )
    if module is None:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if not f"{module_name}.".startswith(f"{error.name}."):
                raise  # of a package that the module itself needs
            raise ValueError(f"agent: there is no module {module_name!r} for {agent!r}") from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Agent)):
        raise ValueError(f"agent: {module_name} has no subclass of Agent named {name!r}")
    return found


def agent_name(agent: AgentLike) -> str:
    """Return the name by which `find_agent` finds an agent: a short one, or ``module:Name``."""
    found = find_agent(agent)
    for name, known in AGENTS.items():
        if found is known:
            return name
    module = found.__module__
    if module in ("__main__", "__mp_main__"):
        module = _name_of_main() or module
    return f"{module}:{found.__qualname__}"


def make_agent(agent: AgentLike, observation_dim: int, action_dim: int, seed: int = 0) -> Agent:
    """Make a new agent, on the CPU, whose weights depend on the seed alone.

    Arguments:
        agent: its options, or what `find_agent` finds, with the general defaults.
        observation_dim: size of an observation.
        action_dim: size of one action.
        seed: of the weights.

    Raises:
        ValueError: there is no such agent, or a size is not positive.
    """
    found = find_agent(agent)
    config = agent if isinstance(agent, AgentConfig) else found.config_class()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return found(config, observation_dim, action_dim)


def _imported(name: str) -> ModuleType | None:
    """Return a module that the program has imported, or that is the program itself."""
    if name == _name_of_main():
        return sys.modules["__main__"]
    return sys.modules.get(name)


def _name_of_main() -> str | None:
    """Return the name by which another program imports the running script."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        return str(spec.name)
    return None if file is None else Path(file).stem
