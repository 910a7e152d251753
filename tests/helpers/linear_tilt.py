"""The tilt whose exact solution one vector holds, shared by the tests of ``tilt``.

On a Gaussian base N(m, s² I) and for a linear reward λ·x the exact tilt is N(m + s² λ, s² I), and
the lean adjoint is the same on every trajectory.  ``Shift`` holds exactly that family, so that a
hundred cheap updates reach the closed form whatever the options are.
"""

from dataclasses import replace

import torch
from torch import nn

from adjoint.tilt import TiltConfig, tilt
from flows.field import batch_time
from flows.mixture import GaussianMixture
from helpers.tilt_problems import S2, M

SLOPES = torch.tensor([1.0, -0.5], dtype=torch.float64)
BASE = GaussianMixture.isotropic(torch.full((1, 2), M, dtype=torch.float64), S2**0.5)
FAST = TiltConfig(
    iterations=150,
    lr=0.05,
    ema_decay=0.0,
    steps=5,
    batch_size=16,
    certificate_samples=0,
    warmup=0,
    refine_fraction=0.0,
)


class Slope:
    """The reward λ·x, counting the samples of each evaluation."""

    def __init__(self):
        self.sizes = []

    def __call__(self, x, cond=None):
        self.sizes.append(len(x))
        return x @ SLOPES.to(x)


class Shift(nn.Module):
    """The velocity of N(m + w, s² I) for a base N(m, s² I), with w to be learned.

    ``w`` is a vector, or a matrix applied to the condition.  Remembers the times it was asked for.
    """

    def __init__(self, base=BASE, shape=(2,)):
        super().__init__()
        self.base = base
        self.w = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        self.times = []

    def forward(self, x, t, cond=None):
        if torch.is_grad_enabled():
            self.times.append(t.detach().unique())
        t = batch_time(t, x)
        w = self.w if self.w.ndim == 1 else cond["c"] @ self.w.T
        return self.base(x, t.flatten(), cond) + (1 - t) / (t**2 * S2 + (1 - t) ** 2) * w


def run(config=FAST, *, reward=None, **options):
    """A tilt of BASE by the linear reward in float64, training a ``Shift``."""
    options = {"shape": (2,), "model": Shift(), "dtype": torch.float64} | options
    return tilt(BASE, reward or Slope(), config=config, **options)


def with_options(**options):
    return replace(FAST, **options)
