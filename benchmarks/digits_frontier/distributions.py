"""Samples of a flow of digits by its ODE and by its chain, and comparisons with the exact tilt.

A flow with labels is tilted under each label by itself: the exact tilt reweights the base's samples
of one label, and the distribution over all digits is the mean over the labels, in equal shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adjoint import AbstractReward, Certificate, Kernel, certify, log_mean_exp
from applications.toy2d.digits.classifier import Classifier
from applications.toy2d.digits.data import DIM
from applications.toy2d.digits.metrics import Comparison, compare_classes
from applications.toy2d.digits.unet_flow import draw_labels
from applications.toy2d.exact_tilt import ResampledTilt
from flows import Cond, VelocityField, sample

PART = 4096
"""Number of samples drawn at a time."""


@dataclass(frozen=True, eq=False)
class SampleSet:
    """Samples of one distribution.

    Attributes:
        samples: (N, 64) images.
        labels: (N,) labels that the samples were drawn under; None for a flow without labels.
        log_weights: (N,) log-weights of a certificate; None where all samples count the same.
    """

    samples: Tensor
    labels: Tensor | None
    log_weights: Tensor | None = None

    def first(self, n: int) -> SampleSet:
        """Return the first ``n`` samples."""
        labels, w = self.labels, self.log_weights
        return SampleSet(
            self.samples[:n],
            None if labels is None else labels[:n],
            None if w is None else w[:n],
        )

    def by_label(self) -> list[SampleSet]:
        """Return one set for each label; a set without labels is returned whole."""
        if self.labels is None:
            return [self]
        masks = [self.labels == label for label in self.labels.unique()]
        w = self.log_weights
        return [SampleSet(self.samples[m], None, None if w is None else w[m]) for m in masks]


def start(n: int, generator: torch.Generator, *, labelled: bool) -> tuple[Tensor, Cond | None]:
    """Draw noise (n, 64), and labels for a flow that has them."""
    x0 = torch.randn(n, DIM, generator=generator)
    return x0, draw_labels(n, generator) if labelled else None


def rows_of(cond: Cond | None, i: slice) -> Cond | None:
    """Return the conditions of the samples ``i``."""
    return None if cond is None else {name: value[i] for name, value in cond.items()}


def sample_ode(field: VelocityField, n: int, *, labelled: bool, steps: int, seed: int) -> SampleSet:
    """Draw ``n`` samples by ``steps`` Adams-Bashforth steps of the ODE."""
    x0, cond = start(n, torch.Generator().manual_seed(seed), labelled=labelled)
    parts = []
    for i in range(0, n, PART):
        some = slice(i, i + PART)
        parts.append(sample(field, x0[some], grid=steps, method="ab2", cond=rows_of(cond, some)))
    return SampleSet(torch.cat(parts), None if cond is None else cond["label"])


def sample_chain(
    field: VelocityField,
    base: VelocityField,
    reward: AbstractReward,
    kernel: Kernel,
    n: int,
    *,
    labelled: bool,
    seed: int,
) -> tuple[SampleSet, Certificate]:
    """Draw ``n`` samples by the memoryless chain, with their weights as the tilt of ``base``."""
    generator = torch.Generator().manual_seed(seed)
    x0, cond = start(n, generator, labelled=labelled)
    found = certify(field, base, reward, kernel, x0, cond=cond, generator=generator)
    labels = None if cond is None else cond["label"]
    return SampleSet(found.samples, labels, found.log_weights), found


def certificate_summary(drawn: SampleSet) -> dict[str, float]:
    """Return the std of log w, ESS / N and log Z of a chain, averaged over the labels."""
    parts = [part.log_weights for part in drawn.by_label()]
    logs = [part.double() for part in parts if part is not None]
    log_z, errors, ess = zip(*map(log_mean_exp, logs), strict=True)
    return {
        "log_weight_std": average([float(w.std()) for w in logs]),
        "ess": average(ess),
        "log_z": average(log_z),
        "log_z_stderr": math.hypot(*errors) / len(errors),
    }


def average(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def compare_with_exact(
    classifier: Classifier,
    base: SampleSet,
    tilted: SampleSet,
    reward: AbstractReward,
    temperature: float,
    *,
    weighted: bool = False,
) -> Comparison:
    """Compare the class frequencies of ``tilted`` with the exact tilt of ``base``.

    Arguments:
        weighted: count the tilted samples by their log-weights.
    """
    found = []
    for b, t in zip(base.by_label(), tilted.by_label(), strict=True):
        weights = None
        if weighted and t.log_weights is not None:
            weights = torch.softmax(t.log_weights.double(), 0)
        found.append(
            compare_classes(classifier, b.samples, t.samples, reward, temperature, weights=weights)
        )
    return joined(found)


def joined(parts: Sequence[Comparison]) -> Comparison:
    """Return the comparison of the mixture, in equal shares, of the compared distributions."""
    n = len(parts)

    def share(name: str) -> Tensor:
        return torch.stack([getattr(part, name) for part in parts]).mean(0)

    def error(name: str) -> Tensor:
        return torch.stack([getattr(part, name) for part in parts]).norm(dim=0) / n

    tilts = [part.resampled for part in parts]
    weights = torch.cat([tilt.weights / n for tilt in tilts])
    whole = ResampledTilt(
        samples=torch.cat([tilt.samples for tilt in tilts]),
        rewards=torch.cat([tilt.rewards for tilt in tilts]),
        weights=weights,
        log_z=average([tilt.log_z for tilt in tilts]),
        log_z_stderr=math.hypot(*(tilt.log_z_stderr for tilt in tilts)) / n,
        ess=1 / (len(weights) * float(weights.square().sum())),
    )
    return Comparison(
        share("base"),
        share("tilted"),
        share("exact"),
        error("tilted_error"),
        error("exact_error"),
        whole,
    )
