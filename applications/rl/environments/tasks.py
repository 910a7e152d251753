"""Tasks by name: an environment with its goal, its data, and the protocol of learning it.

The name of a single task of OGBench (https://arxiv.org/abs/2410.20092) has the parts

    pointmaze-medium-navigate-singletask-task1-v0
    environment      kind                number (absent: the environment's default task)

The environment determines the dynamics and the goals, the kind the behaviour in the data.
``sparse`` after the environment, as in ``scene-sparse-play-singletask-task2-v0``, is this package's
name for the reward rule r ← −1[r ≠ 0], offline and online: OGBench's manipulation rewards count the
objects that are not at their goals.  The published results of QAM on scene, puzzle-3x3 and
puzzle-4x4 belong to the sparse names; ``Task.published`` is the name in the published tables.

Two other forms are for problems of your own: ``gym:Pendulum-v1`` is any registered environment
with box spaces, learned online or from data of your own (``gym:MODULE:NAME`` imports a module
first, as in Gymnasium), and ``minari:NAME`` is a Minari dataset with the environment that it names
for evaluations, else the one it was recorded in.

Names are checked here before OGBench sees them, because its suggestions for a wrong name mislead.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from applications.common.errors import RunError
from applications.rl.environments.mujoco import import_ogbench, prepare_mujoco

if TYPE_CHECKING:
    from applications.rl.environments.wrappers import Standard

MANIPULATION = ("cube", "scene", "puzzle")
"""Families of environments whose reward counts objects, and which are learned in chunks."""


@dataclass(frozen=True)
class Environment:
    """Facts that all tasks of one environment share.

    Attributes:
        kinds: behaviours for which data are published.
        max_steps: number of steps after which an episode is cut.
        default_task: number of the task where a name has none.
        discount: γ of the published protocol.
    """

    kinds: tuple[str, ...]
    max_steps: int
    default_task: int
    discount: float = 0.99


MAZE = ("navigate", "stitch")
PLAY = ("play", "noisy")

ENVIRONMENTS: dict[str, Environment] = {
    "pointmaze-medium": Environment(MAZE, 1000, 1),
    "pointmaze-large": Environment(MAZE, 1000, 1),
    "pointmaze-giant": Environment(MAZE, 1000, 1, 0.995),
    "pointmaze-teleport": Environment(MAZE, 1000, 1),
    "antmaze-medium": Environment((*MAZE, "explore"), 1000, 1),
    "antmaze-large": Environment((*MAZE, "explore"), 1000, 1),
    "antmaze-giant": Environment(MAZE, 1000, 1, 0.995),
    "antmaze-teleport": Environment((*MAZE, "explore"), 1000, 1),
    "humanoidmaze-medium": Environment(MAZE, 2000, 1, 0.995),
    "humanoidmaze-large": Environment(MAZE, 2000, 1, 0.995),
    "humanoidmaze-giant": Environment(MAZE, 4000, 1, 0.995),
    "humanoidmaze-teleport": Environment(MAZE, 2000, 1, 0.995),
    "antsoccer-arena": Environment(MAZE, 1000, 4),
    "antsoccer-medium": Environment(MAZE, 1000, 4),
    "cube-single": Environment(PLAY, 200, 2),
    "cube-double": Environment(PLAY, 500, 2),
    "cube-triple": Environment(PLAY, 1000, 2),
    "cube-quadruple": Environment(PLAY, 1000, 2),
    "cube-octuple": Environment(PLAY, 1500, 2),
    "scene": Environment(PLAY, 750, 2),
    "puzzle-3x3": Environment(PLAY, 500, 4),
    "puzzle-4x4": Environment(PLAY, 500, 4),
    "puzzle-4x5": Environment(PLAY, 1000, 4),
    "puzzle-4x6": Environment(PLAY, 1000, 4),
}
"""OGBench's environments with state observations."""

TASK_NUMBERS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Task:
    """A task: an environment with its goal, its data, and its protocol.

    Attributes:
        name: the full name, see the module docstring.
        environment: first part of the name, such as ``pointmaze-medium``; for ``gym:`` and
            ``minari:`` the registered environment.
        kind: behaviour of the data, or ``gym`` or ``minari``.
        task_id: number of the goal; ``None`` is the environment's default.
        dataset_name: name of the data, such as ``pointmaze-medium-navigate-v0``.
        sparse: whether the reward is −1[r ≠ 0] instead of r.
        horizon: chunk length h of the protocol.
        discount: γ of the protocol.
        max_steps: number of steps after which an episode is cut; ``None`` for no limit.
    """

    name: str
    environment: str
    kind: str
    task_id: int | None
    dataset_name: str
    sparse: bool
    horizon: int
    discount: float
    max_steps: int | None

    @property
    def domain(self) -> str:
        """Key of the presets: the environment, without kind, number and reward."""
        return self.kind if self.kind in ("gym", "minari") else self.environment

    @property
    def goal(self) -> int | None:
        """Number of the goal with the default resolved; ``None`` outside OGBench."""
        known = ENVIRONMENTS.get(self.environment)
        return self.task_id if known is None else self.task_id or known.default_task

    @property
    def published(self) -> str:
        """Name in published tables: always with the number, never with ``sparse``."""
        if self.domain in ("gym", "minari"):
            return self.name
        return f"{self.environment}-{self.kind}-singletask-task{self.goal}-v0"

    @property
    def environment_id(self) -> str:
        """Name of the environment in the registry of Gymnasium."""
        if self.domain in ("gym", "minari"):
            return self.environment
        number = "" if self.task_id is None else f"-task{self.task_id}"
        return f"{self.environment}-singletask{number}-v0"


def task_names() -> list[str]:
    """Return all names of OGBench tasks, including the sparse ones."""
    return list(_tasks())


def find_task(name: str, *, importing: bool = True) -> Task:
    """Find a task by name.

    Arguments:
        name: a single-task name of OGBench, also with ``sparse`` after the environment; the
            name of a dataset (``cube-single-play-v0``; the default task); ``gym:ID`` or
            ``minari:NAME``.
        importing: whether the module of ``gym:MODULE:NAME`` may be imported, which runs its code;
            else the program must have imported it.

    Raises:
        ValueError: there is no such task; the message names similar ones.
    """
    prefix, _, rest = name.partition(":")
    if prefix == "gym" and rest:
        return _gym_task(rest, importing)
    if prefix == "minari" and rest:
        return _minari_task(rest)
    tasks = _tasks()
    full = name if "-singletask" in name else re.sub("-v0$", "-singletask-v0", name)
    if full not in tasks:
        raise ValueError(_unknown(name))
    return tasks[full]


def make_environment(task: Task, *, render: bool = False) -> Standard:
    """Make the environment of a task, wrapped as `Standard`.

    Arguments:
        task: a task from `find_task`.
        render: whether ``.render()`` will be called; see `prepare_mujoco`.

    Raises:
        ImportError: OGBench is not installed.
        ValueError: the spaces of the environment are not boxes of one dimension.
        RunError: ``render`` is set but rendering was switched off, see `prepare_mujoco`; or
            Gymnasium cannot make the environment, for example because a package is missing.
    """
    from applications.rl.environments.wrappers import Standard

    prepare_mujoco(render=render)
    import gymnasium

    options: dict[str, Any] = {}
    if task.kind == "gym":
        if render:
            options["render_mode"] = "rgb_array"
    elif task.kind != "minari":
        import_ogbench()
    try:
        if task.kind == "minari":
            import minari

            made = minari.load_dataset(task.dataset_name).recover_environment(eval_env=True)
        else:
            made = gymnasium.make(task.environment_id, disable_env_checker=True, **options)
    except gymnasium.error.Error as error:
        raise RunError(f"task {task.name!r} cannot be made: {error}") from error
    except (ValueError, ImportError) as error:
        if task.kind != "minari":
            raise
        raise RunError(
            f"the environment of task {task.name!r} cannot be made again ({error}); in Python, "
            "train(config, environment=MyEnv, dataset=load_minari(name)) takes one of your own"
        ) from error
    return Standard(made, sparse=task.sparse)


def _is_manipulation(environment: str) -> bool:
    return environment.startswith(MANIPULATION)


@functools.cache
def _tasks() -> dict[str, Task]:
    return {
        task.name: task
        for environment, facts in ENVIRONMENTS.items()
        for sparse in ((False, True) if _is_manipulation(environment) else (False,))
        for kind in facts.kinds
        for number in (None, *TASK_NUMBERS)
        for task in [_ogbench_task(environment, facts, kind, number, sparse)]
    }


def _ogbench_task(
    environment: str, facts: Environment, kind: str, number: int | None, sparse: bool
) -> Task:
    suffix = "" if number is None else f"-task{number}"
    return Task(
        name=f"{environment}{'-sparse' * sparse}-{kind}-singletask{suffix}-v0",
        environment=environment,
        kind=kind,
        task_id=number,
        dataset_name=f"{environment}-{kind}-v0",
        sparse=sparse,
        horizon=5 if _is_manipulation(environment) else 1,
        discount=facts.discount,
        max_steps=facts.max_steps,
    )


def _unknown(name: str) -> str:
    if name.startswith(("visual-", "powderworld")) or "oraclerep" in name:
        return (
            f"task {name!r} is not supported: observations must be state vectors of a single-task "
            "environment, not images or goals"
        )
    if "-sparse-" in name and name.replace("-sparse-", "-") in _tasks():
        return f"task {name!r}: rewards of mazes are sparse already; leave 'sparse' out"
    near = [task for task in _tasks() if name and task.startswith(name)]
    near += difflib.get_close_matches(name, _tasks(), n=4, cutoff=0.5)
    near = [*dict.fromkeys(near)][:4]
    hint = f"did you mean {', '.join(near)}?" if near else "a name is like cube-single-play-v0"
    return f"unknown task {name!r}; {hint}"


def _gym_task(environment: str, importing: bool) -> Task:
    import gymnasium

    module, colon, name = environment.rpartition(":")
    if colon and not importing and module not in sys.modules:
        raise ValueError(
            f"task 'gym:{environment}' names a module, which is not imported unasked, for that "
            f"runs its code; if you trust it, name it: --task gym:{environment}"
        )
    try:
        if colon:
            importlib.import_module(module)
        spec = gymnasium.spec(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"task 'gym:{environment}': there is no module {error.name!r} in the current folder or "
            "among the installed packages"
        ) from error
    except gymnasium.error.Error as error:
        raise ValueError(
            f"unknown task 'gym:{environment}'; gymnasium says: {error}; an "
            "environment of a module of your own is gym:MODULE:NAME, where the module registers "
            "the name: gymnasium.register(NAME, MyEnvironment, max_episode_steps=N)"
        ) from error
    return _own_task("gym", environment, environment, spec.max_episode_steps)


def _minari_task(dataset_name: str) -> Task:
    try:
        import minari
    except ImportError as error:
        raise ValueError(
            f"task 'minari:{dataset_name}' needs the package minari: pip install minari"
        ) from error
    try:
        data = minari.load_dataset(dataset_name)
        spec = getattr(data, "_eval_env_spec", None) or data.env_spec
    except Exception as error:  # a missing dataset raises many things
        raise ValueError(
            f"unknown task 'minari:{dataset_name}'; minari says: {type(error).__name__}: {error}"
        ) from error
    if spec is None:
        raise ValueError(
            f"the Minari dataset {dataset_name!r} does not name its environment; in Python, "
            "train(config, environment=MyEnv, dataset=load_minari(name)) takes one of your own"
        )
    return _own_task("minari", spec.id, dataset_name, spec.max_episode_steps)


def _own_task(kind: str, environment: str, dataset_name: str, max_steps: int | None) -> Task:
    return Task(
        name=f"{kind}:{dataset_name}",
        environment=environment,
        kind=kind,
        task_id=None,
        dataset_name=dataset_name,
        sparse=False,
        horizon=1,
        discount=0.99,
        max_steps=max_steps,
    )
