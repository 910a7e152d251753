r"""Options of an agent for a task.

``published``: networks and protocol of Li and Levine (arXiv 2601.14234), and the values they tuned
for each of ten domains, which each agent's file holds (``Agent.published``).  A domain that is not
among them takes the values of its nearest neighbour (`applications.rl.agents.domains.NEAREST`); one
with none, such as an environment of one's own, the general defaults of the agent's configuration.
Horizon and discount are those of the task.

``small``: the same but for networks that a laptop trains, 3 layers of 128 and two critics.  τ, α
and the other values carry over: they weigh a Q of the same scale.  Domains in `RECIPES` have a
recipe of their own instead, found by trial on one core and evaluated by `benchmarks.rl`; what
single agents set there is in their files (``Agent.small``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Protocol

from applications.rl.agents.domains import NEAREST
from applications.rl.agents.options import AgentConfig, require
from applications.rl.agents.registry import AgentLike, find_agent

SIZES: dict[str, dict[str, Any]] = {
    "published": {},
    "small": {"hidden": (128, 128, 128), "critics": 2},
}
"""Sizes of the networks by the name of the preset."""

MAZE: dict[str, Any] = {
    "hidden": (128, 128),
    "horizon": 10,
    "flow_steps": 5,
    "observation_scale": 10.0,
    "target_rate": 0.02,
    "rho": 0.0,
    "lr": 1e-3,
}
"""Small agents in a maze of two coordinates.  Long chunks carry the value ten steps an update, and
coordinates several units wide let narrow networks tell one side of a wall from the other."""

CUBE: dict[str, Any] = {
    "hidden": (128, 128),
    "critics": 6,
    "flow_steps": 5,
    "observation_scale": 8.0,
    "rho": 0.0,
    "lr": 1e-3,
}
"""Small agents with one cube.  The policy follows the gradient of the mean of the critics, and six
small ones give it less noise than two."""

RECIPES: Mapping[str, Mapping[str, Any]] = {"pointmaze-medium": MAZE, "cube-single": CUBE}
"""Options of all small agents by domain."""


class HasProtocol(Protocol):
    """The part of a task that a preset reads."""

    @property
    def domain(self) -> str:
        """Name the environment, as in `applications.rl.agents.domains.DOMAINS`."""
        ...

    @property
    def horizon(self) -> int:
        """Return the chunk length h."""
        ...

    @property
    def discount(self) -> float:
        """Return the discount γ per step."""
        ...


def preset(agent: AgentLike, task: HasProtocol, name: str = "published") -> AgentConfig:
    """Return the options of an agent for a task; change some with `dataclasses.replace`.

    Arguments:
        agent: a short name, ``module:Name``, a class of an agent, or any options of it.
        task: anything with a domain, a horizon and a discount.
        name: "published" or "small".

    Raises:
        ValueError: an unknown agent or preset.
    """
    found = find_agent(agent)
    require(name in SIZES, "preset", name, f"one of {', '.join(SIZES)}")
    options: dict[str, Any] = dict(SIZES[name])
    nearest = NEAREST.get(task.domain, task.domain)
    options |= found.published.get(task.domain, found.published.get(nearest, {}))
    if nearest.startswith("humanoidmaze"):
        options["rho"] = 0.0
    if name == "small":
        options |= {**RECIPES.get(task.domain, {}), **found.small.get(task.domain, {})}
    known = {one.name for one in fields(found.config_class)}
    config = found.config_class(horizon=task.horizon, discount=task.discount)
    return replace(config, **{key: value for key, value in options.items() if key in known})
