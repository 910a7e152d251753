"""A tilting problem comes with its exact solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adjoint import ValueFunction
from flows import GaussianMixture, VelocityField


@dataclass(frozen=True, eq=False)
class Problem:
    """A base, a reward, and the exact tilt.

    Attributes:
        name, dim: name of the problem, and dimension of a sample.
        base: closed-form flow, float32.
        reward: (x, cond) → (B,).
        sample: (n, generator) → exact samples (n, dim), float32.
        velocity: (x, t) → optimal velocity (B, dim) at a float t.
        modes: (C, dim) centres whose cells partition the space.
        frequencies: (C,) exact probability of each cell.
        log_z: exact log Z.
    """

    name: str
    dim: int
    base: GaussianMixture
    reward: ValueFunction
    sample: Callable[[int, torch.Generator], Tensor]
    velocity: VelocityField
    modes: Tensor
    frequencies: Tensor
    log_z: float
