"""Rewards of a task for data that were recorded without rewards.

OGBench's data hold positions, not rewards.  The rewards of a task follow from the distance of each
recorded state to the goal of the task, by OGBench's own ``relabel_dataset``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from applications.rl.data.manifest import DataError
from applications.rl.data.npz import Arrays, transitions
from applications.rl.environments.mujoco import import_ogbench
from applications.rl.environments.tasks import TASK_NUMBERS, Task


def positions(task: Task) -> list[str]:
    """Return the names of the arrays that determine the task's rewards."""
    buttons = ["button_states"] if task.environment.startswith(("scene", "puzzle")) else []
    return ["qpos", *buttons]


def task_rewards(task: Task, env: gymnasium.Env, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    """Compute rewards and masks (N,) of the transitions in ``arrays`` for the goal of ``env``.

    Both are functions of the state before the step; the mask is 0 where the state meets the goal.

    Raises:
        DataError: the recorded positions have other sizes than the environment's.
    """
    from ogbench.relabel_utils import relabel_dataset

    env.reset()
    simulator: Any = env.unwrapped
    widths = {"qpos": simulator.model.nq, "button_states": getattr(simulator, "_num_buttons", 0)}
    for name in positions(task):
        if arrays[name].shape[1] != widths[name]:  # OGBench's function would broadcast
            raise DataError(
                f"{name} has the shape {arrays[name].shape}, but {task.environment} has "
                f"{widths[name]} components"
            )
    labelled = dict(arrays)
    relabel_dataset(task.environment_id, env, labelled)
    rewards = labelled["rewards"]
    if task.sparse:
        rewards = -(rewards != 0.0).astype(np.float32)
    return {"rewards": rewards, "masks": labelled["masks"]}


def success_fractions(task: Task, arrays: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Compute the fraction of states that meet each goal of the environment.

    Arguments:
        task: a task of the environment; its own goal does not matter.
        arrays: data in OGBench's layout.

    Returns:
        fractions as ``{"task1": ...}``.
    """
    import_ogbench()
    env = gymnasium.make(f"{task.environment}-singletask-v0", disable_env_checker=True)
    simulator: Any = env.unwrapped
    checked = transitions(arrays, task.dataset_name)
    fractions = {}
    for number in TASK_NUMBERS:
        simulator._reward_task_id = number
        fractions[f"task{number}"] = float((task_rewards(task, env, checked)["masks"] == 0).mean())
    return fractions
