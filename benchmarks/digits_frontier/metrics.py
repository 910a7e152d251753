"""Reward, diversity and fidelity of samples of digits, measured in batches of one size.

Metrics that depend on the number of samples compare only at equal numbers; the spread over the
batches gives every metric a standard error:

``classes``   effective number of classes, the exponential of the entropy of the recognised digits;
``distance``  mean distance of two samples, with pixels clipped to the range they are shown in;
``coverage``  per-class coverage: the fraction of a class's training images in whose neighbourhood
              a sample lies, averaged over the classes.  The neighbourhood reaches to the fifth
              nearest training image (Naeem et al., "Reliable fidelity and diversity metrics for
              generative models", arXiv 2002.09797);
``nearest``   distance to the nearest training image.  It measures fidelity rather than diversity:
              compare it with the value for held-out images;
``certain``   fraction recognised with a probability above 0.8, another measure of fidelity;
``kl``        relative entropy to the base, computed from the two distributions and not from the
              samples alone (`benchmarks.digits_frontier.kl`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from applications.toy2d.digits.classifier import Classifier
from applications.toy2d.digits.data import CLASSES, Digits, add_noise
from applications.toy2d.digits.metrics import nearest_distance

DIVERSITY = ("classes", "distance", "coverage")
DECISIVE = ("distance", "coverage")
"""The metrics that decide which method is ahead.  ``classes`` is left out because it also counts
samples of which the classifier is unsure: in it, best-of-n surpasses even the exact tilt."""
CLOSENESS = "kl"

NEIGHBOURS = 5
"""Number of training images within the neighbourhood of one."""

Metrics = Mapping[str, Tensor]
"""Values (m,) of each metric, one for each of the m batches, by name."""


class SampleMetrics:
    """Measure the metrics of samples (N, 64), in batches.

    Arguments:
        classifier: recognises the digits.
        data: its training images, with the noise of the flow, define the coverage.
        batch_size: samples in each batch.
    """

    def __init__(self, classifier: Classifier, data: Digits, batch_size: int) -> None:
        self.classifier, self.batch_size = classifier, batch_size
        self.train, self.labels = data.train, data.train_labels
        noise = torch.Generator().manual_seed(0)
        self.real = add_noise(data.train, generator=noise)
        distances = torch.cdist(self.real, self.real)
        self.radii = distances.kthvalue(NEIGHBOURS + 1, dim=1).values  # the first is its own
        self.held_out = float(
            nearest_distance(add_noise(data.test, generator=noise), self.train).mean()
        )

    def __call__(self, x: Tensor, rewards: Tensor) -> dict[str, Tensor]:
        """Return the metrics of ``x`` (N, 64) with rewards (N,), by batch; the rest is left out.

        Raises:
            ValueError: ``x`` holds fewer than two batches.
        """
        size = self.batch_size
        if len(x) < 2 * size:
            raise ValueError(f"x must hold at least two batches of {size}, got {len(x)} samples")
        whole = len(x) // size * size
        parts = zip(x[:whole].split(size), rewards[:whole].split(size), strict=True)
        found = [self._batch(part) | {"reward": float(r.double().mean())} for part, r in parts]
        return {name: torch.tensor([f[name] for f in found]).double() for name in found[0]}

    def _batch(self, x: Tensor) -> dict[str, float]:
        n = len(x)
        with torch.no_grad():
            confidence, digits = self.classifier(x).softmax(1).max(1)
        p = digits.bincount(minlength=CLASSES).double() / n
        covered = (torch.cdist(self.real, x).amin(1) < self.radii).double()
        by_class = [covered[self.labels == c].mean() for c in range(CLASSES)]
        shown = x.clamp(-1, 1)
        return {
            "classes": math.exp(float(-torch.special.xlogy(p, p).sum())),
            "distance": float(torch.cdist(shown, shown).double().sum()) / (n * (n - 1)),
            "coverage": float(torch.stack(by_class).mean()),
            "nearest": float(nearest_distance(x, self.train).double().mean()),
            "certain": float((confidence > 0.8).double().mean()),
        }


def mean(values: Tensor) -> float:
    """Return the mean over the batches."""
    return float(values.mean())


def stderr(values: Tensor) -> float:
    """Return the standard error of the mean over the batches."""
    return float(values.std()) / math.sqrt(len(values))
