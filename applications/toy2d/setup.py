"""A run's target and reward, looked up by `resolve` before any file changes.

The name of a target or reward of one's own does not say whether it is still the same.  Checkpoints
identify it by its name with a fingerprint of its numbers: 64 samples from one seed, or the values
at 64 points of the plane, to three digits.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from adjoint import check_reward
from applications.toy2d.config import RunConfig
from applications.toy2d.kernels import check_scheme
from applications.toy2d.rewards import REWARDS, ToyReward, make_reward
from applications.toy2d.targets import TARGETS, Target, find_target

POINTS = 64
"""Number of points that a fingerprint is made of."""

Identity = dict[str, str | int | float | bool]


@dataclass(frozen=True, eq=False)
class RunSetup:
    """A run's options with the target and the reward that they name.

    Attributes:
        config: the options.
        target: the distribution that the base generates.
        reward: the reward of the tilt.
    """

    config: RunConfig
    target: Target
    reward: ToyReward

    @property
    def identity(self) -> Identity:
        """Return what a checkpoint of the tilt belongs to; a resume with another is refused."""
        identity: Identity = {
            "target": describe_target(self.target),
            "reward": describe_reward(self.reward, self.config),
            "base": self.config.base,
        }
        if self.config.trains_base:
            identity["base_iterations"] = self.config.base_iterations
        return identity

    @property
    def base_identity(self) -> Identity:
        """Return what a checkpoint of the trained base belongs to."""
        return {
            "target": describe_target(self.target),
            "seed": self.config.seed,
            "base_iterations": self.config.base_iterations,
        }


def resolve(config: RunConfig) -> RunSetup:
    """Look up target and reward, and refuse options that cannot be run.

    Raises:
        ValueError: an unknown target, reward or kernel, an option out of range, or a closed form
            where the target has none; a target whose samples, a reward whose values, or a kernel
            whose table a tilt cannot use.
    """
    target = find_target(config.target)
    reward = make_reward(config.reward, target)
    validate(config, target)
    _try_reward(reward, target, config.temperature)
    return RunSetup(config, target, reward)


def _try_reward(reward: ToyReward, target: Target, temperature: float) -> None:
    """Evaluate the reward on samples of the target, before a base is trained for it.

    Raises:
        ValueError: samples or rewards are not finite, or the reward has the wrong type or shape or
            no gradient.
    """
    samples = target.sample(POINTS, torch.Generator().manual_seed(0)).float()
    if not bool(samples.isfinite().all()):
        raise ValueError(f"samples of target {target.name!r} must be finite, got NaN or infinity")
    try:
        check_reward(reward.for_tilt.scaled(1 / temperature), samples)
    except TypeError as error:
        raise ValueError(str(error)) from error


def validate(config: RunConfig, target: Target) -> None:
    """Refuse options that cannot be run with ``target``.

    Raises:
        ValueError: an option out of range, a kernel whose table does not fit, or a closed form
            where the target has none.
    """
    if not config.trains_base and target.mixture is None:
        raise ValueError(
            f"base 'closed_form' needs a mixture target, got {target.name!r}; use 'trained'"
        )
    if config.samples < 100:
        raise ValueError(f"samples must be at least 100, got {config.samples}")
    _ = config.base_options
    check_scheme(config.tilt_options, 2)


def describe_target(target: Target) -> str:
    """Return the name of a target, with a fingerprint where it is not one of ``TARGETS``."""
    if TARGETS.get(target.name) is target:
        return target.name
    samples = target.sample(POINTS, torch.Generator().manual_seed(0))
    return f"{target.name} {_fingerprint(samples)}"


def describe_reward(reward: ToyReward, config: RunConfig) -> str:
    """Return the name of a reward, with a fingerprint where it is not one of ``REWARDS``."""
    if isinstance(config.reward, str) and config.reward in REWARDS:
        return reward.name
    points = 2 * torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return f"{reward.name} {_fingerprint(reward(points))}"


def _fingerprint(values: Tensor) -> str:
    """Digest numbers to three digits, so that rounding errors do not change the result."""
    text = " ".join(f"{value:.2e}" for value in values.double().flatten().tolist())
    return hashlib.sha256(text.encode()).hexdigest()[:12]
