"""Tilting problems whose base flow, exact tilt and optimal velocity are known.

Names say which problem to make:

    TARGET/REWARD           a target of the toy application in the plane under one of its rewards
    mixture-2d, -8d, -32d   a random Gaussian mixture under a quadratic reward
    the names of `hard`     narrow or rare modes, a strong reward, many dimensions
    random-SEED-INDEX       one of the problems that a seed draws (`random_mixture`)

In the plane the tilt is known by quadrature (`plane`), elsewhere in closed form (`closed_form`).
"""

from benchmarks.common.problems.closed_form import closed_form_problem
from benchmarks.common.problems.hard import HARD
from benchmarks.common.problems.mixtures import MIXTURE_DIMS, mixture_problem
from benchmarks.common.problems.plane import (
    PLANE_REWARDS,
    PLANE_TARGETS,
    grid_velocity,
    plane_problem,
)
from benchmarks.common.problems.problem import Problem
from benchmarks.common.problems.random_mixture import random_name, random_problem

__all__ = [
    "Problem",
    "closed_form_problem",
    "grid_velocity",
    "hard_names",
    "make_problem",
    "mixture_problem",
    "names",
    "random_name",
]


def names() -> list[str]:
    """Return the names of the moderate problems: in the plane, then mixtures by dimension."""
    plane = [f"{target}/{reward}" for target in PLANE_TARGETS for reward in PLANE_REWARDS]
    return plane + [f"mixture-{dim}d" for dim in MIXTURE_DIMS]


def hard_names() -> list[str]:
    """Return the names of the hard problems."""
    return list(HARD)


def make_problem(name: str) -> Problem:
    """Make the problem called ``name``.

    Raises:
        ValueError: the name is unknown; the message lists the known names.
    """
    if name in HARD:
        return HARD[name](name)
    if name in names():
        if name.startswith("mixture-"):
            return mixture_problem(int(name.removeprefix("mixture-").removesuffix("d")))
        return plane_problem(*name.split("/"))
    if name.startswith("random-"):
        return random_problem(name)
    known = ", ".join([*names(), *hard_names()])
    raise ValueError(f"unknown problem {name!r}; expected one of {known}, random-SEED-INDEX")
