"""The behaviour flow of an agent: how an agent starts from weights that were fitted before.

The parts of an agent are known by the names of its attributes:

    behaviour           the flow fitted to the actions of the data
    target_behaviour    its target network, or None
    policy              where it is a `FlowActor` too, the tilt of the behaviour

An agent that starts from a behaviour has its weights in all three, so that the policy begins at the
flow that it is the tilt of.  With the option ``residual`` the policy is a correction of the
behaviour's velocity, and begins at zero.

A frozen behaviour is not trained: its weights require no gradient.  The behaviour loss is then a
number without gradient, which says how well the flow fits the data, and the target network stays
equal to the behaviour.

Source: the second stage of TRQAM (arXiv 2605.27079).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from applications.rl.agents.base import Agent
from applications.rl.agents.networks import FlowActor
from applications.rl.agents.registry import AgentLike, agent_name, find_agent, make_agent


def behaviour_of(agent: Agent) -> nn.Module:
    """Return the behaviour flow of an agent.

    Raises:
        ValueError: the agent has none.
    """
    network = getattr(agent, "behaviour", None)
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"behaviour must not be given with agent {agent_name(type(agent))!r}, which has no "
            "behaviour flow"
        )
    return network


def has_behaviour(agent: AgentLike) -> bool:
    """Return whether an agent has a behaviour flow.

    Raises:
        ValueError: there is no such agent.
    """
    small = replace(find_agent(agent).config_class(), hidden=(1,))
    return isinstance(getattr(make_agent(small, 1, 1), "behaviour", None), nn.Module)


def start_from(agent: Agent, weights: Mapping[str, Tensor]) -> None:
    """Put weights into the behaviour flow of an agent, its target network, and its policy flow.

    Arguments:
        agent: the agent, which changes.
        weights: state of a `FlowActor` of the agent's sizes.

    Raises:
        ValueError: the agent has no behaviour flow.
        RuntimeError: the weights are of another network.
    """
    behaviour_of(agent).load_state_dict(weights)
    target, policy = getattr(agent, "target_behaviour", None), getattr(agent, "policy", None)
    if target is not None:
        target.load_state_dict(weights)
    if isinstance(policy, FlowActor):
        if getattr(agent.config, "residual", False):
            policy.zero_output()
        else:
            policy.load_state_dict(weights)


def freeze(agent: Agent) -> None:
    """Keep the behaviour flow of an agent as it is during training.

    Raises:
        ValueError: the agent has no behaviour flow, or trains nothing else.
    """
    behaviour_of(agent).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in agent.parameters()):
        raise ValueError(
            f"freeze_behaviour must be off with agent {agent_name(type(agent))!r}, which trains "
            "nothing but its behaviour, got True"
        )
