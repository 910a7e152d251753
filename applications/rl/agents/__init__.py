"""Agents: a file each, which adds up losses; their options, networks and rollouts; their names.

`applications.rl` exports what users of agents and authors of new ones need.
"""

from applications.rl.agents.registry import (
    AGENTS,
    AgentLike,
    UntrustedAgentError,
    agent_name,
    find_agent,
    make_agent,
)

__all__ = [
    "AGENTS",
    "AgentLike",
    "UntrustedAgentError",
    "agent_name",
    "find_agent",
    "make_agent",
]
