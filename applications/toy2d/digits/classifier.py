r"""A small classifier of the digits, and the reward log P(digit | x) that it defines.

The classifier sees its images with noise of a random strength up to 0.4, and its labels are
smoothed.  Its log-probability then stays meaningful on images that no one wrote, and bounded by
about -6 where the digit is another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from applications.toy2d.digits.data import CLASSES, DIM, Digits
from flows import Callback, Cond, Trainer, TrainerConfig


class Classifier(nn.Sequential):
    """A network maps images (B, 64) to the logits (B, 10) of the ten digits."""

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
        """Return the most probable digit of each image, (B,) int64."""
        return self(x).argmax(1)

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """Return the fraction of images that are recognised as ``labels``."""
        return float((self.labels(x) == labels).double().mean())


class DigitReward:
    """The reward is log P(digit | x) under a classifier: at temperature 1 the tilt is Bayes' rule.

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
        """Return the log-probability (B,) of images (B, 64); ``cond`` is ignored."""
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
    """Train a classifier on noisy images and freeze it; see the module docstring.

    Arguments:
        noise: largest standard deviation of the noise; each image draws its own below it.
        smoothing: weight of the uniform distribution in the labels.
        callbacks, checkpoint, resume: as in `flows.Trainer`.
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
