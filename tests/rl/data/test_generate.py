"""Generated data: reproducible whatever interrupts, in OGBench's layout, and by able experts."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from helpers.small_data import CUBE, POINTMAZE, make_pointmaze

from applications.rl import DataConfig, DataError, RunError, find_task, generate, make_environment
from applications.rl.data.episode_files import plan_files, write_missing
from applications.rl.data.expert_manipulation import ManipulationCollector, _is_visible
from applications.rl.data.expert_maze import (
    MazeCollector,
    distances,
    next_cells,
    open_cells,
    vertices,
)
from applications.rl.data.generate import run_data
from applications.rl.data.manifest import checksum

OPTIONS = {"task": POINTMAZE, "transitions": 9300, "seed": 4}
NAMES = ["pointmaze-medium-navigate-v0.json"] + [
    f"pointmaze-medium-navigate-v0{suffix}.npz" for suffix in ("", "-val")
]

COMMAND = """
import sys
from pathlib import Path
from applications.rl.data.generate import DataConfig, generate
if __name__ == "__main__":
    generate(DataConfig(task=sys.argv[1], transitions=9300, seed=4, folder=Path(sys.argv[2]),
                        workers=int(sys.argv[3])))
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    generate(DataConfig(**OPTIONS, folder=folder))
    return {name: (folder / name).read_bytes() for name in NAMES}


def contents(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)  # nothing left over
    return {name: (folder / name).read_bytes() for name in NAMES}


@pytest.mark.slow
def test_same_bytes_for_any_number_of_workers(undisturbed, tmp_path):
    generate(DataConfig(**OPTIONS, folder=tmp_path, workers=2))
    assert contents(tmp_path) == undisturbed


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.slow
def test_same_bytes_after_being_killed(undisturbed, tmp_path, workers):
    script = tmp_path / "make.py"
    script.write_text(COMMAND)
    folder = tmp_path / "data"
    process = subprocess.Popen(
        [sys.executable, str(script), POINTMAZE, str(folder), str(workers)],
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        start_new_session=True,
    )
    finished = folder / "pointmaze-medium-navigate-v0.parts"
    deadline = time.monotonic() + 60
    while not list(finished.glob("train-*.npz")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until_gone(process.pid)
    assert list(finished.glob("*.npz"))
    assert not (folder / NAMES[0]).exists()  # the manifest: it was killed before the end
    generate(DataConfig(**OPTIONS, folder=folder))
    assert contents(folder) == undisturbed


def wait_until_gone(group):
    """Workers end by themselves when their parent is killed; the group is then empty."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("workers outlived their parent")


@pytest.mark.slow
def test_killed_between_the_data_and_the_manifest(undisturbed, tmp_path, monkeypatch):
    def die(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("applications.rl.data.generate.write_manifest", die)
    with pytest.raises(KeyboardInterrupt):
        generate(DataConfig(**OPTIONS, folder=tmp_path))
    monkeypatch.undo()
    generate(DataConfig(**OPTIONS, folder=tmp_path))
    assert contents(tmp_path) == undisturbed


@pytest.mark.slow
def test_full_disk_keeps_what_was_made(undisturbed, tmp_path, monkeypatch):
    save, count = np.savez, iter(range(10))

    def fail_at_the_third(file, **arrays):
        if next(count) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(file, **arrays)

    monkeypatch.setattr(np, "savez", fail_at_the_third)
    with pytest.raises(OSError, match=r"cannot write '.*train-0000004.npz': No space left"):
        generate(DataConfig(**OPTIONS, folder=tmp_path))
    monkeypatch.undo()
    assert len(list(tmp_path.glob("*.parts/*.npz"))) == 2
    generate(DataConfig(**OPTIONS, folder=tmp_path))
    assert contents(tmp_path) == undisturbed


@pytest.mark.slow
def test_finished_data_are_found_and_others_refused(tmp_path):
    data = make_pointmaze(tmp_path)
    before = data.stat().st_mtime_ns
    make_pointmaze(tmp_path, workers=2)
    assert data.stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"other options \(seed is 0, asked for 1"):
        make_pointmaze(tmp_path, seed=1)
    with pytest.raises(DataError, match="transitions is 2500, asked for 99"):
        make_pointmaze(tmp_path, transitions=99)
    make_pointmaze(tmp_path, seed=1, overwrite=True)
    assert json.loads(data.with_suffix(".json").read_text())["seed"] == 1
    data.with_suffix(".json").unlink()
    with pytest.raises(DataError, match="was not made here"):
        make_pointmaze(tmp_path, seed=1)


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.slow
def test_a_file_of_ones_own_beside_unfinished_data_is_kept(tmp_path, monkeypatch, name, when):
    own = tmp_path / name

    def stop(*arguments, **options):
        if when == "before":
            raise RuntimeError("killed")
        own.write_bytes(b"mine")

    monkeypatch.setattr("applications.rl.data.generate.write_missing", stop)
    if when == "before":
        with pytest.raises(RuntimeError, match="killed"):
            make_pointmaze(tmp_path)
        own.write_bytes(b"mine")
    with pytest.raises(DataError, match=f"{name} exists and was not made here"):
        make_pointmaze(tmp_path)
    monkeypatch.undo()
    assert own.read_bytes() == b"mine"
    own.unlink()
    make_pointmaze(tmp_path)  # goes on


@pytest.mark.slow
def test_unfinished_data_of_other_options_are_refused(tmp_path):
    parts = tmp_path / "pointmaze-medium-navigate-v0.parts"
    parts.mkdir()
    for plan in ('{"seed": 8}', "{", "[]"):
        (parts / "plan.json").write_text(plan)
        with pytest.raises(DataError, match="unfinished dataset"):
            make_pointmaze(tmp_path)
    make_pointmaze(tmp_path, overwrite=True)
    assert not parts.exists()


@pytest.mark.slow
def test_more_transitions_begin_with_the_same_episodes(tmp_path):
    short = np.load(make_pointmaze(tmp_path / "short"))
    long = np.load(make_pointmaze(tmp_path / "long", transitions=3000))
    for name in short.files:
        np.testing.assert_array_equal(short[name][:2502], long[name][:2502], err_msg=name)
    other = np.load(make_pointmaze(tmp_path / "other", seed=1))
    validation = np.load(tmp_path / "short" / NAMES[2])
    for different in (other, validation):
        assert not np.array_equal(short["observations"][:1001], different["observations"][:1001])


@pytest.mark.slow
def test_manifest(tmp_path):
    data = make_pointmaze(tmp_path)
    manifest = json.loads(data.with_suffix(".json").read_text())
    assert manifest["transitions"] == {"train": 2500, "val": 1000}
    assert manifest["episodes"] == {"train": 3, "val": 1}
    assert manifest["seed"] == 0
    assert set(manifest["versions"]) == {"python", "ogbench", "mujoco", "gymnasium", "numpy"}
    for name, facts in manifest["files"].items():
        assert facts["sha256"] == checksum(tmp_path / name)
    states = np.load(data)
    starts = states["observations"][~states["terminals"]]
    maze = make_environment(find_task(POINTMAZE)).unwrapped
    for number, info in enumerate(maze.task_infos, start=1):
        near = np.linalg.norm(starts - maze.ij_to_xy(info["goal_ij"]), axis=1) <= 1.0
        assert manifest["success_fraction"][f"task{number}"] == near.mean()


@pytest.mark.slow
def test_layout_is_ogbenchs(tmp_path):
    arrays = dict(np.load(make_pointmaze(tmp_path)))
    rows = 2500 + 3
    assert {name: (array.shape, str(array.dtype)) for name, array in arrays.items()} == {
        "observations": ((rows, 2), "float32"),
        "actions": ((rows, 2), "float32"),
        "qpos": ((rows, 2), "float32"),
        "qvel": ((rows, 2), "float32"),
        "terminals": ((rows,), "bool"),
    }
    np.testing.assert_array_equal(np.flatnonzero(arrays["terminals"]), [1000, 2001, 2502])
    np.testing.assert_array_equal(arrays["observations"], arrays["qpos"])


@pytest.mark.slow
def test_no_episode_is_made_twice(undisturbed):
    starts = []
    for name in NAMES[1:]:
        arrays = np.load(io.BytesIO(undisturbed[name]))
        ends = np.flatnonzero(arrays["terminals"])
        starts += list(arrays["observations"][np.append(0, ends[:-1] + 1)])
    assert len(np.unique(starts, axis=0)) == 11


def test_printed_summary(tmp_path, capsys):
    run_data(DataConfig(task=POINTMAZE, transitions=300, folder=tmp_path))
    printed = capsys.readouterr()
    assert "transitions 300 (train), 300 (val)" in printed.out
    assert "task5" in printed.out
    assert "600/600" in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transitions": 0}, "transitions must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"task": "antmaze-large-navigate-v0"}, "no expert here"),
        ({"task": "gym:Pendulum-v1"}, "no expert here"),
        ({"task": "cube-single"}, "unknown task"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_pointmaze(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="folder: cannot write"):
        make_pointmaze(tmp_path / "file" / "below")


@pytest.mark.parametrize("transitions", [1, 999, 1000, 1001, 25_300])
def test_files_cover_the_transitions_once(transitions):
    files = list(plan_files(transitions, 1000))
    lengths = [length for file in files if file.split == "train" for length in file.lengths]
    validation = [length for file in files if file.split == "val" for length in file.lengths]
    assert sum(lengths) == transitions
    assert set(lengths[:-1]) <= {1000}
    assert len(validation) == max(1, len(lengths) // 10)
    for split in ("train", "val"):
        first = 0
        for file in (file for file in files if file.split == split):
            assert file.first == first
            first += len(file.lengths)


MAZE = np.array(
    [
        [1, 1, 1, 1, 1, 1],
        [1, 0, 0, 0, 0, 1],
        [1, 0, 1, 1, 0, 1],
        [1, 0, 0, 1, 0, 1],
        [1, 1, 1, 1, 1, 1],
    ]
)


def test_shortest_paths_on_a_grid():
    assert distances(MAZE, (3, 2)) == {
        (3, 2): 0, (3, 1): 1, (2, 1): 2, (1, 1): 3, (1, 2): 4, (1, 3): 5, (1, 4): 6, (2, 4): 7,
        (3, 4): 8,
    }  # fmt: skip
    table = next_cells(MAZE, (3, 2))
    assert (table[3, 4], table[1, 4], table[1, 1], table[3, 2]) == ((2, 4), (1, 3), (2, 1), (3, 2))
    assert vertices(MAZE) == [(1, 1), (1, 4), (3, 1), (3, 2), (3, 4)]


def test_paths_are_those_of_ogbenchs_oracle():
    maze = make_environment(find_task(POINTMAZE)).unwrapped
    for goal in open_cells(maze.maze_map):
        table = next_cells(maze.maze_map, goal)
        for cell in open_cells(maze.maze_map):
            expected, _ = maze.get_oracle_subgoal(maze.ij_to_xy(cell), maze.ij_to_xy(goal))
            np.testing.assert_array_equal(maze.ij_to_xy(table[cell]), expected)


def test_maze_expert_reaches_one_goal_after_the_other(monkeypatch):
    collector = MazeCollector(find_task(POINTMAZE))
    goals, set_goal = [], collector.point.set_goal

    def record(goal_xy):
        goals.append(goal_xy)
        set_goal(goal_xy=goal_xy)

    monkeypatch.setattr(collector.point, "set_goal", record)
    for seed in range(3):
        collector.episode(seed, 1000)
    assert len(goals) - 2 * 3 > 15  # besides those of the resets


def test_stitch_goes_four_cells_far():
    stitch = MazeCollector(find_task("pointmaze-medium-stitch-v0"))
    for seed in range(5):
        path = stitch.episode(seed, 200)["observations"]
        first, last = (stitch.point.xy_to_ij(path[row]) for row in (0, -1))
        assert distances(stitch.maze, first)[last] == 4


@pytest.mark.parametrize("name", [CUBE, "scene-noisy-v0", "puzzle-3x3-play-v0"])
@pytest.mark.slow
def test_experts_meet_their_targets(name, monkeypatch):
    collector = ManipulationCollector(find_task(name))
    scene = collector.env.unwrapped
    draw, met = scene.set_new_target, []

    def record(**options):
        if "p_stack" in options:  # a reset draws a target too
            met.append(bool(scene._success))
        return draw(**options)

    monkeypatch.setattr(scene, "set_new_target", record)
    episode = collector.episode(0, 400)
    assert sum(met) >= 3
    assert np.mean(met) > 0.5
    assert episode["observations"].shape[0] == 401
    assert ("button_states" in episode) == (name != CUBE)
    # The recorded positions are those of the recorded observation.
    np.testing.assert_allclose(episode["observations"][:, :6], episode["qpos"][:, :6], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kinds", "closed"),
    [
        ("cube-single-play-singletask-task1-v0", {"cube"}, False),
        ("puzzle-3x3-noisy-singletask-task1-v0", {"button"}, True),
        ("scene-play-singletask-task1-v0", {"cube", "button", "drawer", "window"}, False),
        ("scene-noisy-singletask-task1-v0", {"cube", "button", "drawer", "window"}, False),
    ],
)
def test_experts_have_the_options_of_ogbenchs_script(name, kinds, closed):
    """Planning experts have noise .1, closed-loop ones steps of at least .4; puzzles a fist."""
    experts = ManipulationCollector(find_task(name))._experts()
    assert set(experts) == kinds
    for kind, expert in experts.items():
        if "noisy" in name:
            assert expert._min_norm == 0.4
        else:
            assert expert._noise == 0.1
        if kind == "button":
            assert expert._gripper_always_closed == closed


def test_noise_of_the_noisy_kind_only():
    play, noisy = (find_task(f"cube-single-{kind}-v0") for kind in ("play", "noisy"))
    assert ManipulationCollector.protocol(play)["random_actions"] == 0.0
    assert ManipulationCollector.protocol(noisy)["random_actions"] == 0.1
    puzzle = find_task("puzzle-4x4-noisy-v0")
    assert ManipulationCollector.protocol(puzzle)["random_actions"] == 0.2


@pytest.mark.parametrize(
    ("y", "z", "visible"),
    [(0.0, 0.02, True), (0.3, 0.02, False), (-0.31, 0.07, True), (-0.31, 0.02, False)],
)
def test_cube_that_leaves_the_scene(y, z, visible):
    positions = np.array([[0.4, 0.0, 0.02], [0.4, y, z]])
    assert _is_visible(positions) == visible


def test_a_killed_worker_and_a_cube_out_of_sight_are_expected_failures(tmp_path, monkeypatch):
    def broken(*_):
        future = Future()
        future.set_exception(BrokenProcessPool("killed"))
        return future

    task = find_task(POINTMAZE)
    monkeypatch.setattr("applications.rl.data.episode_files.ProcessPoolExecutor.submit", broken)
    with pytest.raises(RunError, match=r"a worker was killed.*the same command continues"):
        write_missing(tmp_path, [*plan_files(200_000, 1000)], task, seed=0, workers=2)

    collector = ManipulationCollector.__new__(ManipulationCollector)  # without its simulator
    collector.environment = "scene"
    qpos = np.full((2, 40), 99.0)
    monkeypatch.setattr(collector, "_attempt", lambda *_: {"qpos": qpos})
    with pytest.raises(RunError, match="lost sight of the cube in 100 episodes"):
        collector.episode(0, 1)
