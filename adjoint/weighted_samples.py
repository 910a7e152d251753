"""Samples of the tilted chain with their importance weights, from which the exact tilt is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from adjoint.certificate import Certificate
from flows.field import Cond

REPORTED = ("reward", "path_kl", "log_weight_std", "ess")


@dataclass(frozen=True)
class WeightedSamples:
    """Weighted samples of the exact tilt of a chain, in groups that share a condition each.

    Attributes:
        x: (G·n, *) ends of trajectories, the n of a group beside each other.
        log_weights: (G, n) log w of the trajectories, `adjoint.certificate`.
        cond: conditions (G, ...) of the groups by name; None for an unconditional flow.
        metrics: numbers of the certificate that are reported with each update on the samples.
    """

    x: Tensor
    log_weights: Tensor
    cond: dict[str, Tensor] | None
    metrics: dict[str, Tensor]

    @classmethod
    def of(cls, certificate: Certificate, cond: Cond | None) -> WeightedSamples:
        """Return the samples of ``certificate``, whose groups have the conditions ``cond``."""
        summary = certificate.summary()
        return cls(
            certificate.samples,
            certificate.grouped,
            None if cond is None else dict(cond),
            {name: torch.tensor(summary[name]) for name in REPORTED},
        )

    @cached_property
    def variance(self) -> float:
        """Return the variance of log w within groups."""
        return float(self.log_weights.var(1).mean())

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

    def draw(
        self, draws: int, columns: int, generator: torch.Generator
    ) -> tuple[Tensor, Cond | None]:
        """Return independent draws (draws, columns, *) by their weights, and conditions (columns).

        All draws of a column are of one group.  The groups are drawn alike, and the samples of a
        group by their weights, with replacement.  Nothing waits for the device.

        Arguments:
            generator: on any device, from which indices are moved to that of the samples.
        """
        groups, size = self.log_weights.shape
        device = self.x.device
        group = torch.randint(groups, (columns,), generator=generator, device=generator.device)
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

    def state_dict(self) -> dict[str, Tensor | dict[str, Tensor] | None]:
        """Return the samples as tensors, for a checkpoint."""
        return {name: getattr(self, name) for name in ("x", "log_weights", "cond", "metrics")}

    def to(self, device: torch.device) -> WeightedSamples:
        """Return the samples on ``device``."""
        cond = None if self.cond is None else {n: c.to(device) for n, c in self.cond.items()}
        metrics = {name: value.to(device) for name, value in self.metrics.items()}
        return WeightedSamples(self.x.to(device), self.log_weights.to(device), cond, metrics)
