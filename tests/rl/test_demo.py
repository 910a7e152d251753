"""The demonstration, very small: it runs, resumes, and its folder is complete."""

import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("ogbench")

from applications.rl.demo import DemoConfig, run_demo

torch.set_num_threads(1)


@pytest.mark.slow
def test_a_small_demo_leaves_report_and_pictures_and_resumes(tmp_path, capsys):
    config = DemoConfig(
        folder=tmp_path, transitions=4000, updates=8, episodes=2, workers=1, resume=True
    )
    report = run_demo(config)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert all(math.isfinite(v) for v in report.values() if isinstance(v, float))
    for name in ("maze.png", "actions.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    for agent in ("bc", "qam"):
        low, high = (report[f"success_{agent}_{end}"] for end in ("low", "high"))
        assert low <= report[f"success_{agent}"] <= high
        assert report[f"length_{agent}"] <= 1000
    again = run_demo(config)  # nothing is left to train
    differing = {name for name in report if report[name] != again[name]}
    assert differing == {"seconds"}
    assert "wrote" in capsys.readouterr().out


def test_paths_hold_every_position_of_every_episode():
    from applications.rl import find_task, make_environment
    from applications.rl.demo import Paths

    seen = []
    environment = Paths(
        make_environment(find_task("pointmaze-medium-navigate-singletask-task1-v0")), seen
    )
    expected = []
    for seed in (0, 1):
        observation, _ = environment.reset(seed=seed)
        expected.append([observation])
        for _ in range(3):
            expected[-1].append(environment.step(np.array([1.0, 0.5], np.float32))[0])
    environment.close()
    np.testing.assert_array_equal(np.array(seen), np.array(expected))
