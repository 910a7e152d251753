"""The agents by name: each file says only what is its own."""

from __future__ import annotations

import torch

from applications.rl.agents.bam import BAM, BAMConfig
from applications.rl.agents.base import Agent, AgentConfig
from applications.rl.agents.bc import BC, BCConfig
from applications.rl.agents.fql import FQL, FQLConfig
from applications.rl.agents.ifql import IFQL, IFQLConfig
from applications.rl.agents.qam import QAM, QAMConfig
from applications.rl.agents.qam_e import QAME, QAMEConfig
from applications.rl.agents.qam_f import QAMF, QAMFConfig

AGENTS: dict[str, tuple[type[AgentConfig], type[Agent]]] = {
    "bc": (BCConfig, BC),
    "qam": (QAMConfig, QAM),
    "qam-e": (QAMEConfig, QAME),
    "qam-f": (QAMFConfig, QAMF),
    "fql": (FQLConfig, FQL),
    "ifql": (IFQLConfig, IFQL),
    "bam": (BAMConfig, BAM),
}


def find_agent(name: str) -> tuple[type[AgentConfig], type[Agent]]:
    """Configuration and class of an agent.

    Raises:
        ValueError: an unknown name.
    """
    if name not in AGENTS:
        raise ValueError(f"agent must be one of {', '.join(AGENTS)}, got {name!r}")
    return AGENTS[name]


def make_agent(
    name: str, config: AgentConfig, observation_dim: int, action_dim: int, seed: int = 0
) -> Agent:
    """A new agent, on the CPU, whose weights depend on the seed alone.

    Raises:
        TypeError: ``config`` is not of the agent's own class.
        ValueError: an unknown name, or a size that is not positive.
    """
    config_class, agent_class = find_agent(name)
    if not isinstance(config, config_class):
        raise TypeError(
            f"config of agent {name!r} must be a {config_class.__name__}, "
            f"got {type(config).__name__}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return agent_class(config, observation_dim, action_dim)
