r"""Reward against diversity and closeness: what is measured, and who is ahead at equal reward.

Samples are judged in batches of one size, so that metrics that depend on the number of samples
compare, and every metric has a standard error from its spread over the batches:

``classes``   effective number of classes, the exponential of the entropy of the recognised digits;
``distance``  mean distance of two samples, with pixels clipped to the range they are shown in;
``coverage``  per-class coverage: the fraction of a class's training images in whose neighbourhood
              a sample lies, averaged over the classes.  The neighbourhood reaches to the fifth
              nearest training image (Naeem et al., "Reliable fidelity and diversity metrics for
              generative models", arXiv 2002.09797);
``nearest``   distance to the nearest training image: not of diversity but of fidelity, to be held
              against that of held-out images;
``certain``   fraction recognised with a probability above 0.8, of fidelity too;
``kl``        relative entropy to the base, from the law and not from the samples alone
              (`benchmarks.digits_frontier.kl`).

The frontier of a method is the curve of its settings in the plane of reward R and diversity D,
straight between two of them.  At the reward of a tilt it lies at D_a + s (R - R_a), s = (D_b - D_a)
/ (R_b - R_a), so that the margin of the tilt is, with λ = (R - R_a) / (R_b - R_a),

    (D - s R) - (1 - λ) (D_a - s R_a) - λ (D_b - s R_b),

and, to first order, its variance is the sum of those of the three terms at fixed s and λ.  A curve
that passes the reward several times counts where it is the most diverse.  Points of the exact tilt
and of best-of-n are drawn from one pool of the base's samples, whose own error is left out: where
few of them carry the weight, it is as large as what is stated.

In closeness to the base the frontier is straight between two settings in the plane of R and √KL.
Near the base √KL is linear in the reward: a change of the law by ε moves R by a multiple of ε and
KL by one of ε².  So, to leading order, the chord neither flatters nor harms what it is held
against (a skewed reward leaves some per cent of KL, of either sign), whereas a chord in KL, which
is convex, would lie above what the method can do, and so flatter the tilt.  The margin is in nats,
c² - KL with c the height of the chord, larger where the tilt is closer, and with d = √KL at the
ends its variance is, to first order, that of

    -KL + 2 c s R,   2 c (1 - λ) (d_a - s R_a),   2 c λ (d_b - s R_b).

Estimates of KL may be negative near the base.  For the tilt, whose own KL enters as it is, that
does not matter.  At an end of a chord, where the root is needed, a setting whose KL is not two
standard errors above 0 is left out, so that the chord reaches from the one before to the next.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from applications.toy2d.digits.classifier import Classifier
from applications.toy2d.digits.data import CLASSES, Digits, add_noise
from applications.toy2d.digits.metrics import nearest_distance

DIVERSITY = ("classes", "distance", "coverage")
JUDGED = ("distance", "coverage")
"""What decides who is ahead.  ``classes`` also counts what is recognised in samples of which the
classifier is unsure: there best-of-n surpasses even the exact tilt."""
CLOSENESS = "kl"

NEIGHBOURS = 5

Metrics = Mapping[str, Tensor]
"""By name, one value a batch, (m,)."""


class Judge:
    """Measures the metrics of samples (N, 64), in batches.

    Arguments:
        classifier: recognises the digits.
        data: its training images, with the noise of the flow, are what is to be covered.
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
        """Metrics of ``x`` (N, 64) and its rewards (N,); what does not fill a batch is left out.

        Raises:
            ValueError: there are not two batches.
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
    """Mean over the batches."""
    return float(values.mean())


def stderr(values: Tensor) -> float:
    """Standard error of the mean over the batches."""
    return float(values.std()) / math.sqrt(len(values))


@dataclass(frozen=True)
class Margin:
    """How far a point lies above a frontier at its reward.

    Attributes:
        difference: in diversity or in closeness, larger where the point is ahead.
        stderr: its standard error.
    """

    difference: float
    stderr: float

    @property
    def at_least(self) -> bool:
        """Whether the point is not below by more than two standard errors."""
        return self.difference >= -2 * self.stderr


def root(kl: Tensor) -> Tensor | None:
    """√KL by batch: values whose mean is the root of the mean of ``kl`` (m,), linear in ``kl``.

    None where the mean is not finite, or not at least two standard errors above 0, unless all is 0.
    """
    level = mean(kl)
    if not level >= 2 * stderr(kl):  # so for numbers that are not finite, too
        return None
    return math.sqrt(level) + (kl - level) / (2 * math.sqrt(level)) if level else kl


def margin(point: Metrics, curve: Sequence[Metrics], metric: str) -> Margin | None:
    """The smallest `Margin` of ``point`` over the segments of ``curve`` that pass its reward.

    Arguments:
        point: metrics by batch, with ``reward``.
        curve: those of the settings of a method, in their order.
        metric: which one; of ``kl`` less is ahead, see the module docstring.

    Returns:
        None where the curve does not reach the reward.
    """
    closeness = metric == CLOSENESS
    heights = [(p["reward"], root(p[metric]) if closeness else p[metric]) for p in curve]
    ends = [(reward, height) for reward, height in heights if height is not None]
    found = []
    R, D = point["reward"], point[metric]
    for (R_a, D_a), (R_b, D_b) in itertools.pairwise(ends):
        low, high = mean(R_a), mean(R_b)
        if not min(low, high) <= mean(R) <= max(low, high) or low == high:
            continue
        share = (mean(R) - low) / (high - low)
        slope = (mean(D_b) - mean(D_a)) / (high - low)
        chord = (1 - share) * mean(D_a) + share * mean(D_b)
        if closeness:
            difference, sign, pull = chord**2 - mean(D), -1.0, 2 * chord
        else:
            difference, sign, pull = mean(D) - chord, 1.0, -1.0
        terms = [sign * D + pull * slope * R]
        for weight, reward, height in ((1 - share, R_a, D_a), (share, R_b, D_b)):
            terms.append(pull * weight * (height - slope * reward))
        found.append(Margin(difference, math.hypot(*(stderr(term) for term in terms))))
    return min(found, key=lambda m: m.difference) if found else None
