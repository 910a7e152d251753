"""Experts for cubes, scene and puzzles, by the protocol of OGBench's published data.

OGBench's package has scripted experts ("oracles") that move one object to a target, but not the
script that chains them.  An episode of 1000 transitions chains targets: an expert for the kind of
object runs until it is done, then the environment draws the next target.

``play``: experts follow a plan made in advance, with temporally correlated noise (0.1).
``noisy``: closed-loop experts act with Gaussian noise on each action, whose scale ξ ~ U(0, 0.1) is
drawn per episode (three times larger for the yaw, ten times for the gripper), and a random action
with probability 0.1 (puzzles 0.2).

Cubes are stacked with a probability that is drawn per episode and grows with their number.  In the
scene, an episode in which the cube leaves the view of the camera is discarded and drawn anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from applications.common.errors import RunError
from applications.rl.environments.mujoco import import_ogbench
from applications.rl.environments.reproducible import NumpyStream, Reproducible, episode_seed
from applications.rl.environments.tasks import Task

NOISE = 0.1
"""Scale of the noise of the plans, and the largest scale ξ of the noisy experts."""
MIN_NORM = 0.4
"""Length of the shortest step of a closed-loop expert."""
STACKING = {
    "cube-single": (0.0, 0.0),
    "cube-double": (0.0, 0.25),
    "cube-triple": (0.05, 0.35),
    "cube-quadruple": (0.1, 0.5),
    "cube-octuple": (0.0, 0.35),
}
"""Range from which an episode draws the probability that a cube is put on another."""
_NOISE_SCALES = np.array([1.0, 1.0, 1.0, 3.0, 10.0])
_CUBE = slice(14, 17)
"""Position of the first cube in qpos."""
_ATTEMPTS = 100


class ManipulationCollector:
    """Plays episodes of OGBench's own experts in one manipulation environment.

    Arguments:
        task: task with the environment and the kind of behaviour; its goal does not matter.
    """

    def __init__(self, task: Task) -> None:
        import_ogbench()
        env = gymnasium.make(
            f"{task.environment}-v0",
            terminate_at_goal=False,
            mode="data_collection",
            disable_env_checker=True,
        )
        self.env = Reproducible(env.unwrapped)
        self.environment, self.noisy = task.environment, task.kind == "noisy"
        self.random_actions = self.protocol(task)["random_actions"]

    @staticmethod
    def protocol(task: Task) -> dict[str, Any]:
        """Return the facts that determine the data; ``episode`` is a number of transitions."""
        random_actions = 0.2 if task.environment.startswith("puzzle") else 0.1
        return {
            "expert": "OGBench's " + ("closed-loop" if task.kind == "noisy" else "planning"),
            "episode": 1000,
            "noise": NOISE,
            "random_actions": random_actions if task.kind == "noisy" else 0.0,
        }

    def episode(self, seed: int, transitions: int) -> dict[str, NDArray[Any]]:
        """Play one episode, a function of ``seed``; return it in OGBench's layout.

        Returns:
            observations (T+1, d), actions (T+1, 5), terminals (T+1,), qpos, qvel and, if there are
            buttons, button_states, where the last row is the state after the T-th transition, with
            an action without a next state.

        Raises:
            RunError: a hundred episodes in a row were discarded.
        """
        for attempt in range(_ATTEMPTS):
            episode = self._attempt(episode_seed(seed, attempt), transitions)
            if self.environment != "scene" or _is_visible(episode["qpos"][:, _CUBE]):
                return episode
        raise RunError(f"the expert lost sight of the cube in {_ATTEMPTS} episodes in a row")

    def _attempt(self, seed: int, transitions: int) -> dict[str, NDArray[Any]]:
        observation, info = self.env.reset(seed=seed)
        scene: Any = self.env.unwrapped
        rows: dict[str, list[Any]] = {}
        with NumpyStream(seed):  # OGBench's experts draw from numpy's global generator
            stacking = np.random.uniform(*STACKING.get(self.environment, (0.5, 0.5)))
            scale = np.random.uniform(0.0, NOISE) * _NOISE_SCALES * self.noisy
            experts = self._experts()
            expert = experts[info["privileged/target_task"]]
            expert.reset(observation, info)
            for _ in range(transitions + 1):
                if np.random.rand() < self.random_actions:
                    action = np.random.uniform(-1.0, 1.0, 5)
                else:
                    action = np.array(expert.select_action(observation, info))
                    action = action + scale * np.random.normal(size=5)
                action = np.clip(action, -1.0, 1.0).astype(np.float32)
                state = observation
                observation, _, _, _, info = scene.step(action)
                _append(rows, state, action, info)
                if expert.done:
                    fresh, target = scene.set_new_target(p_stack=stacking)
                    expert = experts[target["privileged/target_task"]]
                    expert.reset(fresh, target)
        episode = {
            name: np.array(values, np.int64 if name == "button_states" else np.float32)
            for name, values in rows.items()
        }
        return episode | {"terminals": np.arange(transitions + 1) == transitions}

    def _experts(self) -> dict[str, Any]:
        """Make the expert of each kind of object, anew for each episode."""
        kinds = {"cube": ["cube"], "puzzle": ["button"]}.get(
            self.environment.split("-")[0], ["cube", "button", "drawer", "window"]
        )
        return {kind: self._expert(kind) for kind in kinds}

    def _expert(self, kind: str) -> Any:
        import importlib

        style = "markov" if self.noisy else "plan"
        module = importlib.import_module(f"ogbench.manipspace.oracles.{style}.{kind}_{style}")
        options: dict[str, Any] = {"min_norm": MIN_NORM} if self.noisy else {"noise": NOISE}
        if kind == "button" and self.environment.startswith("puzzle"):
            options["gripper_always_closed"] = True
        return getattr(module, f"{kind.title()}{style.title()}Oracle")(env=self.env, **options)


def _append(
    rows: dict[str, list[Any]], state: Any, action: NDArray[Any], info: Mapping[str, Any]
) -> None:
    row = {
        "observations": state,
        "actions": action,
        "qpos": info["prev_qpos"],
        "qvel": info["prev_qvel"],
    }
    if "prev_button_states" in info:
        row["button_states"] = info["prev_button_states"]
    for name, value in row.items():
        rows.setdefault(name, []).append(value)


def _is_visible(positions: NDArray[Any]) -> bool:
    """Say whether the camera always sees the cube at (T, 3): in the drawer, or near the middle."""
    y, z = positions[:, 1], positions[:, 2]
    beside_drawer = (y <= -0.3) & ((z < 0.06) | (z > 0.08))
    return not ((y >= 0.29) | beside_drawer).any()
