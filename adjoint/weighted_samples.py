r"""Samples of the tilted chain with their importance weights, from which the exact tilt is drawn.

Two sets of samples, of two models, are pooled (`WeightedSamples.pooled`).  Each set estimates the
tilt by its own normalised weights, with an error of one over its effective number n of samples, so
that the best mixture of the two estimates gives them the shares n_A : n_B.  This holds if both know
the whole tilt.  A model that never visits a mode has even weights, and so many effective samples,
but its mean weight estimates Z without the mode.  So where the two estimates of log Z are apart by
more than `APART` joint standard errors, the set with the smaller one is left out.

Source: mixtures of estimates as in Owen's "Monte Carlo theory, methods and examples", section 9.11.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from adjoint.certificate import Certificate, log_mean_exp
from flows.field import Cond

REPORTED = ("reward", "path_kl", "log_weight_std", "ess")

APART = 3.0
"""Joint standard errors by which log Z of two sets that are pooled may differ."""


@dataclass(frozen=True)
class WeightedSamples:
    """Weighted samples of the exact tilt of a chain, in groups that share a condition each.

    Attributes:
        x: (G·n, *) ends of trajectories, the n of a group beside each other.
        log_weights: (G, n) log w of the trajectories, `adjoint.certificate`.
        cond: conditions (G, ...) of the groups by name; None for an unconditional flow.
        metrics: numbers of the certificate that are reported with each update on the samples.
        shares: (G,) probabilities with which groups are drawn; None where they are equal.
    """

    x: Tensor
    log_weights: Tensor
    cond: dict[str, Tensor] | None
    metrics: dict[str, Tensor]
    shares: Tensor | None = None

    @classmethod
    def of(
        cls, certificate: Certificate, cond: Cond | None, metrics: Mapping[str, Tensor]
    ) -> WeightedSamples:
        """Return the samples of ``certificate``.

        Arguments:
            cond: conditions (G, ...) of its groups.
            metrics: numbers that are reported besides those of the certificate.
        """
        summary = certificate.summary()
        return cls(
            certificate.samples,
            certificate.grouped,
            None if cond is None else dict(cond),
            {name: torch.tensor(summary[name]) for name in REPORTED} | dict(metrics),
        )

    @cached_property
    def variance(self) -> float:
        """Return the variance of log w within groups, which says how far the model is from a tilt.

        A tilt is Var(log w) / 2 nats away from a model near it.  One that leaves out a part f of
        the model's samples (log w = -∞) is -log(1 - f) nats away from the others' distribution, and
        so the variance counts -2 log(1 - f) there.
        """
        kept = self.log_weights.isfinite()
        count = kept.sum(1).clamp_min(1)
        values = self.log_weights.where(kept, 0)
        mean = values.sum(1, keepdim=True) / count[:, None]
        squares = (values - mean).square().where(kept, 0).sum(1)
        finite = squares / (count - 1).clamp_min(1)
        return float((finite - 2 * (count / kept.shape[1]).log()).mean())

    @cached_property
    def effective(self) -> float:
        """Return the effective number of samples, Σ over the groups of 1/Σ w²."""
        return float((1 / torch.softmax(self.log_weights, 1).square().sum(1)).sum())

    @cached_property
    def _cumulative(self) -> Tensor:
        """Cumulative weights (G·n,), which rise from g to g + 1 in group g."""
        below = torch.softmax(self.log_weights, 1).cumsum(1)
        below = below / below[:, -1:]
        return (below + torch.arange(len(below), device=below.device)[:, None]).flatten()

    def pooled(self, other: WeightedSamples) -> WeightedSamples:
        """Return both sets as one, with the metrics of ``other``; see the module docstring.

        Sets under conditions have other conditions each, whose log Z cannot be compared.
        """
        if self.cond is None:
            (ours, error, _), (others, other_error, _) = map(
                log_mean_exp, (self.log_weights, other.log_weights)
            )
            if abs(ours - others) > APART * math.hypot(error, other_error):
                return max((self, other), key=lambda samples: log_mean_exp(samples.log_weights)[0])
        effective = torch.tensor([self.effective, other.effective], dtype=torch.float64)
        groups = [len(self.log_weights), len(other.log_weights)]
        each = effective / effective.sum() / torch.tensor(groups)
        cond = None
        if self.cond is not None and other.cond is not None:
            cond = {name: torch.cat([c, other.cond[name]]) for name, c in self.cond.items()}
        return replace(
            other,
            x=torch.cat([self.x, other.x]),
            log_weights=torch.cat([self.log_weights, other.log_weights]),
            cond=cond,
            shares=each.repeat_interleave(torch.tensor(groups)).to(self.x.device),
        )

    def draw(
        self, draws: int, columns: int, generator: torch.Generator
    ) -> tuple[Tensor, Cond | None]:
        """Return independent draws (draws, columns, *) by their weights, and conditions (columns).

        All draws of a column are of one group.  The groups are drawn by their shares, and the
        samples of a group by their weights, with replacement.  Nothing waits for the device.

        Arguments:
            generator: on any device, from which indices are moved to that of the samples.
        """
        size = self.log_weights.shape[1]
        device = self.x.device
        group = self._groups(columns, generator)
        u = torch.rand(
            draws, columns, generator=generator, dtype=torch.float64, device=generator.device
        )
        group, u = group.to(device), u.to(device)
        index = torch.searchsorted(self._cumulative, group + u, right=True)
        index = torch.minimum(index, group * size + size - 1)  # u rounded up to 1
        cond = None
        if self.cond is not None:
            cond = {name: c[group] for name, c in self.cond.items()}
        return self.x[index], cond

    def _groups(self, n: int, generator: torch.Generator) -> Tensor:
        """Return the groups (n,) of independent draws, on the device of the generator."""
        groups, device = len(self.log_weights), generator.device
        if self.shares is None:
            return torch.randint(groups, (n,), generator=generator, device=device)
        u = torch.rand(n, generator=generator, dtype=torch.float64, device=device)
        group = torch.searchsorted(self.shares.to(device).cumsum(0), u, right=True)
        return group.clamp_max(groups - 1)

    def state_dict(self) -> dict[str, Tensor | dict[str, Tensor] | None]:
        """Return the samples as tensors, for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device) -> WeightedSamples:
        """Return the samples on ``device``."""
        cond = None if self.cond is None else {n: c.to(device) for n, c in self.cond.items()}
        metrics = {name: value.to(device) for name, value in self.metrics.items()}
        shares = None if self.shares is None else self.shares.to(device)
        return WeightedSamples(
            self.x.to(device), self.log_weights.to(device), cond, metrics, shares
        )
