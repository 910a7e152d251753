"""The data: scikit-learn's 1797 handwritten digits, 8×8 images as vectors of 64 pixels in [-1, 1].

The 17 grey levels of a pixel lie 1/8 apart.  Gaussian noise of standard deviation 0.1 spreads them,
so that pixels that are always black have a density too.  A quarter of the images is held out from
everything that is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from flows import GaussianMixture, data_sampler
from flows.training import Sampler

SIZE, DIM, CLASSES = 8, 64, 10

NOISE = 0.1
"""Standard deviation of the noise that spreads the grey levels."""

HELD_OUT = 450
"""Number of images in the test set."""


@dataclass(frozen=True, eq=False)
class Digits:
    """The digits are split at random into a training set and a test set.

    Attributes:
        train, test: images (N, 64) in [-1, 1], without noise.
        train_labels, test_labels: the digits (N,) that they show, int64.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def to(self, device: str) -> Digits:
        """Copy all tensors to ``device``."""
        return Digits(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def load(seed: int = 0) -> Digits:
    """Load the digits; ``seed`` decides which ``HELD_OUT`` of them are the test set."""
    bunch = load_digits()
    images = torch.as_tensor(bunch.data, dtype=torch.float32) / 8 - 1
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    return Digits(images[train], labels[train], images[test], labels[test])


def add_noise(images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Add to ``images`` (N, 64) Gaussian noise of standard deviation ``NOISE``."""
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    return images + NOISE * noise.to(images.device)


def noisy_sampler(images: Tensor) -> Sampler:
    """Make a sampler that draws rows of ``images`` with replacement and adds fresh noise."""
    rows = data_sampler(images)

    def sampler(n: int, generator: torch.Generator) -> Tensor:
        drawn = rows(n, generator)
        assert isinstance(drawn, Tensor)
        return add_noise(drawn, generator=generator)

    return sampler


def gaussian_of(images: Tensor) -> GaussianMixture:
    """Make the closed-form flow of the Gaussian with mean and covariance of noisy ``images``."""
    x = images.double()
    covariance = torch.cov(x.T) + NOISE**2 * torch.eye(x.shape[1], dtype=torch.float64)
    return GaussianMixture(torch.ones(1), x.mean(0)[None].float(), covariance[None].float())
