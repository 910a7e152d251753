r"""Handwritten digits: 8×8 images, a classifier that judges them, a flow that generates them.

The images are scikit-learn's 1797 digits, as vectors of 64 pixels scaled to [-1, 1].  Their 17 grey
levels lie 1/8 apart; noise of standard deviation 0.1 spreads them, so that pixels that are always
black have a density too.  A quarter is held out from everything that is trained.

The flow is a Gaussian plus what is not Gaussian: v = v_G + v_θ, where v_G is the closed-form
velocity of N(mean, covariance) of the images and v_θ a network that starts at zero.  Most of a
velocity in 64 dimensions is linear, and a small network need not learn that part: after 1000
updates 66 % of the samples are recognised with a probability above 0.8, against 47 % without v_G
(93 % of held-out images are).

The classifier sees its images with noise of a random strength up to 0.4, and its labels are
smoothed: its log-probability then stays meaningful on images that no one wrote, and bounded by
about -6 where the digit is another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from flows import Callback, Cond, GaussianMixture, MLPVelocity, Residual, data_sampler, fit_flow
from flows.training import Sampler
from flows.training.fit import Trainer, TrainerConfig

SIZE, DIM, CLASSES = 8, 64, 10

NOISE = 0.1
"""Standard deviation of the noise that spreads the grey levels."""

HELD_OUT = 450
"""Images kept for judging."""


@dataclass(frozen=True, eq=False)
class Digits:
    """The images, split at random.

    Attributes:
        train, test: (N, 64) in [-1, 1], without noise.
        train_labels, test_labels: (N,) int64.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def to(self, device: str) -> Digits:
        """The same on a device."""
        return Digits(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def load(seed: int = 0) -> Digits:
    """The digits, with ``HELD_OUT`` of them drawn by ``seed`` as the test set."""
    bunch = load_digits()
    images = torch.as_tensor(bunch.data, dtype=torch.float32) / 8 - 1
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    return Digits(images[train], labels[train], images[test], labels[test])


def add_noise(images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """``images`` (N, 64) as the flow sees them, with noise of standard deviation ``NOISE``."""
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    return images + NOISE * noise.to(images.device)


def noisy_sampler(images: Tensor) -> Sampler:
    """Rows of ``images`` with replacement and fresh noise, for `flows.training.fit.fit_flow`."""
    rows = data_sampler(images)

    def sampler(n: int, generator: torch.Generator) -> Tensor:
        drawn = rows(n, generator)
        assert isinstance(drawn, Tensor)
        return add_noise(drawn, generator=generator)

    return sampler


class Classifier(nn.Sequential):
    """Logits (B, 10) of images (B, 64)."""

    def __init__(self, width: int = 128) -> None:
        super().__init__(
            nn.Linear(DIM, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, CLASSES),
        )

    @torch.no_grad()
    def labels(self, x: Tensor) -> Tensor:
        """The most probable digit of each image, (B,) int64."""
        return self(x).argmax(1)

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """Fraction of images recognised."""
        return float((self.labels(x) == labels).double().mean())


class DigitReward:
    """log P(digit | x) under a classifier: the tilt at temperature 1 is Bayes' rule.

    Arguments:
        classifier: any module (B, 64) to (B, 10); frozen by the caller.
        digit: 0 to 9.

    Raises:
        ValueError: there is no such digit.
    """

    def __init__(self, classifier: nn.Module, digit: int) -> None:
        if not 0 <= digit < CLASSES:
            raise ValueError(f"digit must be one of 0 … {CLASSES - 1}, got {digit}")
        self.classifier, self.digit = classifier, digit

    def __call__(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        """Log-probability (B,) of images (B, 64); ``cond`` is ignored."""
        return F.log_softmax(self.classifier(x), dim=1)[:, self.digit]


def fit_classifier(
    data: Digits,
    *,
    iterations: int = 600,
    seed: int = 0,
    noise: float = 0.4,
    smoothing: float = 0.05,
    callbacks: Sequence[Callback] = (),
    checkpoint: Path | None = None,
    resume: bool = False,
) -> Classifier:
    """A classifier of noisy images, frozen; see the module docstring.

    Arguments:
        noise: largest standard deviation of the noise; each image draws its own below it.
        smoothing: weight of the uniform distribution in the labels.
        callbacks, checkpoint, resume: as in `flows.training.fit.Trainer`.
    """

    def loss(module: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        rows = torch.randint(len(data.train), (256,), generator=generator)
        strength = noise * torch.rand(256, 1, generator=generator)
        x = data.train[rows] + strength * torch.randn(256, DIM, generator=generator)
        logits, labels = module(x), data.train_labels[rows]
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        value = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        return value, {"accuracy": accuracy}

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = Classifier()
    config = TrainerConfig(iterations=iterations, lr=3e-3, ema_decay=0.99, seed=seed)
    trainer = Trainer(
        network,
        loss,
        config,
        callbacks=callbacks,
        checkpoint=checkpoint,
        identity={"classifier": "digits", "iterations": iterations, "seed": seed},
    )
    fitted = trainer.fit(resume=resume)
    assert isinstance(fitted, Classifier)
    return fitted.requires_grad_(False)


def make_flow(images: Tensor, *, width: int = 256, depth: int = 3, seed: int = 0) -> Residual:
    """The flow before training: the Gaussian of ``images`` (N, 64) with noise, and a network."""
    x = images.double()
    covariance = torch.cov(x.T) + NOISE**2 * torch.eye(DIM, dtype=torch.float64)
    gaussian = GaussianMixture(torch.ones(1), x.mean(0)[None].float(), covariance[None].float())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Residual(gaussian, MLPVelocity(DIM, hidden=[width] * depth, zero_init=True))


def fit_base(
    data: Digits,
    *,
    iterations: int,
    batch_size: int = 256,
    width: int = 256,
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    checkpoint: Path | None = None,
    resume: bool = False,
) -> nn.Module:
    """The flow trained on the training images; arguments as in `flows.training.fit.fit_flow`."""
    return fit_flow(
        make_flow(data.train, width=width, seed=seed),
        noisy_sampler(data.train),
        config=TrainerConfig(iterations=iterations, lr=4e-3, ema_decay=0.995, seed=seed),
        batch_size=batch_size,
        callbacks=callbacks,
        checkpoint=checkpoint,
        resume=resume,
        identity={
            "flow": "digits",
            "iterations": iterations,
            "batch_size": batch_size,
            "width": width,
            "seed": seed,
        },
    )
