"""Ends, order and units of your own data mean what the file says, or are refused or said."""

import json

import gymnasium
import numpy as np
import pytest
import torch
from helpers.tiny import options

from applications.rl import DataError, Replay, Standard, TrainConfig, load_minari, load_npz, train
from applications.rl.data.dataset import check_spaces
from applications.rl.data.trajectories import breaks, windows_within_episodes
from applications.rl.export import ExportConfig, run_export

STATES = np.concatenate([np.arange(5.0), 100 + np.arange(5.0)])[:, None]
LAST = np.arange(10) % 5 == 4
"""Two episodes of five rows; within an episode the state counts up by one."""


def write(path, **changes):
    """Write the two episodes, cut by a time limit that no array marks, one row per transition."""
    arrays = {
        "observations": STATES,
        "next_observations": STATES + 1,
        "actions": np.linspace(-1, 1, 10)[:, None],
        "rewards": np.arange(10.0),
        "terminals": np.zeros(10, bool),
        **changes,
    }
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def valid(data, horizon):
    """Say of each window of the data whether it counts."""
    starts = torch.arange(len(data) - horizon + 1)
    batch = Replay.from_dataset(data).windows(starts, horizon=horizon, discount=1.0)
    return batch.valid.tolist()


@pytest.mark.parametrize("name", ["timeouts", "truncations", "episode_terminals"])
def test_a_marked_time_limit_ends_a_trajectory_but_not_truly(tmp_path, name, capsys):
    data = load_npz(write(tmp_path / "d4rl.npz", **{name: LAST}))
    assert valid(data, 3) == [1, 1, 1, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(np.flatnonzero(data.terminals), [4, 9])
    np.testing.assert_array_equal(data.masks, np.ones(10))
    assert f"its 0 terminals are true ends, its {name} are not" in capsys.readouterr().err


def test_a_true_end_beside_time_limits_has_mask_0(tmp_path):
    ends = np.arange(10) == 4
    for cuts in ({"timeouts": np.arange(10) == 9}, {"episode_terminals": LAST}):
        data = load_npz(write(tmp_path / "d4rl.npz", terminals=ends, **cuts))
        np.testing.assert_array_equal(np.flatnonzero(data.terminals), [4, 9])
        np.testing.assert_array_equal(data.masks, 1.0 - ends)


def test_time_limits_that_are_all_terminals_too_are_no_true_ends(tmp_path, capsys):
    limits = {"terminals": LAST, "truncations": np.arange(10) == 9}
    data = load_npz(write(tmp_path / "both.npz", **limits))
    np.testing.assert_array_equal(np.flatnonzero(data.terminals), [4, 9])
    np.testing.assert_array_equal(np.flatnonzero(data.masks == 0), [4])
    assert "a terminal at each of its 1 time limits" in capsys.readouterr().err


def test_rows_of_d4rl_without_next_observations(tmp_path, capsys):
    changes = {"next_observations": None, "terminals": np.arange(10) == 4}
    data = load_npz(write(tmp_path / "d4rl.npz", timeouts=np.arange(10) == 9, **changes))
    np.testing.assert_array_equal(data.rewards, np.arange(9.0))  # the reward of the end is kept
    np.testing.assert_array_equal(data.masks, np.arange(9) != 4)
    np.testing.assert_array_equal(np.flatnonzero(data.terminals), [4, 8])
    known = np.arange(9) != 4
    np.testing.assert_array_equal(data.next_observations[known], STATES[:9][known] + 1)
    assert "left out: 9 of 10 rows" in capsys.readouterr().err
    with pytest.raises(DataError, match="every row is cut by a time limit"):
        load_npz(write(tmp_path / "d4rl.npz", timeouts=np.ones(10, bool), next_observations=None))


def test_masks_beside_rows_that_are_states(tmp_path):
    states = {"next_observations": None, "terminals": LAST}
    found = [
        load_npz(write(tmp_path / "states.npz", **states, **masks)).masks
        for masks in ({}, {"masks": 1.0 - LAST}, {"masks": 1.0 - (np.arange(10) == 4)})
    ]
    np.testing.assert_array_equal(found[0], [1, 1, 1, 0, 1, 1, 1, 0])
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], [1, 1, 1, 0, 1, 1, 1, 1])


def test_rows_that_do_not_follow_each_other_end_a_trajectory(tmp_path, capsys):
    joined = load_npz(write(tmp_path / "joined.npz"))
    np.testing.assert_array_equal(np.flatnonzero(joined.terminals), [4, 9])
    assert "1 rows (the first is row 4) with terminal 0 whose next" in capsys.readouterr().err
    in_turn = np.arange(10).reshape(2, 5).T.ravel()  # a row of each episode at a time
    shuffled = np.random.default_rng(0).permutation(10)
    for order in (in_turn, shuffled):
        rows = {"observations": STATES[order], "next_observations": STATES[order] + 1}
        data = load_npz(write(tmp_path / "mixed.npz", terminals=LAST[order], **rows))
        assert sum(valid(data, 3)) == 0
        assert valid(data, 1) == [1] * 10
    assert "several environments in turn" in capsys.readouterr().err


def test_rounding_is_no_break():
    states = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    following = np.roll(states, -1, axis=0) * np.float32(1 + 1e-6)
    assert not breaks(states, following, np.zeros(50)).any()
    following[7] += 1e-3
    assert np.flatnonzero(breaks(states, following, np.zeros(50))) == [7]
    assert not breaks(states, following, np.arange(50) == 7).any()


@pytest.mark.parametrize("horizon", [1, 2, 4, 5])
def test_windows_within_episodes_are_those_that_count(tmp_path, horizon):
    data = load_npz(write(tmp_path / "own.npz", timeouts=LAST))
    assert windows_within_episodes(data.terminals, horizon) == sum(valid(data, horizon))


def config(folder, horizon=1, **changes):
    """A training of ten updates without an evaluation."""
    return TrainConfig(
        **{
            "task": "own",
            "agent": "bc",
            "options": options("bc", horizon=horizon),
            "offline_steps": 10,
            "eval_every": 0,
            "batch_size": 4,
            "threads": 1,
            "folder": folder,
            **changes,
        }
    )


def never():
    raise AssertionError("no environment is needed")


def test_data_without_a_window_in_an_episode_are_refused(tmp_path, capsys):
    data = load_npz(write(tmp_path / "own.npz", timeouts=LAST))
    with pytest.raises(ValueError, match=r"none of the 5 windows of horizon=6 .*longest has 5"):
        train(config(tmp_path / "run", horizon=6), environment=never, dataset=data)
    assert not (tmp_path / "run").exists()
    capsys.readouterr()
    train(config(tmp_path / "run", horizon=4), environment=never, dataset=data)
    assert "57.1% of the windows of horizon=4 rows lie within" in capsys.readouterr().err
    content = json.loads((tmp_path / "run/seed0/config.json").read_text())
    assert content["dataset"]["windows_within_episodes"] == pytest.approx(4 / 7)


def test_broken_rows_of_a_dataset_made_in_python_are_said(tmp_path, capsys):
    data = load_npz(write(tmp_path / "own.npz", timeouts=LAST))
    data.terminals[4] = 0.0
    train(config(tmp_path / "one"), environment=never, dataset=data)
    assert "follow" not in capsys.readouterr().err  # a window of one row needs no order
    train(config(tmp_path / "two", horizon=2), environment=never, dataset=data)
    assert "1 rows of the data with terminal 0 end in another" in capsys.readouterr().err


def test_recorded_bounds_rescale_actions(tmp_path, capsys):
    bounds = {"action_low": np.array([-1.0]), "action_high": np.array([3.0])}
    actions = np.linspace(-1, 3, 10)[:, None]
    data = load_npz(write(tmp_path / "own.npz", actions=actions, masks=np.ones(10), **bounds))
    np.testing.assert_allclose(data.actions[:, 0], np.linspace(-1, 1, 10), atol=2e-5)
    assert (data.action_low, data.action_high) == ([-1.0], [3.0])
    assert "action" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action_low": -1.0}, "lacks action_high"),
        ({"action_low": -np.ones(2), "action_high": np.ones(2)}, r"shapes \(2,\) and \(2,\)"),
        ({"action_low": 1.0, "action_high": 1.0}, "must be below action_high"),
        ({"action_low": -np.inf, "action_high": 1.0}, "both finite"),
        ({"action_low": -0.4, "action_high": 0.4}, r"actions must be in .*got \[-1.\] in row 0"),
    ],
)
def test_wrong_bounds_are_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load_npz(write(tmp_path / "own.npz", **changes))


class Torque(gymnasium.Env):
    """An environment that remembers the action that it is given."""

    observation_space = gymnasium.spaces.Box(-9, 9, (1,), np.float64)

    def __init__(self, bound=2.0):
        self.action_space = gymnasium.spaces.Box(-bound, bound, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1), {}

    def step(self, action):
        self.played = float(action[0])
        return np.zeros(1), 0.0, False, False, {}


def test_actions_in_the_units_of_the_environment_are_said(tmp_path, recwarn, capsys):
    small = 0.4 * np.linspace(-1, 1, 10)[:, None]
    data = load_npz(write(tmp_path / "own.npz", actions=small))
    assert "at most 0.4 in magnitude, are fractions" in capsys.readouterr().err
    check_spaces(data, Standard(Torque(0.4)))
    assert "actions look unscaled" in str(recwarn.pop().message)
    check_spaces(load_npz(write(tmp_path / "own.npz")), Standard(Torque(0.4)))
    assert not recwarn.list


def test_bounds_of_data_and_environment(tmp_path, recwarn):
    def check(recorded):
        bounds = {"action_low": -recorded, "action_high": recorded}
        data = load_npz(write(tmp_path / "own.npz", **bounds))
        check_spaces(data, Standard(Torque(2.0)))

    check(2.0)
    assert not recwarn.list
    check(1.0)
    assert "-1 and 1 are taken as the bounds of both" in str(recwarn.pop().message)
    with pytest.raises(DataError, match=r"recorded in \[-3.\] to \[3.\], but the bounds"):
        check(3.0)


def test_minari_actions_in_other_bounds_than_the_environments(tmp_path, monkeypatch, recwarn):
    minari = pytest.importorskip("minari", reason="pip install 'minari[hdf5]'")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    for bound in (1.0, 2.0):
        place, limits = f"{__name__}:Torque", {"max_episode_steps": 5, "kwargs": {"bound": bound}}
        gymnasium.register(f"Torque{bound:.0f}-v0", place, **limits)

    def load(name, env, declared, value):
        episode = minari.data_collector.EpisodeBuffer(
            id=0,
            observations=np.zeros((6, 1)),
            actions=np.full((5, 1), value, np.float32),
            rewards=[0.0] * 5,
            terminations=[False] * 5,
            truncations=[False] * 4 + [True],
        )
        space = gymnasium.spaces.Box(-declared, declared, (1,), np.float32)
        minari.create_dataset_from_buffers(name, [episode], env=env, action_space=space)
        return load_minari(name)

    data = load("own/a-v0", "Torque2-v0", 1.0, 0.5)
    env = Standard(Torque(2.0))
    env.step(data.actions[0])
    assert env.unwrapped.played == 1.0
    assert any("behind a wrapper" in str(w.message) for w in recwarn.list)
    with pytest.raises(DataError, match="would not be what it was"):
        load("own/b-v0", "Torque1-v0", 2.0, 1.0)


def test_data_of_another_environment_are_refused_without_an_evaluation_too(tmp_path):
    path = write(tmp_path / "own.npz", timeouts=LAST)
    with pytest.raises(DataError, match=r"observations have 1 components.*Pendulum-v1.*\(3,\)"):
        train(config(tmp_path / "run", task="gym:Pendulum-v1", data=path))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bounds_of_the_environment_are_in_config_and_policy(tmp_path):
    online = {"offline_steps": 0, "online_steps": 12, "start_training": 10, "use_data": False}
    train(config(tmp_path, task="gym:Pendulum-v1", **online))
    run = tmp_path / "seed0"
    content = json.loads((run / "config.json").read_text())
    assert (content["action_low"], content["action_high"]) == ([-2.0], [2.0])
    facts = run_export(ExportConfig(run, repeats=1)).facts
    found = facts["actions"]["environment"]
    assert (found["low"], found["high"]) == ([-2.0], [2.0])
    assert found["formula"] == "low + (action + 1) / 2 * (high - low)"


def test_own_data_are_trained_on_without_an_environment(tmp_path):
    path = write(tmp_path / "own.npz", timeouts=LAST)
    (run,) = train(config(tmp_path / "python", task="robot"), dataset=load_npz(path))
    assert (run.folder / "checkpoint.pt").exists()
    train(config(tmp_path / "file", task="robot", data=path))
    for played in ({"eval_every": 5}, {"online_steps": 12, "start_training": 5}):
        with pytest.raises(ValueError, match="unknown task 'robot'"):
            train(config(tmp_path / "no", task="robot", data=path, **played))
