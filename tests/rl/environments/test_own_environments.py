"""Environments of your own, which are not quite what Gymnasium asks for, are taken or named."""

import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box
from helpers.tiny import options

from applications.rl import (
    Episodes,
    RunError,
    Standard,
    TrainConfig,
    evaluate,
    find_task,
    make_agent,
    make_environment,
    train,
)
from applications.rl.report.results import read_results


class Own(gymnasium.Env):
    """Three steps; every episode ends in a success, which is told under ``key``."""

    observation_space = Box(-9, 9, (2,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, change=None, key="success"):
        self.change, self.key, self.given = change, key, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.given.append(action)
        self.steps += 1
        told = {} if self.key is None else {self.key: np.float64(self.steps == 3)}
        found = [np.zeros(2, np.float32), -1.0, self.steps == 3, False, told]
        return tuple(found) if self.change is None else self.change(found)


def played(environment):
    agent = make_agent(options("bc", horizon=1), 2, 1)
    return evaluate(agent, lambda: environment, episodes=2, environments=1)


@pytest.mark.parametrize("key", ["success", "is_success", "task_success"])
def test_success_under_its_usual_names(key):
    assert played(Own(key=key)).success == 1.0


@pytest.mark.parametrize("key", [None, "anything"])
def test_success_that_is_not_told_is_no_rate(tmp_path, key):
    found = played(Own(key=key))
    assert "success not told" in str(found)
    assert "%" not in str(found)
    assert np.isnan([found.success, *found.interval]).all()
    config = TrainConfig(
        task="own",
        options=options("bc", horizon=1),
        use_data=False,
        offline_steps=0,
        online_steps=12,
        start_training=10,
        eval_every=5,
        eval_episodes=1,
        batch_size=4,
        threads=1,
        folder=tmp_path,
    )
    train(config, environment=lambda: Own(key=key))
    last = (tmp_path / "seed0/evaluation.csv").read_text().splitlines()[-1]
    assert last.split(",")[2] == "not told"
    assert len(read_results([tmp_path])) == 1


def with_value(index, value):
    return lambda found: tuple(value if i == index else v for i, v in enumerate(found))


@pytest.mark.parametrize(
    "change",
    [
        lambda found: (found[0], np.array([found[1]]), *found[2:]),
        lambda found: (*found[:2], np.array([found[2]]), np.array([False]), found[4]),
        lambda found: (found[0][None], *found[1:]),
    ],
)
def test_arrays_of_one_number_are_taken(change):
    found = played(Own(change))
    assert (found.success, found.mean_return) == (1.0, -3.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: tuple(found[:4]), r"step\(\) must return .* got 4 values"),
        (with_value(0, np.zeros(3)), r"shape \(3,\), expected .*\(2,\)"),
        (with_value(0, np.array([0.0, np.nan])), r"observation must be finite, got \[ 0. nan\]"),
        (with_value(1, None), "reward must be a number, got None"),
        (with_value(1, np.zeros(2)), "reward must be a number"),
        (with_value(1, np.inf), "reward must be finite"),
        (lambda found: 1 // 0, "it failed with ZeroDivisionError.*--resume continues"),
    ],
)
def test_what_cannot_be_taken_names_environment_episode_and_step(change, message):
    with pytest.raises(RunError, match=f"environment Own, episode 0.*step 1: .*{message}"):
        played(Own(change))


def test_integer_actions_are_rounded():
    environment = Own()
    environment.action_space = Box(0, 10, (1,), np.int64)
    standard = Standard(environment)
    standard.reset(seed=0)
    for action in (-1.0, 0.1, 1.0):
        standard.step([action])
    assert [(a.dtype, a[0]) for a in environment.given] == [(np.int64, n) for n in (0, 6, 10)]


@pytest.mark.parametrize(
    ("space", "advice"),
    [
        (gymnasium.spaces.Dict(a=Box(-1, 1, (1,))), "FlattenObservation"),
        (gymnasium.spaces.Tuple([Box(-1, 1, (1,))]), "FlattenObservation"),
        (Box(0, 255, (8, 8, 3), np.uint8), "images are not supported.*encoder"),
        (Box(-1, 1, (2, 2)), "2 dimensions are not supported.*FlattenObservation"),
    ],
)
def test_other_observations_are_refused_with_the_way_round(space, advice):
    environment = Own()
    environment.observation_space = space
    with pytest.raises(ValueError, match=f"observation_space must be a box.*{advice}"):
        Standard(environment)


def test_an_environment_without_a_time_limit_is_cut(monkeypatch):
    monkeypatch.setattr("applications.rl.environments.wrappers.MAX_STEPS", 7)
    endless = with_value(2, False)
    with pytest.warns(UserWarning, match="cut after 7 steps.*TimeLimit sets one"):
        assert played(Own(endless)).lengths == (7, 7)
    gymnasium.register("Endless-v0", Own, kwargs={"change": endless}, max_episode_steps=9)
    assert played(gymnasium.make("Endless-v0")).lengths == (9, 9)


MODULE = """
import gymnasium
from helpers.tiny import Corridor
gymnasium.register("Line-v0", Corridor, max_episode_steps=10)
"""


def test_an_environment_of_a_module(tmp_path, monkeypatch):
    (tmp_path / "line_of_ones_own.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    name = "gym:line_of_ones_own:Line-v0"
    with pytest.raises(ValueError, match=f"not imported unasked.*--task {name}"):
        find_task(name, importing=False)
    assert "line_of_ones_own" not in sys.modules
    task = find_task(name)
    assert (task.name, task.max_steps) == (name, 10)
    assert make_environment(task).observation_dim == 4
    assert find_task(name, importing=False) == task
    with pytest.raises(ValueError, match="there is no module 'no_such_module'"):
        find_task("gym:no_such_module:Line-v0")


def test_a_missing_logger_is_refused_before_a_run_is_overwritten(tmp_path, monkeypatch):
    online = {"offline_steps": 0, "online_steps": 12, "start_training": 10, "use_data": False}
    shared = {"task": "own", "options": options("bc", horizon=1), "eval_every": 0, "threads": 1}
    train(TrainConfig(**online, **shared, folder=tmp_path), environment=Own)
    before = (tmp_path / "seed0/checkpoint.pt").read_bytes()
    for module, asked in (
        ("wandb", {"wandb": "project"}),
        ("torch.utils.tensorboard", {"tensorboard": True}),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        config = TrainConfig(**online, **shared, **asked, folder=tmp_path, overwrite=True)
        with pytest.raises(ImportError, match="pip install"):
            train(config, environment=Own)
    assert (tmp_path / "seed0/checkpoint.pt").read_bytes() == before


def test_randomness_outside_the_seed_is_named_on_resuming():
    generator = np.random.default_rng()
    drawn = lambda found: (generator.normal(size=2), *found[1:])  # noqa: E731
    episodes = Episodes(lambda: Own(drawn), seed=0)
    episodes.step([0.0])
    with pytest.warns(UserWarning, match=r"randomness that reset\(seed=...\) does not decide"):
        Episodes(lambda: Own(drawn), seed=0).load_state_dict(episodes.state_dict())
