"""A run in an environment with randomness of its own is resumed, with a new episode."""

import random
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from helpers.killed_rl import configuration
from helpers.tiny import options

from applications.rl import train
from flows.training import checkpoint as checkpoints

torch.set_num_threads(1)

SOURCES = ("own generator", "python")


class Unrepeatable(gymnasium.Env):
    """An environment that draws what reset(seed=...) does not decide in its 9 steps."""

    observation_space = Box(-9, 9, (1,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, source="own generator"):
        self.source, self.rng = source, np.random.default_rng()

    def draw(self):
        if self.source == "python":
            return random.gauss(0, 1)
        return self.rng.normal()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.array([self.draw()], np.float32), {}

    def step(self, action):
        self.steps += 1
        seen = np.array([self.draw()], np.float32)
        return seen, float(seen[0]), False, self.steps == 9, {}


def fit(folder, steps, source):
    phases = {"offline_steps": 0, "online_steps": steps, "start_training": 5, "use_data": False}
    own = options("bc", horizon=3)
    config = configuration(folder, phases, agent="bc", options=own, eval_every=0, batch_size=4)
    return train(config, environment=lambda: Unrepeatable(source))[0]


def collected(folder):
    loss = checkpoints.load(folder / "checkpoint.pt")["loss"]
    return loss["replay"]["terminals"], loss["replay"]["masks"], loss["collector"]


@pytest.mark.parametrize("source", SOURCES)
def test_a_resume_goes_on_with_a_new_episode_and_says_so(tmp_path, source):
    run = fit(tmp_path, 21, source)
    terminals, _, before = collected(run.folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, 24, source)
    said = [str(each.message) for each in caught if "cannot be resumed" in str(each.message)]
    (message,) = said
    number = before["episodes"]["episode"]
    assert (number, before["length"]) == (2, 3)
    assert message.startswith(f"episode {number} cannot be resumed, and a new one begins")
    ended, masks, after = collected(run.folder)
    assert torch.equal(ended[:20], terminals[:20])
    assert ended[20] == 1  # the interrupted episode ends where it was interrupted
    assert masks[20] == 1  # and, as at a time limit, values are bootstrapped there
    assert (after["episodes"]["episode"], after["length"]) == (number + 1, 3)
