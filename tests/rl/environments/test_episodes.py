"""Episodes are functions of seed, number and actions, and are taken up again exactly."""

import itertools
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch
from helpers.small_data import CUBE, POINTMAZE

from applications.rl import Episodes, Standard, find_task, make_environment
from applications.rl.environments.episodes import reset_seeded
from applications.rl.environments.reproducible import NumpyStream, episode_seed
from flows.training import checkpoint
from flows.training.checkpoint import CheckpointError

TELEPORT = "pointmaze-teleport-navigate-singletask-task1-v0"

PLAY = """
import sys
import numpy as np
from applications.rl.environments.episodes import Episodes
from applications.rl.environments.tasks import find_task
for name in sys.argv[2:]:
    np.random.rand(int(sys.argv[1]))  # what else the process draws must not matter
    episodes, rng = Episodes(find_task(name), seed=3), np.random.default_rng(0)
    for _ in range(40):
        step = episodes.step(rng.uniform(-1, 1, episodes.env.action_dim))
        print(step.next_observation.tobytes().hex(), step.reward)
"""


def make_episodes(name, seed, limit=None):
    """Episodes of a task, cut after ``limit`` steps."""
    episodes = Episodes(find_task(name), seed)
    if limit is not None:
        episodes.env.env.env._max_episode_steps = limit
    return episodes


def play(episodes, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [episodes.step(rng.uniform(-1.2, 1.2, episodes.env.action_dim)) for _ in range(steps)]


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_two_processes_are_bitwise_equal(monkeypatch, capsys):
    arguments = [sys.executable, "-W", "ignore", "-c", PLAY, "1", POINTMAZE, CUBE]
    other = subprocess.run(arguments, capture_output=True, check=True, text=True).stdout
    monkeypatch.setattr(sys, "argv", ["-c", "5", POINTMAZE, CUBE])
    exec(PLAY, {})
    assert capsys.readouterr().out == other
    assert len(other.splitlines()) == 80


@pytest.mark.parametrize("name", [POINTMAZE, CUBE, "scene-play-singletask-task1-v0"])
@pytest.mark.slow
def test_an_episode_does_not_depend_on_those_before(name):
    env = make_environment(find_task(name))
    actions = np.random.default_rng(0).uniform(-1, 1, (30, env.action_dim))

    def trajectory():
        first = reset_seeded(env, 7)
        return [first, *(env.step(action)[0] for action in actions)]

    before = trajectory()
    for seed in range(3):
        reset_seeded(env, seed)
        for _ in range(10):
            env.step(env.action_space.sample())
    np.testing.assert_array_equal(before, trajectory())
    assert not np.array_equal(reset_seeded(env, 8), before[0])


@pytest.mark.slow
def test_random_actions_of_a_reset_are_seeded():
    env = make_environment(find_task(CUBE))
    traces = []
    for outside in (0, 1):
        env.reset(seed=outside)
        _, info = env.reset(seed=7)
        traces.append((info["goal"], env.unwrapped.data.qacc_warmstart.copy()))
    for left, right in zip(*traces, strict=True):
        np.testing.assert_array_equal(left, right)


def test_teleport_noise_is_seeded_and_numpys_generator_left_alone():
    runs = []
    for outside in (0, 1):
        np.random.seed(outside)
        expected = np.random.RandomState(outside).rand(3)
        env = make_environment(find_task(TELEPORT))
        reset_seeded(env, 0)
        exits = []
        for _ in range(12):
            env.unwrapped.set_xy(np.array(env.unwrapped._teleport_info["teleport_in_xys"][0]))
            env.step(np.zeros(2))
            exits.append(env.unwrapped.get_xy())
        runs.append(exits)
        np.testing.assert_array_equal(np.random.rand(3), expected)
    assert len(np.unique(np.round(runs[0]), axis=0)) > 1
    np.testing.assert_array_equal(*runs)


def test_stream_of_its_own():
    np.random.seed(5)
    stream = NumpyStream(1)
    with stream:
        first = np.random.rand(2)
    outside = np.random.rand(2)
    with stream:
        second = np.random.rand(2)
    np.testing.assert_array_equal(np.append(first, second), np.random.RandomState(1).rand(4))
    np.testing.assert_array_equal(outside, np.random.RandomState(5).rand(2))


def test_seeds_of_episodes_differ():
    seeds = {
        episode_seed(seed, *path) for seed in (0, 1) for path in [(), *((i,) for i in range(99))]
    }
    assert len(seeds) == 200
    assert episode_seed(3, 1, 2) == episode_seed(3, 1, 2) != episode_seed(3, 2, 1)


@pytest.mark.parametrize(("name", "limit"), [(POINTMAZE, None), (CUBE, 60)])
@pytest.mark.slow
def test_resume_amid_an_episode(tmp_path, name, limit):
    limit_or_default = limit or 1000
    episodes = make_episodes(name, 2, limit)
    played = play(episodes, limit_or_default + 40)
    assert (episodes.episode, sum(step.done for step in played)) == (1, 1)
    checkpoint.save(tmp_path / "state.pt", episodes.state_dict())
    expected = play(episodes, 30, seed=1)
    resumed = make_episodes(name, 99, limit)
    resumed.load_state_dict(checkpoint.load(tmp_path / "state.pt"))
    assert (resumed.episode, resumed.steps) == (1, 40)
    assert_same(play(resumed, 30, seed=1), expected)


@pytest.mark.slow
def test_time_limits_bootstrap_and_success_does_not():
    episodes = Episodes(find_task(POINTMAZE), seed=0)
    last = play(episodes, 1000)[-1]
    assert (last.done, last.terminal, last.mask, last.success) == (True, 1.0, 1.0, False)
    assert episodes.episode == 1
    assert not np.array_equal(last.next_observation, episodes.observation)

    maze = episodes.env.unwrapped
    maze.set_xy(np.array(maze.cur_goal_xy))
    reached = episodes.step([0.0, 0.0])  # success is judged before the step, as is the reward
    assert reached[2:5] == (0.0, 0.0, 1.0)
    assert (reached.success, reached.done, episodes.episode) == (True, True, 2)


def test_actions_are_recorded_as_played():
    episodes = Episodes(find_task(POINTMAZE), seed=0)
    step = episodes.step([3.0, -0.5])
    np.testing.assert_array_equal(step.action, np.float32([1.0, -0.5]))
    np.testing.assert_allclose(
        step.next_observation - step.observation, [0.2, -0.1], atol=0.05
    )  # no wall near the start
    assert step.observation.dtype == step.next_observation.dtype == np.float32


class Drifting(gymnasium.Env):
    """A walk whose step is ``gain``: another gain is another physics engine."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, gain=0.1, limit=100):
        self.gain, self.limit = gain, limit

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = self.np_random.normal(size=1), 0
        return self.place, {}

    def step(self, action):
        self.place, self.steps = self.place + self.gain * action, self.steps + 1
        return self.place, 0.0, False, self.steps == self.limit, {}


def test_factories_of_other_environments():
    episodes = Episodes(Drifting, seed=0)
    assert isinstance(episodes.env, Standard)
    play(episodes, 250)
    assert (episodes.episode, episodes.steps) == (2, 50)


def test_another_environment_is_noticed_on_resuming():
    episodes = Episodes(Drifting, seed=0)
    play(episodes, 10)
    state = episodes.state_dict()
    with pytest.raises(CheckpointError, match=r"stored actions of episode 0 again.*difference"):
        Episodes(lambda: Drifting(gain=0.1001), seed=0).load_state_dict(state)
    with pytest.raises(CheckpointError, match="ended after 5 of its 10 stored actions"):
        Episodes(lambda: Drifting(limit=5), seed=0).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"actions of 1 components.*takes 2"):
        Episodes(find_task(POINTMAZE), seed=0).load_state_dict(state)


def test_an_environment_that_does_not_repeat_itself_goes_on_with_a_new_episode():
    class Unsteady(Drifting):
        """A walk whose length is another one at each reset."""

        lengths = itertools.chain([9, 5, 9, 5, 9, 4], itertools.repeat(9))

        def reset(self, *, seed=None, options=None):
            self.limit = next(self.lengths)
            return super().reset(seed=seed, options=options)

    episodes = Episodes(Drifting, seed=0)
    play(episodes, 108)
    resumed = Episodes(Unsteady, seed=0)
    with pytest.warns(UserWarning, match="episode 1 cannot be resumed, and a new one begins"):
        resumed.load_state_dict(episodes.state_dict())
    assert (resumed.episode, resumed.steps, resumed.seed) == (2, 0, 0)


def test_state_before_the_first_step():
    episodes = Episodes(Drifting, seed=4)
    state = episodes.state_dict()
    assert state["actions"].shape == (0, 1)
    resumed = Episodes(Drifting, seed=5)
    resumed.load_state_dict(state)
    assert torch.equal(torch.from_numpy(resumed.observation), state["observation"])
