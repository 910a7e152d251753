"""Balanced sampling: online batches of two halves, after random actions."""

import pytest
import torch
from helpers.killed_rl import configuration
from helpers.same_run import assert_same_run
from helpers.tiny import Corridor, corridor_data, options

from applications.rl import Episodes, OnlineCollector, Replay, make_agent, standardise, train
from flows.training import checkpoint as checkpoints
from flows.training.checkpoint import CheckpointError

PHASES = {"offline_steps": 3, "online_steps": 30, "start_training": 21}


def fit(folder, **changes):
    config = configuration(
        folder,
        PHASES,
        **{
            "agent": "rlpd",
            "options": options("rlpd", horizon=3),
            "balanced_sampling": True,
            "eval_every": 10,
        }
        | changes,
    )
    return train(config, environment=Corridor, dataset=corridor_data())


@pytest.mark.slow
def test_offline_batches_are_of_the_data_and_online_ones_have_two_halves(tmp_path, monkeypatch):
    seen, windows = [], Replay.windows

    def watched(replay, starts, **rest):
        seen.append((replay.online, int((starts < replay.offline).sum()), len(starts)))
        return windows(replay, starts, **rest)

    random, step = [], OnlineCollector.step

    def stepping(collector, *arguments):
        random.append(collector.steps < collector.random_steps)
        return step(collector, *arguments)

    monkeypatch.setattr(Replay, "windows", watched)
    monkeypatch.setattr(OnlineCollector, "step", stepping)
    fit(tmp_path)
    assert random == [True] * 20 + [False] * 10  # the agent acts from step 21 on
    assert seen == [(0, 16, 16)] * 3 + [(step, 8, 16) for step in range(21, 31)]


@pytest.mark.slow
def test_a_resumed_run_is_the_whole_one_and_must_be_balanced_too(tmp_path):
    (whole,) = fit(tmp_path / "whole")
    fit(tmp_path / "two", online_steps=25)
    with pytest.raises(CheckpointError, match="balanced_sampling"):
        fit(tmp_path / "two", balanced_sampling=False)
    (resumed,) = fit(tmp_path / "two")
    a, b = (checkpoints.load(run.folder / "checkpoint.pt") for run in (whole, resumed))
    torch.testing.assert_close(a["module"], b["module"], rtol=0, atol=0)
    assert torch.equal(a["generator"], b["generator"])


@pytest.mark.slow
def test_stacked_seeds_are_balanced_each(tmp_path):
    fit(tmp_path / "alone", seeds=(0, 1), stacked=1)
    fit(tmp_path / "stacked", seeds=(0, 1), stacked=2)
    for seed in (0, 1):
        assert_same_run(*[tmp_path / name / f"seed{seed}" for name in ("stacked", "alone")])


def test_first_actions_are_random_and_the_agent_is_not_asked_for_them(monkeypatch):
    agent, steps, asked = make_agent(options("rlpd", horizon=3), 4, 2), 400, []
    monkeypatch.setattr(
        type(agent), "act", lambda self, s, generator: asked.append(1) or torch.zeros(1, 3, 2)
    )
    episodes = Episodes(lambda: standardise(Corridor()), 0)
    replay = Replay(steps + 6, 4, 2)
    collector = OnlineCollector(episodes, replay, random_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        collector.step(agent, generator)
    assert not asked
    actions = replay.state_dict()["actions"]
    assert actions.abs().max() <= 1
    assert actions.mean(0).abs().max() < 4 / (3 * steps) ** 0.5
    assert (actions.square().mean(0) - 1 / 3).abs().max() < 0.06
    assert len(actions.unique(dim=0)) == steps
    for _ in range(6):
        collector.step(agent, generator)
    assert asked
    assert not replay.state_dict()["actions"][steps:].any()
