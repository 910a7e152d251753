"""Tiny environments, data and agents, with which a run takes a second."""

from functools import cache

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from applications.rl import AGENTS, Dataset, standardise

SIZES = {"hidden": (16, 16), "critics": 2, "flow_steps": 3}


def options(name, **changes):
    """Return options of an agent with tiny networks."""
    config = AGENTS[name].config_class
    known = {key: value for key, value in SIZES.items() if hasattr(config(), key)}
    return config(**(known | changes))


class Corridor(gymnasium.Env):
    """A point in the plane that is to reach a goal; success ends an episode, and so do 12 steps.

    The start is drawn from the environment's own generator and the goal from numpy's global one, as
    in OGBench's mazes; steps are shaken by both.  Its spaces are not the standard ones.
    """

    observation_space = Box(-np.inf, np.inf, (4,), np.float64)
    action_space = Box(-0.5, 0.5, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1, 2)
        self.goal = np.random.uniform(-1, 1, 2)
        self.steps = 0
        return self._observation(), {}

    def step(self, action):
        noise = self.np_random.normal(size=2) + np.random.normal(size=2)
        self.x = self.x + np.asarray(action, np.float64) + 0.02 * noise
        self.steps += 1
        near = bool(np.linalg.norm(self.x - self.goal) < 0.4)
        reward = -float(np.linalg.norm(self.x - self.goal))
        return self._observation(), reward, near, self.steps >= 12, {"success": float(near)}

    def _observation(self):
        return np.concatenate([self.x, self.goal])

    def render(self):
        frame = np.zeros((8, 8, 3), np.uint8)
        frame[np.clip((4 + 2 * self.x).astype(int), 0, 7)] = 255
        return frame


class Bandit(gymnasium.Env):
    """One step: the reward is the action, and a positive one is a success."""

    observation_space = Box(-np.inf, np.inf, (1,), np.float32)
    action_space = Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.context = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.context, {}

    def step(self, action):
        reward = float(action[0])
        return self.context, reward, True, False, {"success": reward > 0}


@cache
def corridor_data(rows=400, seed=0):
    """Play episodes of the corridor with random actions; return them as data."""
    environment, rng = standardise(Corridor()), np.random.default_rng(seed)
    table, done = [], True
    while len(table) < rows:
        if done:
            observation, _ = environment.reset(seed=int(rng.integers(2**31)))
        action = rng.uniform(-1, 1, 2).astype(np.float32)
        following, reward, terminated, truncated, _ = environment.step(action)
        done = terminated or truncated
        row = (observation, action, reward, 1 - terminated, done, following)
        table.append([np.asarray(value, np.float32) for value in row])
        observation = following
    return Dataset(*(np.stack(column) for column in zip(*table, strict=True)), source="corridor")


@cache
def bandit_data(rows=2000, seed=0):
    """Draw actions from a mixture of two normal distributions around -0.6 and 0.6."""
    rng = np.random.default_rng(seed)
    contexts = rng.uniform(-1, 1, (rows, 1)).astype(np.float32)
    signs = rng.choice([-1.0, 1.0], (rows, 1))
    actions = np.clip(0.6 * signs + 0.1 * rng.normal(size=(rows, 1)), -1, 1).astype(np.float32)
    ends = np.ones(rows, np.float32)
    return Dataset(contexts, actions, actions[:, 0], 1 - ends, ends, contexts, source="bandit")
