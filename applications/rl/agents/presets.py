r"""Options of an agent for a task.

``published``: networks and protocol of Li and Levine (arXiv 2601.14234), and the values they tuned
for each of ten domains (`TUNED`, their appendix on hyperparameters).  A domain that is not among
them takes the values of its nearest neighbour in `NEAREST`; one with none, such as an environment
of one's own, the general defaults of the agent's configuration.  Horizon and discount are those of
the task.

``small``: the same but for networks that a laptop trains, 3 layers of 128 and two critics.  τ, α
and the other values carry over: they weigh a Q of the same scale.  Domains in `RECIPES` have a
recipe of their own instead, found by trial on one core and judged by `benchmarks.rl`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from applications.rl.agents import find_agent
from applications.rl.agents.base import AgentConfig, require

SIZES: dict[str, dict[str, Any]] = {
    "published": {},
    "small": {"hidden": (128, 128, 128), "critics": 2},
}
"""What a preset of that name sets besides the values of the domain."""

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

MAZE_AGENTS: dict[str, dict[str, Any]] = {
    "qam": {"inverse_temperature": 1.0},
    "qam-e": {"inverse_temperature": 1.0},
    "qam-f": {"inverse_temperature": 1.0, "alpha": 10.0},
    "fql": {"alpha": 10.0},
    "bam": {"inverse_temperature": 10.0},
}
"""What an agent sets there in place of the value of its domain."""

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

CUBE_AGENTS: dict[str, dict[str, Any]] = {
    "qam": {"inverse_temperature": 1.0},
    "qam-e": {"inverse_temperature": 1.0},
    "qam-f": {"inverse_temperature": 1.0, "alpha": 300.0},
    "fql": {"alpha": 300.0},
}
"""What an agent sets there in place of the value of its domain."""

RECIPES = {"pointmaze-medium": (MAZE, MAZE_AGENTS), "cube-single": (CUBE, CUBE_AGENTS)}
"""What ``small`` sets besides, by domain: for all agents, and for single ones."""

DOMAINS = (
    "puzzle-3x3",
    "scene",
    "cube-double",
    "antmaze-large",
    "humanoidmaze-medium",
    "cube-triple",
    "cube-quadruple",
    "puzzle-4x4",
    "antmaze-giant",
    "humanoidmaze-large",
)
"""The tuned domains, in the order of the columns of `TUNED`."""

TUNED: dict[str, dict[str, tuple[float, ...]]] = {
    "bc": {},
    "qam": {"inverse_temperature": (3, 1, 1, 10, 3, 3, 1, 30, 3, 3)},
    "qam-e": {
        "inverse_temperature": (1, 1, 1, 1, 3, 3, 3, 0.1, 10, 3),
        "edit_scale": (0.1, 0, 0, 0.1, 0.1, 0.1, 0.1, 0.9, 0.1, 0.1),
    },
    "qam-f": {
        "inverse_temperature": (3, 1, 1, 3, 1, 10, 0.3, 3, 3, 0.3),
        "alpha": (0, 300, 0, 30, 30, 300, 30, 3, 30, 30),
    },
    "fql": {"alpha": (300, 300, 300, 3, 30, 30, 100, 1, 3, 30)},
    "ifql": {"expectile": (0.95, 0.9, 0.9, 0.9, 0.7, 0.95, 0.95, 0.9, 0.8, 0.8)},
    "bam": {"inverse_temperature": (10, 10, 10, 30, 10, 30, 10, 30, 30, 30)},
}
"""Options of each agent by domain."""

NEAREST = {
    "cube-single": "cube-double",
    "cube-octuple": "cube-quadruple",
    "puzzle-4x5": "puzzle-4x4",
    "puzzle-4x6": "puzzle-4x4",
    "pointmaze-medium": "antmaze-large",
    "pointmaze-large": "antmaze-large",
    "pointmaze-teleport": "antmaze-large",
    "pointmaze-giant": "antmaze-giant",
    "antmaze-medium": "antmaze-large",
    "antmaze-teleport": "antmaze-large",
    "antsoccer-arena": "antmaze-large",
    "antsoccer-medium": "antmaze-large",
    "humanoidmaze-teleport": "humanoidmaze-medium",
    "humanoidmaze-giant": "humanoidmaze-large",
}
"""Whose values a domain takes that was not tuned."""


class HasProtocol(Protocol):
    """What a preset reads of a task."""

    @property
    def domain(self) -> str:
        """The environment, as in `DOMAINS`."""
        ...

    @property
    def horizon(self) -> int:
        """Chunk length h."""
        ...

    @property
    def discount(self) -> float:
        """γ."""
        ...


def preset(agent_name: str, task: HasProtocol, name: str = "published") -> AgentConfig:
    """Options of an agent for a task; change single ones with `dataclasses.replace`.

    Arguments:
        agent_name: of `applications.rl.agents.AGENTS`.
        task: anything with a domain, a horizon and a discount.
        name: of `SIZES`.

    Raises:
        ValueError: an unknown agent or preset.
    """
    config_class, _ = find_agent(agent_name)
    require(name in SIZES, "preset", name, f"one of {', '.join(SIZES)}")
    options: dict[str, Any] = dict(SIZES[name])
    domain = NEAREST.get(task.domain, task.domain)
    if domain in DOMAINS:
        column = DOMAINS.index(domain)
        options |= {option: float(values[column]) for option, values in TUNED[agent_name].items()}
    if domain.startswith("humanoidmaze"):
        options["rho"] = 0.0
    if name == "small":
        shared, own = RECIPES.get(task.domain, ({}, {}))
        options |= shared | own.get(agent_name, {})
    config = config_class(horizon=task.horizon, discount=task.discount)
    return replace(config, **{key: value for key, value in options.items() if hasattr(config, key)})
