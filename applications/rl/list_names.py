"""The command ``list``: names of tasks, agents and options."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields

from applications.rl.agents import AGENTS
from applications.rl.environments.tasks import ENVIRONMENTS, MANIPULATION


@dataclass(frozen=True)
class ListConfig:
    """List the names of the tasks, the agents and their options."""


def show_list(_: ListConfig) -> None:
    """Print the names, and how the name of a task is composed."""
    print("tasks: ENVIRONMENT-KIND-singletask-task{1..5}-v0; without -taskN, the default")
    print(f"  {'environment':<22}{'kinds':<30}default task, steps")
    for name, facts in ENVIRONMENTS.items():
        kinds = ", ".join(facts.kinds)
        print(f"  {name:<22}{kinds:<30}{facts.default_task}, {facts.max_steps}")
    print(
        f"  of {', '.join(MANIPULATION)} also ENVIRONMENT-sparse-KIND-...: reward -1 until success"
    )
    print(
        "  gym:ID any environment of gymnasium, minari:NAME a Minari dataset with its environment"
    )
    print("\nagents, and options with their general defaults (`train --help` shows the preset's)")
    for name, agent in AGENTS.items():
        summary = (inspect.getdoc(agent) or "").splitlines()[0].rstrip(".")
        print(f"  {name:<10}{summary} ({agent.page})")
        config = agent.config_class()
        own = [f"{field.name}={getattr(config, field.name)}" for field in fields(config)]
        print("\n".join(f"{'':<12}{option}" for option in own if own))
