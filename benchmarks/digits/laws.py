"""The laws of a flow of digits, by ODE and by chain, and tilts of them held against the exact ones.

A flow with labels is tilted under each label by itself: the exact tilt reweights the base's samples
of one label, and the law over all digits is the mean over the labels, each with the same share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adjoint import Certificate, Kernel, Reward, certify, log_mean_exp
from applications.toy2d.digits.classifier import Classifier
from applications.toy2d.digits.data import DIM
from applications.toy2d.digits.metrics import Comparison, compare_classes
from applications.toy2d.digits.unet_flow import draw_labels
from applications.toy2d.exact_tilt import ResampledTilt
from flows import Cond, VelocityField, sample

PART = 4096
"""Samples drawn at a time."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """Samples of one law.

    Attributes:
        samples: (N, 64).
        labels: (N,) they were drawn under; None without labels.
        log_weights: (N,) of a certificate; None where all count the same.
    """

    samples: Tensor
    labels: Tensor | None
    log_weights: Tensor | None = None

    def first(self, n: int) -> Drawn:
        """The first ``n`` samples."""
        labels, w = self.labels, self.log_weights
        return Drawn(
            self.samples[:n],
            None if labels is None else labels[:n],
            None if w is None else w[:n],
        )

    def by_label(self) -> list[Drawn]:
        """The samples of each label; all of them without labels."""
        if self.labels is None:
            return [self]
        masks = [self.labels == label for label in self.labels.unique()]
        w = self.log_weights
        return [Drawn(self.samples[m], None, None if w is None else w[m]) for m in masks]


def start(n: int, generator: torch.Generator, *, labelled: bool) -> tuple[Tensor, Cond | None]:
    """Noise (n, 64), and labels for a flow that has them."""
    x0 = torch.randn(n, DIM, generator=generator)
    return x0, draw_labels(n, generator) if labelled else None


def rows(cond: Cond | None, i: slice) -> Cond | None:
    """Some of the conditions."""
    return None if cond is None else {name: value[i] for name, value in cond.items()}


def by_ode(field: VelocityField, n: int, *, labelled: bool, steps: int, seed: int) -> Drawn:
    """``n`` samples by ``steps`` Adams-Bashforth steps of the ODE."""
    x0, cond = start(n, torch.Generator().manual_seed(seed), labelled=labelled)
    parts = []
    for i in range(0, n, PART):
        some = slice(i, i + PART)
        parts.append(sample(field, x0[some], grid=steps, method="ab2", cond=rows(cond, some)))
    return Drawn(torch.cat(parts), None if cond is None else cond["label"])


def by_chain(
    field: VelocityField,
    base: VelocityField,
    reward: Reward,
    kernel: Kernel,
    n: int,
    *,
    labelled: bool,
    seed: int,
) -> tuple[Drawn, Certificate]:
    """``n`` samples by the memoryless chain, with their weights as the tilt of ``base``."""
    generator = torch.Generator().manual_seed(seed)
    x0, cond = start(n, generator, labelled=labelled)
    found = certify(field, base, reward, kernel, x0, cond=cond, generator=generator)
    labels = None if cond is None else cond["label"]
    return Drawn(found.samples, labels, found.log_weights), found


def certificate_summary(drawn: Drawn) -> dict[str, float]:
    """What the weights of a chain say, averaged over the labels: std, ESS / N and log Z."""
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
    """The mean."""
    return sum(values) / len(values)


def compare_laws(
    classifier: Classifier,
    base: Drawn,
    tilted: Drawn,
    reward: Reward,
    temperature: float,
    *,
    weighted: bool = False,
) -> Comparison:
    """Class frequencies of ``tilted`` against the exact tilt of the law of ``base``.

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
    """The comparison of the mixture, in equal shares, of the laws that ``parts`` compare."""
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
