"""Names, their protocol, and the conventions of the environments."""

import os
import sys

import gymnasium
import numpy as np
import pytest

from applications.rl import RunError, Standard, find_task, make_environment, task_names
from applications.rl.environments.mujoco import import_ogbench, prepare_mujoco
from applications.rl.environments.tasks import ENVIRONMENTS


@pytest.fixture(scope="module")
def registry():
    import_ogbench()
    return {
        name: spec
        for name, spec in gymnasium.registry.items()
        if "singletask" in name and not name.startswith("visual-")
    }


def test_every_single_task_of_ogbench_has_a_name_and_no_other(registry):
    tasks = [find_task(name) for name in task_names()]
    assert {task.environment_id for task in tasks} == set(registry)
    for task in tasks:
        assert registry[task.environment_id].max_episode_steps == task.max_steps, task.name


@pytest.mark.slow
def test_defaults_are_those_of_ogbench(registry):
    # The number is resolved when the environment is made; one per family is enough.
    for name in ("pointmaze-medium", "cube-single", "scene", "puzzle-3x3"):
        env = gymnasium.make(f"{name}-singletask-v0", disable_env_checker=True)
        assert env.unwrapped._reward_task_id == ENVIRONMENTS[name].default_task, name


def test_parts_of_a_name():
    task = find_task("puzzle-4x4-sparse-noisy-singletask-task3-v0")
    assert task.environment_id == "puzzle-4x4-singletask-task3-v0"
    assert task.dataset_name == "puzzle-4x4-noisy-v0"
    assert task.published == "puzzle-4x4-noisy-singletask-task3-v0"
    assert (task.domain, task.kind, task.goal, task.sparse) == ("puzzle-4x4", "noisy", 3, True)
    assert (task.horizon, task.discount, task.max_steps) == (5, 0.99, 500)


def test_default_task_has_the_published_name_of_its_number():
    task = find_task("scene-play-v0")
    assert task == find_task("scene-play-singletask-v0")
    assert task.task_id is None
    assert task.published == "scene-play-singletask-task2-v0"


@pytest.mark.parametrize(
    ("name", "horizon", "discount"),
    [
        ("cube-quadruple-play-singletask-task1-v0", 5, 0.99),
        ("antmaze-large-explore-singletask-task1-v0", 1, 0.99),
        ("antmaze-giant-navigate-singletask-task1-v0", 1, 0.995),
        ("humanoidmaze-medium-stitch-singletask-task1-v0", 1, 0.995),
    ],
)
def test_protocol(name, horizon, discount):
    task = find_task(name)
    assert (task.horizon, task.discount) == (horizon, discount)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scene-play-singletask-task7-v0", "did you mean scene-play-singletask-task"),
        (
            "cube-single",
            "did you mean cube-single-play-singletask-v0, cube-single-play-singletask-t",
        ),
        ("cube-sinlge-play-v0", "did you mean cube-single-play-singletask-v0"),
        ("antmaze-giant-explore-singletask-v0", "unknown task"),
        ("antmaze-large-sparse-navigate-singletask-v0", "sparse already"),
        ("visual-cube-single-play-singletask-v0", "not images"),
        ("powderworld-easy-play-v0", "not images"),
        ("", "unknown task ''"),
        ("gym:Pendulum-v9", "gymnasium says"),
        ("gym:numpy:Unregistered", r"registers the name: gymnasium.register"),
        ("gym:", "unknown task"),
    ],
)
def test_wrong_names_are_explained(name, message):
    with pytest.raises(ValueError, match="task") as error:
        find_task(name)
    assert message in str(error.value)


def test_own_gymnasium_environment_is_rescaled():
    task = find_task("gym:Pendulum-v1")
    env = make_environment(task)
    assert (task.domain, task.max_steps) == ("gym", 200)
    assert (env.action_space.low, env.action_space.high) == (-1.0, 1.0)
    raw = gymnasium.make("Pendulum-v1")
    env.reset(seed=0)
    raw.reset(seed=0)
    ours, theirs = env.step([0.5]), raw.step([1.0])  # its torque is in [-2, 2]
    np.testing.assert_array_equal(ours[0], theirs[0])
    assert ours[4]["success"] is False


@pytest.mark.parametrize("name", ["gym:CartPole-v1", "gym:FrozenLake-v1"])
def test_other_spaces_are_refused(name):
    with pytest.raises(ValueError, match="must be a box of one dimension"):
        make_environment(find_task(name))


class Scripted(gymnasium.Env):
    """Two steps with rewards −3 and 0; it records what it is given."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.given = []
        return np.zeros(1), {}

    def step(self, action):
        self.given.append(action)
        last = len(self.given) == 2
        info = {"success": float(last)}
        return np.ones(1), 0 if last else -3, last, False, info


@pytest.mark.parametrize(("sparse", "rewards"), [(False, [-3.0, 0.0]), (True, [-1.0, 0.0])])
def test_standard_conventions(sparse, rewards):
    env = Standard(Scripted(), sparse=sparse)
    observation, _ = env.reset(seed=0)
    steps = [env.step([5.0, -0.25]), env.step([0.0, -2.0])]
    assert [step[1] for step in steps] == rewards
    assert [step[4]["success"] for step in steps] == [False, True]
    assert all(type(step[4]["success"]) is bool for step in steps)
    assert {observation.dtype, steps[0][0].dtype} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(env.unwrapped.given, [[1.0, -0.25], [0.0, -1.0]])


def test_wrong_actions_are_refused():
    env = Standard(Scripted())
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(2,\)"):
        env.step([0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="NaN"):
        env.step([0.0, np.nan])


@pytest.mark.slow
def test_sparse_reward_of_ogbench():
    dense, sparse = (
        make_environment(find_task(f"puzzle-3x3{infix}-play-singletask-task1-v0"))
        for infix in ("", "-sparse")
    )
    for env in (dense, sparse):
        env.reset(seed=0)
    assert dense.step(np.zeros(5))[1] < -1.0
    assert sparse.step(np.zeros(5))[1] == -1.0


def test_mujoco_renders_only_if_asked(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)

    def chosen(before, *, render):
        monkeypatch.setenv("MUJOCO_GL", before)
        if not before:
            monkeypatch.delenv("MUJOCO_GL")
        prepare_mujoco(render=render)
        return os.environ["MUJOCO_GL"]

    assert chosen("", render=False) == "disabled"
    assert chosen("osmesa", render=False) == "osmesa"
    assert chosen("osmesa", render=True) == "osmesa"
    if sys.platform == "linux":
        assert chosen("", render=True) == "egl"
        assert chosen("disabled", render=True) == "egl"
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(RunError, match="MUJOCO_GL=egl before"):
        chosen("disabled", render=True)
