"""Evaluations: what counts as success, and that nothing but the seed changes a number."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from helpers.tiny import Corridor, options
from PIL import Image
from torch import nn

from applications.rl import (
    EpisodeEvaluator,
    Evaluation,
    RunError,
    Spaces,
    TrainedAgent,
    evaluate,
    make_agent,
    standardise,
)
from applications.rl.environments.reproducible import episode_seed
from applications.rl.environments.workers import LocalEnvironment, RemoteEnvironment
from applications.rl.evaluation.command import EvaluateConfig, evaluate_trained, record, write_gif
from applications.rl.evaluation.evaluator import BLOCK


@pytest.fixture(scope="module")
def agent():
    """Wide enough for a matrix product to round differently in batches of other sizes."""
    return make_agent(options("bc", hidden=(128, 128), flow_steps=4, horizon=3), 4, 2, seed=0)


class Script(gymnasium.Env):
    """Episodes of a given course: the reward, success and end of every step."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, steps):
        self.course = steps

    def reset(self, *, seed=None, options=None):
        self.now = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        reward, success, terminated, truncated = self.course[self.now]
        self.now += 1
        return np.full(1, self.now, np.float32), reward, terminated, truncated, {"success": success}


class Watched(nn.Module):
    """An agent that emits chunks of zeros and keeps what it saw."""

    observation_dim, action_dim = 1, 1

    def __init__(self, horizon):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.horizon = horizon
        self.seen = []

    def act_noise(self, batch_size, generator):
        return {"noise": torch.randn(batch_size, 1, generator=generator)}

    def act(self, observations, noise):
        assert not self.training
        self.seen.append(observations.sum().item())  # the other rows are empty
        return torch.zeros(len(observations), self.horizon, 1)


class Broken(Corridor):
    def step(self, action):
        raise ArithmeticError("the simulator is unstable")


def test_success_is_that_of_the_last_step_and_sums_are_undiscounted():
    course = [(1.0, False, False, False), (2.0, True, False, False), (4.0, False, False, True)]
    result = evaluate(Watched(1), lambda: Script(course), episodes=3, environments=2)
    assert result == Evaluation((False,) * 3, (7.0,) * 3, (3,) * 3)
    course[1] = (2.0, True, True, False)
    result = evaluate(Watched(1), lambda: Script(course), episodes=1)
    assert result == Evaluation((True,), (3.0,), (2,))


def test_a_chunk_is_executed_whole_and_cut_by_the_end_of_the_episode():
    course = [(0.0, False, False, step == 6) for step in range(7)]
    watched = Watched(3).train()
    result = evaluate(watched, lambda: Script(course), episodes=2, environments=1)
    assert watched.seen == [0, 3, 6, 0, 3, 6]  # the second episode begins with a new chunk
    assert result.lengths == (7, 7)
    assert watched.training  # as it was


@pytest.mark.slow
def test_the_numbers_depend_neither_on_how_many_play_at_once_nor_on_where(agent):
    whole = evaluate(agent, Corridor, episodes=12, seed=5, environments=1)
    assert len(set(whole.lengths)) > 2  # so that free environments take other episodes
    for environments in (2, 5, BLOCK, 12):
        other = evaluate(agent, Corridor, episodes=12, seed=5, environments=environments)
        assert other == whole
    assert evaluate(agent, Corridor, episodes=12, seed=5, workers=2) == whole
    assert evaluate(agent, Corridor, episodes=12, seed=6, environments=3) != whole
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert evaluate(agent, Corridor, episodes=12, seed=5) == whole
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    with EpisodeEvaluator(Corridor, environments=2) as evaluator:
        assert evaluator(agent, episodes=4, seed=5, first=3).returns == whole.returns[3:7]
        assert evaluator(agent, episodes=12, seed=5) == whole  # whatever was played before


def test_an_episode_by_hand(agent):
    """Episode 9 of a seed, from the definitions of its seeds and its row of a batch."""
    environment = standardise(Corridor())
    observation, _ = environment.reset(seed=episode_seed(5, 9, 0))
    generator = torch.Generator().manual_seed(episode_seed(5, 9, 1))
    total, steps, done = 0.0, 0, False
    while not done:
        rows = torch.zeros(BLOCK, 4)
        rows[9 % BLOCK] = torch.from_numpy(observation)
        noise = {name: torch.zeros(s) for name, s in agent.act_shapes(BLOCK).items()}
        for name, value in agent.act_noise(1, generator).items():
            noise[name][9 % BLOCK] = value[0]
        for action in agent.act(rows, noise)[9 % BLOCK].numpy():
            observation, reward, terminated, truncated, info = environment.step(action)
            total, steps, done = total + reward, steps + 1, terminated or truncated
            if done:
                break
    with EpisodeEvaluator(Corridor, environments=1) as evaluator:
        found = evaluator(agent, episodes=1, first=9, seed=5)
    assert (found.successes, found.lengths) == ((info["success"],), (steps,))
    assert found.returns[0] == pytest.approx(total, rel=1e-12)  # chunks are summed first


def test_numpys_global_generator_and_torchs_are_left_alone(agent):
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    evaluate(agent, Corridor, episodes=3)
    assert np.array_equal(before[0], np.random.get_state()[1])
    assert torch.equal(before[1], torch.get_rng_state())


def test_summary():
    result = Evaluation((True,) * 3 + (False,), (1.0, 2.0, 3.0, 6.0), (5, 5, 5, 9))
    assert (result.success, result.mean_return, result.mean_length) == (0.75, 3.0, 6.0)
    low, high = result.interval
    for p in (low, high):  # Wilson: |successes / n - p| = 1.96 sqrt(p (1 - p) / n)
        assert abs(0.75 - p) == pytest.approx(1.959964 * (p * (1 - p) / 4) ** 0.5, rel=1e-5)
    assert "success 75.0%" in str(result)
    assert "4 episodes" in str(result)


def test_progress_is_told_of_each_episode(agent):
    told = []
    with EpisodeEvaluator(Corridor, environments=3) as evaluator:
        result = evaluator(
            agent,
            episodes=5,
            seed=0,
            progress=lambda number, success: told.append((number, success)),
        )
    assert sorted(told) == list(enumerate(result.successes))


def test_arguments_and_spaces_are_checked(agent):
    with pytest.raises(ValueError, match="environments must be at least 1, got 0"):
        EpisodeEvaluator(Corridor, environments=0)
    with pytest.raises(ValueError, match="workers must be at least 0"):
        EpisodeEvaluator(Corridor, workers=-1)
    with pytest.raises(ValueError, match="episodes must be at least 1, got 0"):
        evaluate(agent, Corridor, episodes=0)
    other = make_agent(options("bc"), 4, 3)
    message = "environment's actions have 2 numbers and those of the agent have 3"
    with pytest.raises(ValueError, match=message):
        evaluate(other, Corridor, episodes=1)


@pytest.mark.slow
def test_failures_in_workers_are_explained(agent):
    with pytest.raises(RunError, match=r"(?s)failed in a worker process.*simulator is unstable"):
        evaluate(agent, Broken, episodes=2, workers=1)
    worker = RemoteEnvironment(Corridor)
    assert worker.spaces == LocalEnvironment(Corridor).spaces == Spaces(4, 2)
    worker._process.kill()
    worker._process.join()
    with pytest.raises(RunError, match="ended with exit code -9"):
        _ = worker.send_begin(0), worker.receive()
    worker.close()


def test_the_command_plays_other_episodes_than_those_of_made_data(agent, monkeypatch):
    seeds = []

    class Recording(Corridor):
        def reset(self, *, seed=None, options=None):
            seeds.append(seed)
            return super().reset(seed=seed, options=options)

    monkeypatch.setattr(
        "applications.rl.evaluation.command.make_environment", lambda task: Recording()
    )
    trained = TrainedAgent(agent, "bc", "pointmaze-medium-navigate-v0", 0, {})
    evaluate_trained(trained, EvaluateConfig((), episodes=3))
    played = set(seeds) - {None}
    assert len(played) == 3
    made = {episode_seed(0, split, i) for split in (0, 1) for i in range(9)}
    made |= {episode_seed(0, i, split) for split in (0, 1) for i in range(9)}
    assert not played & made


def test_recording_shows_the_episode_that_is_evaluated(agent, tmp_path):
    whole = evaluate(agent, Corridor, episodes=3, seed=1)
    every = record(agent, Corridor, seed=1, episode=2)
    assert len(every) == whole.lengths[2] + 1  # the start, and each step
    few = record(agent, Corridor, seed=1, episode=2, most_frames=4)
    assert 2 <= len(few) <= 4
    assert np.array_equal(few[0], every[0])
    assert np.array_equal(few[-1], every[-1])
    write_gif(
        tmp_path / "new" / "episode.gif", [np.kron(f, np.ones((4, 4, 1), f.dtype)) for f in few]
    )
    with Image.open(tmp_path / "new" / "episode.gif") as animation:
        assert animation.n_frames >= 2
        assert animation.size == (32, 32)


def test_what_cannot_be_drawn_is_explained(agent):
    class Blind(Corridor):
        def render(self):
            raise OSError("libEGL.so.1: cannot open shared object file")

    class Nothing(Corridor):
        def render(self):
            return None

    def impossible():
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    for factory, reason in ((Blind, "libEGL"), (Nothing, "no render_mode"), (impossible, "glGet")):
        with pytest.raises(RunError, match=rf"rendering failed \(.*{reason}.*libosmesa6"):
            record(agent, factory)
    with pytest.raises(ValueError, match="gif_frames must be at least 2, got 1"):
        record(agent, Corridor, most_frames=1)
