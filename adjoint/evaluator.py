"""Fields and rewards evaluated at a part of their states at a time, for models of any size."""

from __future__ import annotations

import torch
from torch import Tensor

from adjoint.chain.rollout import chunks, rows_of, velocity_along
from adjoint.rewards.reward import Reward, ValueFunction
from flows.field import Cond, VelocityField


def field_in_parts(field: VelocityField, size: int) -> VelocityField:
    """``field`` at scalar times, evaluated at ``size`` states at a time; itself if that is 0."""
    if not size:
        return field

    def evaluate(x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        return velocity_along(field, x[None], t.reshape(1), cond, micro_batch=size)[0]

    return evaluate


def reward_in_parts(reward: Reward, size: int) -> ValueFunction:
    """The value of ``reward``, of ``size`` samples at a time; itself if that is 0."""
    if not size:
        return reward

    def value(x: Tensor, cond: Cond | None) -> Tensor:
        return torch.cat([reward(x[i], rows_of(cond, i)) for i in chunks(len(x), size)])

    return value
