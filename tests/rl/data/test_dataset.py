"""What is loaded is what OGBench's own loader gives, and what is damaged is refused."""

import http.server
import itertools
import json
import shutil
import threading
import warnings

import gymnasium
import numpy as np
import ogbench
import pytest
from helpers.small_data import CUBE, POINTMAZE, edit, make_pointmaze

from applications.rl import (
    DataConfig,
    DataError,
    find_task,
    generate,
    load_dataset,
    load_minari,
    load_npz,
    load_shards,
    make_environment,
)
from applications.rl.data.dataset import CLIP, check_spaces, data_folder, find_files
from applications.rl.data.download import fetch

TASK = find_task(POINTMAZE)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_pointmaze(tmp_path_factory.mktemp("data"))


@pytest.fixture
def data(made, tmp_path):
    """A copy to spoil."""
    for path in made.parent.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path / made.name


@pytest.fixture(scope="module")
def puzzle(tmp_path_factory):
    """A file of a puzzle in which goals are met: all buttons are on in some rows, off in others."""
    path = tmp_path_factory.mktemp("puzzle") / "puzzle-3x3-play-v0.npz"
    rng = np.random.default_rng(0)
    rows = 60
    states = rng.integers(0, 2, (rows, 9))
    states[10:20], states[20:30] = 1, 0
    arrays = {
        "observations": rng.normal(size=(rows, 55)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, 5)).astype(np.float32),
        "terminals": np.arange(rows) % 20 == 19,
        "qpos": rng.normal(size=(rows, 23)).astype(np.float32),
        "qvel": rng.normal(size=(rows, 23)).astype(np.float32),
        "button_states": states,
    }
    np.savez(path, **arrays)
    np.savez(path.with_name("puzzle-3x3-play-v0-val.npz"), **arrays)
    return path


@pytest.mark.slow
def test_equal_to_ogbenchs_own_loader(made):
    met = 0
    for number in range(1, 6):
        name = f"pointmaze-medium-navigate-singletask-task{number}-v0"
        _, train, val = ogbench.make_env_and_datasets(name, dataset_dir=str(made.parent))
        for split, expected in (("train", train), ("val", val)):
            ours = load_dataset(find_task(name), folder=made.parent, split=split)
            for key in ("observations", "next_observations", "rewards", "masks", "terminals"):
                np.testing.assert_array_equal(getattr(ours, key), expected[key], err_msg=key)
            np.testing.assert_array_equal(ours.actions, np.clip(expected["actions"], -CLIP, CLIP))
            met += int((ours.masks == 0).sum())
    assert met > 0


@pytest.mark.slow
def test_equal_to_ogbenchs_own_loader_with_buttons(puzzle):
    name = "puzzle-3x3-play-singletask-task{}-v0"
    met = 0
    for number in (1, 4):
        _, expected, _ = ogbench.make_env_and_datasets(
            name.format(number), dataset_dir=str(puzzle.parent)
        )
        ours = load_dataset(find_task(name.format(number)), folder=puzzle.parent)
        for key in ("rewards", "masks", "terminals", "next_observations"):
            np.testing.assert_array_equal(getattr(ours, key), expected[key], err_msg=key)
        met += int((ours.masks == 0).sum())
        assert ours.rewards.min() < -1.0
    assert met > 0


@pytest.mark.slow
def test_sparse_rewards_are_minus_one_until_the_goal(puzzle):
    dense, sparse = (
        load_dataset(find_task(f"puzzle-3x3{infix}-play-singletask-v0"), folder=puzzle.parent)
        for infix in ("", "-sparse")
    )
    np.testing.assert_array_equal(sparse.rewards, np.where(dense.rewards == 0.0, 0.0, -1.0))
    np.testing.assert_array_equal(sparse.masks, dense.masks)


def test_terminals_end_trajectories_and_masks_mark_success_only(made):
    met_anywhere = 0
    for number in range(1, 6):
        task = find_task(f"pointmaze-medium-navigate-singletask-task{number}-v0")
        data = load_dataset(task, folder=made.parent)
        np.testing.assert_array_equal(np.flatnonzero(data.terminals), [999, 1999, 2499])
        maze = make_environment(task).unwrapped
        goal = maze.ij_to_xy(maze.task_infos[number - 1]["goal_ij"])
        met = np.linalg.norm(data.observations - goal, axis=1) <= 1.0
        np.testing.assert_array_equal(data.masks, 1.0 - met)
        np.testing.assert_array_equal(data.rewards, met - 1.0)
        met_anywhere += int(met.sum())
    assert met_anywhere > 0


def test_rows_are_transitions(made):
    data = load_dataset(TASK, folder=made.parent)
    assert len(data) == 2500
    inside = data.terminals[:-1] == 0.0
    after = data.observations[1:]
    np.testing.assert_array_equal(data.next_observations[:-1][inside], after[inside])
    moves = np.abs(data.next_observations - data.observations).max(1)
    assert moves.max() < 0.5  # no row spans two trajectories
    assert np.abs(data.actions).max() == np.float32(CLIP)
    arrays = [value for value in vars(data).values() if isinstance(value, np.ndarray)]
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}
    assert len(arrays) == 6


def test_folder_by_argument_then_environment_then_default(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("OGBENCH_DATA", raising=False)
    assert data_folder() == tmp_path / "home/.ogbench/data"
    monkeypatch.setenv("OGBENCH_DATA", str(tmp_path / "set"))
    assert data_folder() == tmp_path / "set"
    assert data_folder(tmp_path) == tmp_path


@pytest.mark.parametrize(
    "place", ["pointmaze-medium-navigate-v0", "pointmaze-medium-navigate-100m-v0", "."]
)
def test_shards(data, place):
    whole = load_dataset(TASK, folder=data.parent)
    arrays = dict(np.load(data))
    cuts = [0, 1001, 2002, 2503]
    folder = data.parent / "large"
    (folder / place).mkdir(parents=True, exist_ok=True)
    for index, (first, last) in enumerate(itertools.pairwise(cuts)):
        path = folder / place / f"pointmaze-medium-navigate-v0-{index:03d}.npz"
        np.savez(path, **{name: array[first:last] for name, array in arrays.items()})
        shutil.copy(path, path.with_name(f"{path.stem}-val.npz"))
    shards = load_shards(TASK, folder=folder)
    assert len(shards) == 3
    for key in ("observations", "rewards", "terminals", "next_observations"):
        joined = np.concatenate([getattr(shard, key) for shard in shards])
        np.testing.assert_array_equal(joined, getattr(whole, key), err_msg=key)
    assert len(find_files(TASK, folder=folder, split="val")) == 3
    with pytest.raises(DataError, match="3 shards"):
        load_dataset(TASK, folder=folder)
    with pytest.raises(IndexError):
        shards[3]


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("cube-quadruple-play-v0", "large"),
        ("puzzle-4x4-sparse-play-singletask-task1-v0", "large"),
        ("puzzle-4x4-noisy-v0", "single"),
        ("cube-triple-play-v0", "single"),
    ],
)
def test_data_of_the_published_runs_come_first(tmp_path, name, first):
    task = find_task(name)
    large = tmp_path / task.dataset_name.replace("-v0", "-100m-v0")
    large.mkdir()
    shards = [large / f"{task.dataset_name}-{index:03d}.npz" for index in range(2)]
    files = {"single": [tmp_path / f"{task.dataset_name}.npz"], "large": shards}
    for path in (path for paths in files.values() for path in paths):
        path.touch()
        path.with_name(f"{path.stem}-val.npz").touch()
    assert find_files(task, folder=tmp_path) == files[first]
    held_out = find_files(task, folder=tmp_path, split="val")
    assert held_out == [path.with_name(f"{path.stem}-val.npz") for path in files[first]]
    for path in files[first]:
        path.unlink()
    assert find_files(task, folder=tmp_path) == files["large" if first == "single" else "single"]


def test_missing_data_are_one_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("ogbench.utils.DATASET_URL", "http://127.0.0.1:9/nothing")
    with pytest.raises(DataError) as error:
        load_dataset(TASK, folder=tmp_path / "empty")
    for part in (
        f"{tmp_path}/empty/pointmaze-medium-navigate-v0.npz",
        "http://127.0.0.1:9/nothing/pointmaze-medium-navigate-v0.npz",
        f"python -m applications.rl data --task {POINTMAZE} --transitions",
        "Connection refused",
    ):
        assert part in str(error.value)
    with pytest.raises(DataError, match=r"switched off.*OGBench's own scripts"):
        load_dataset(find_task("antmaze-large-navigate-v0"), folder=tmp_path, download=False)
    assert not list(tmp_path.rglob("*.npz"))


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one file whole, one that breaks off, and one that never comes."""

    content = b"x" * 100_000

    def do_GET(self):
        if self.path == "/missing":
            return self.send_error(404)
        if self.path == "/silent":
            return self.server.silence.wait(10)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: 500 if self.path == "/broken" else None])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.silence = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.silence.set()
    server.shutdown()
    server.server_close()


def test_download(server, tmp_path):
    fetch(f"{server}/whole", tmp_path / "new" / "whole")
    assert (tmp_path / "new" / "whole").read_bytes() == Server.content


@pytest.mark.parametrize(
    ("page", "message"), [("broken", "of 100000"), ("missing", "404"), ("silent", "timed out")]
)
def test_failed_download_leaves_nothing(server, tmp_path, page, message):
    with pytest.raises(OSError, match=message):
        fetch(f"{server}/{page}", tmp_path / "file", timeout=0.3)
    assert not list(tmp_path.iterdir())


def _rows(array, row, value):
    array = np.array(array)
    array[row] = value
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qpos": None}, "lacks qpos"),
        ({"terminals": None, "actions": None}, "lacks actions, terminals"),
        (
            {"observations": lambda a: _rows(a, 7, np.nan)},
            "observations has NaN or infinity in row 7",
        ),
        ({"qpos": lambda a: _rows(a, 3, np.inf)}, "qpos has NaN or infinity in row 3"),
        ({"actions": lambda a: _rows(a, 5, 1.5)}, r"actions must be in \[-1, 1\].*row 5"),
        ({"actions": lambda a: a[:-1]}, r"actions has the shape \(2502, 2\), expected \(2503, d\)"),
        ({"actions": lambda a: a[:, 0]}, r"actions has the shape \(2503,\)"),
        ({"terminals": lambda a: a[:, None]}, r"terminals has the shape \(2503, 1\)"),
        ({"terminals": lambda a: a + 0.5}, "terminals must be 0 or 1, got 0.5 in row 0"),
        ({"terminals": np.ones_like}, "no transition"),
        ({"observations": lambda a: a.astype("U")}, "observations has the type <U32"),
        ({"observations": lambda a: (a * 9).astype(np.uint8)}, "type uint8, expected floating"),
        ({"observations": lambda a: a.astype(object)}, "'observations' holds pickled objects"),
        (
            {"observations": lambda a: np.hstack([a, a])},
            "observations have 4 components, but those",
        ),
        ({"actions": lambda a: np.hstack([a, a])}, "actions have 4 components, but those"),
        ({"observations": lambda a: a[:0]}, "no rows"),
        (
            {"qpos": lambda a: a[:, :1]},
            r"qpos has the shape \(2500, 1\), but pointmaze-medium has 2 comp",
        ),
    ],
)
def test_damaged_data_are_refused(data, change, message):
    arrays = dict(np.load(data))
    edit(data, **{n: None if c is None else c(arrays[n]) for n, c in change.items()})
    with pytest.raises(DataError, match=message) as error:
        load_dataset(TASK, folder=data.parent)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_truncated_file(data, kept):
    content = data.read_bytes()
    data.write_bytes(content[: int(kept * len(content))])
    data.with_suffix(".json").unlink()
    with pytest.raises(DataError, match="truncated"):
        load_dataset(TASK, folder=data.parent)


def test_flipped_bytes(data):
    content = bytearray(data.read_bytes())
    middle = len(content) // 3
    content[middle : middle + 40] = bytes(40)
    data.write_bytes(content)
    with pytest.raises(DataError, match="not the file that its manifest describes"):
        load_dataset(TASK, folder=data.parent)
    data.with_suffix(".json").unlink()
    with pytest.raises(DataError, match="damaged at"):
        load_dataset(TASK, folder=data.parent)


def test_manifest_is_checked_and_other_physics_warned_of(data):
    path = data.with_suffix(".json")
    manifest = json.loads(path.read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_dataset(TASK, folder=data.parent).versions == manifest["versions"]
    manifest["versions"]["mujoco"] = "3.9.9"
    path.write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match=r"was made with mujoco 3\.9\.9 \(running"):
        load_dataset(TASK, folder=data.parent)
    for damaged in ("{", "[]", '{"files": 3}'):
        path.write_text(damaged)
        with pytest.raises(DataError, match="is not a manifest"):
            load_dataset(TASK, folder=data.parent)


def own(path, **changes):
    """Two trajectories of two and one transitions, one row per transition."""
    arrays = {
        "observations": np.arange(3.0)[:, None] * [1.0, 2.0],
        "actions": np.array([[0.0], [1.0], [-1.0]]),
        "rewards": np.array([0, 1, 2]),
        "terminals": np.array([False, True, False]),
        "next_observations": np.array([[1.0, 2.0], [5.0, 5.0], [6.0, 6.0]]),
        **changes,
    }
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_own_data_by_transition(tmp_path):
    data = load_npz(own(tmp_path / "own.npz"))
    np.testing.assert_array_equal(data.terminals, [0, 1, 1])  # the file's end is an end
    np.testing.assert_array_equal(data.masks, [1, 0, 1])
    np.testing.assert_array_equal(data.rewards, [0, 1, 2])
    np.testing.assert_array_equal(data.actions[:, 0], np.float32([0.0, CLIP, -CLIP]))
    cut = load_npz(own(tmp_path / "cut.npz", masks=np.ones(3)))
    np.testing.assert_array_equal(cut.masks, [1, 1, 1])


def test_own_data_by_state(tmp_path):
    path = own(tmp_path / "own.npz", next_observations=None, masks=np.array([1.0, 0.0, 0.0]))
    data = load_npz(path)  # the rows are s0, s1 (a true end), s0'; the last leads nowhere
    assert len(data) == 1
    np.testing.assert_array_equal(data.next_observations, [[1.0, 2.0]])
    assert (data.rewards, data.masks, data.terminals) == (0.0, 0.0, 1.0)


def test_what_is_assumed_of_own_data_is_said_with_its_numbers(tmp_path, capsys):
    path = own(tmp_path / "own.npz", masks=np.ones(3))
    load_npz(path)
    assert capsys.readouterr().err == ""
    load_npz(own(path))
    masks = "no masks, so its 1 terminals are true ends, no time limits"
    assert capsys.readouterr().err == f"note: {path} has {masks}\n"
    load_npz(own(path, next_observations=None))
    states = "no next_observations, so its 3 rows are states, the last of each trajectory only "
    states += "where it ends: 1 transitions"
    assert capsys.readouterr().err == f"note: {path} has {masks}; {states}\n"


def test_the_end_of_own_data_by_state_is_a_true_end_only_if_it_is_terminal(tmp_path):
    ends = {"next_observations": None, "terminals": np.array([False, False, False])}
    data = load_npz(own(tmp_path / "cut.npz", **ends))
    np.testing.assert_array_equal(data.masks, [1, 1])
    np.testing.assert_array_equal(data.terminals, [0, 1])
    ends["terminals"] = np.array([False, False, True])
    np.testing.assert_array_equal(load_npz(own(tmp_path / "end.npz", **ends)).masks, [1, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": None}, "lacks rewards"),
        ({"rewards": np.array([0.0, np.nan, 1.0])}, "rewards has NaN or infinity in row 1"),
        ({"rewards": np.array(["a", "b", "c"])}, "rewards has the type <U1, expected numbers"),
        ({"masks": np.array([0.0, 0.5, 1.0])}, "masks must be 0 or 1, got 0.5 in row 1"),
        ({"next_observations": np.ones((3, 3))}, r"next_observations has the shape \(3, 3\)"),
        (
            {"actions": np.array([[0.0], [-1.1], [0.0]])},
            r"actions must be in \[-1, 1\], .* in row 1; .*\(action - low\) / \(high - low\)",
        ),
    ],
)
def test_damaged_own_data_are_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load_npz(own(tmp_path / "own.npz", **changes))


def test_not_an_npz_file(tmp_path):
    np.save(tmp_path / "array.npy", np.ones(3))
    with pytest.raises(DataError, match="single array"):
        load_npz(tmp_path / "array.npy")
    (tmp_path / "text.npz").write_text("observations")
    with pytest.raises(DataError, match="not an npz file"):
        load_npz(tmp_path / "text.npz")
    with pytest.raises(FileNotFoundError):
        load_npz(tmp_path / "absent.npz")


def test_own_data_of_another_environment(tmp_path):
    data = load_npz(own(tmp_path / "own.npz"))
    with pytest.raises(DataError, match=r"observations have 2 components.*Pendulum-v1.*\(3,\)"):
        check_spaces(data, make_environment(find_task("gym:Pendulum-v1")))


@pytest.mark.slow
def test_data_of_another_goal_need_no_other_file(tmp_path):
    generate(DataConfig(task=CUBE, transitions=60, folder=tmp_path))
    rewards = [
        load_dataset(find_task(f"cube-single-play-singletask-task{number}-v0"), folder=tmp_path)
        for number in (1, 5)
    ]
    assert [len(data) for data in rewards] == [60, 60]
    assert [data.observation_dim for data in rewards] == [28, 28]
    assert set(rewards[0].rewards) <= {-1.0, 0.0}


def test_minari_dataset(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari", reason="pip install 'minari[hdf5]'")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = gymnasium.make("Pendulum-v1", max_episode_steps=20)
    episodes = []
    for seed, torque in enumerate([-1.0, 2.0]):  # torques are in [-2, 2]
        states, rewards = [env.reset(seed=seed)[0]], []
        for _ in range(20):
            state, reward, *_ = env.step([torque])
            states.append(state)
            rewards.append(reward)
        episodes.append(
            minari.data_collector.EpisodeBuffer(
                id=seed,
                observations=np.array(states),
                actions=np.full((20, 1), torque, np.float32),
                rewards=rewards,
                terminations=[False] * 19 + [seed == 1],
                truncations=[False] * 19 + [seed == 0],
            )
        )
    minari.create_dataset_from_buffers("pendulum/test-v0", episodes, env=env)

    data = load_minari("pendulum/test-v0")
    assert len(data) == 40
    np.testing.assert_array_equal(np.flatnonzero(data.terminals), [19, 39])
    np.testing.assert_array_equal(np.flatnonzero(data.masks == 0.0), [39])  # terminated, not cut
    np.testing.assert_array_equal(data.actions[[0, 39], 0], np.float32([-0.5, CLIP]))
    np.testing.assert_array_equal(data.next_observations[:19], data.observations[1:20])
    task = find_task("minari:pendulum/test-v0")
    assert (task.max_steps, task.environment) == (20, "Pendulum-v1")
    np.testing.assert_array_equal(load_dataset(task).rewards, data.rewards)
    with pytest.raises(DataError, match="minari download no/such-v0"):
        load_minari("no/such-v0")
    with pytest.raises(ValueError, match="minari says"):
        find_task("minari:no/such-v0")
