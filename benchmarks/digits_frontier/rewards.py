"""Rewards of handwritten digits for the frontier: of a class, of pixels, and of a decoded image.

Each has a standard deviation of about one on the training images, except for the class, whose
log-probability lies between -6 and 0.  Samples are vectors of 64 pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adjoint import AbstractReward, Reward, decoded
from applications.toy2d.digits.classifier import DigitReward
from applications.toy2d.digits.data import SIZE
from flows import Cond

UPSCALE = 4
"""Ratio of the side of the decoded image to the side of the digit."""


def make_rewards(classifier: nn.Module, digit: int) -> dict[str, AbstractReward]:
    """Return the rewards of the frontier by name: ``digit``, ``ink`` and ``symmetry``."""
    return {
        "digit": Reward(DigitReward(classifier, digit), name="digit"),
        "ink": Reward(ink, name="ink"),
        "symmetry": decoded(Reward(symmetry, name="symmetry"), make_decoder()),
    }


def ink(x: Tensor, cond: Cond | None) -> Tensor:
    """Return a quarter of the sum of the pixels, (B,)."""
    return x.flatten(1).sum(1) / 4


def symmetry(y: Tensor, cond: Cond | None) -> Tensor:
    """Return -10 times the mean squared difference of images (B, C, H, W) and their mirrors."""
    return -10 * (y - y.flip(3)).square().mean((1, 2, 3))


def make_decoder() -> nn.Module:
    """Make a decoder from vectors (B, 64) to smooth images (B, 1, 32, 32): upscale, then blur."""
    blur = nn.Conv2d(1, 1, 5, padding=2, padding_mode="replicate", bias=False)
    profile = torch.exp(-torch.linspace(-2, 2, 5).square() / 2)
    blur.weight.data = (profile[:, None] * profile / profile.sum() ** 2)[None, None]
    blur.requires_grad_(False)
    return nn.Sequential(
        nn.Unflatten(1, (1, SIZE, SIZE)),
        nn.Upsample(scale_factor=UPSCALE, mode="bilinear"),
        blur,
    )
