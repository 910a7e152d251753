r"""The loss of the refinement by flow matching on weighted samples of the tilted chain.

A chain of Gaussian steps cannot follow the exact tilt through the steps in which a mode is decided,
so that neither the fixed point of the regression onto the adjoint nor the optimum of the variance
of log w has the right modes where these are narrow and apart, at a usable number of steps
(docs/exactness.md).  The weights of its trajectories are exact whatever the model is.  So the
refinement draws N trajectories of the model, on a finer chain, and then minimises

    L = E_{p*} E_{t, X_0} ‖v_θ(X_t, t) - (X_1 - X_0)‖²,      X_t = t X_1 + (1 - t) X_0,

where X_1 ~ p* is a sample of the exact tilt: an end drawn by its weight.  The tilted flow is the
flow of p*, v* = E*[X_1 - X_0 | X_t], so the minimum over all velocities is v* itself: the number of
steps bears on which distribution the ends have (that of the chain on its grid) and on nothing else.

When it helps.  Flow matching with n samples knows a velocity up to a divergence of about m / 2n
from p*, for a model with m parameters that matter: second moments alone are d² / 2.  The model
that drew the samples is Var(log w) / 2 away from it.  So the refinement is worth its noise where

    n Var(log w) > d²,        n = effective number of samples (of a condition, on average).

Near the optimum, in many dimensions, or where few trajectories have all the weight, it is not.  Nor
is it where every trajectory tells the same about the control, as on a normal base, and no mode is
to be decided: there adjoint matching is exact and has little noise.  The sign of it is the sum over
the steps of the squared target of the control, ‖residual_a λ‖², whose mean is then near its median;
on separated modes few trajectories have all of it (`python -m benchmarks.adjoint_noise`).  In these
cases adjoint matching goes on; but not where the weights are rare and heavy, as of a mode that the
model hardly visits, whose trajectories the median does not see.

The rule is applied once.  Half-way samples are drawn anew from the model as it is then, whose
weights are more even, and are used together with the first ones (`adjoint.weighted_samples`).

Sources: cross-entropy method for path measures (Zhang, Wang, Hartmann, Weber and Schütte,
"Applications of the cross-entropy method to importance sampling and optimal control of diffusions",
2014); flow matching on weighted samples (Zhang, Zhang and Gu, "Energy-weighted flow matching",
2503.04975).  The proposal by adjoint matching, and the rule, were derived for this project.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adjoint.certificate import PER_CONDITION, certify
from adjoint.chain.kernels import Kernel
from adjoint.evaluator import Evaluator, RewardEvaluator
from adjoint.matching_loss import MatchingLoss
from adjoint.models.lora import prepare_dropout
from adjoint.trajectory_source import TrajectorySource
from adjoint.weighted_samples import WeightedSamples
from flows.field import Cond
from flows.path import interpolate
from flows.training import distributed
from flows.training.loss import Evaluated, Loss

CALM = 3.0
"""Mean over median of the squared targets of the control up to which adjoint matching goes on."""

RARE = 0.5
"""Effective samples over those of Gaussian log-weights, below which a mode is rarely visited."""

FEWEST = 32
"""Effective samples below which the refinement is not tried."""

DRAWN = 4096
"""Trajectories that are drawn where the options leave their number open."""


class TermMeans:
    """A reward as a function of samples, with the means of its terms over all that it has valued.

    Arguments:
        reward: the reward.
    """

    def __init__(self, reward: RewardEvaluator) -> None:
        self.reward = reward
        self._terms: list[dict[str, Tensor]] = []

    def __call__(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        """Return rewards (B,) of samples x (B, *)."""
        value, terms = self.reward.value_and_info(x, cond)
        self._terms.append(terms)
        return value

    def means(self) -> dict[str, Tensor]:
        """Return the means under the names that `adjoint.batch_diagnostics` gives them."""
        return {
            f"reward.{name}": torch.cat([terms[name] for terms in self._terms]).mean()
            for name in (self._terms[0] if self._terms else {})
        }


class FlowMatchingLoss(Loss):
    """Flow matching on weighted samples of the chain; adjoint matching where that is better.

    Arguments:
        source: where trajectories come from.
        kernel: table of the chain that the samples are drawn from.
        matching: the loss that goes on where the samples say so.
        renewal: number of calls after which the samples are drawn anew.
        always: refine whatever the samples say.
        progress: show a bar while samples are drawn.

    Attributes:
        samples: the samples at hand; None before the first call.
        refining: whether they are used; None before the first call.
    """

    def __init__(
        self,
        source: TrajectorySource,
        kernel: Kernel,
        matching: MatchingLoss,
        *,
        renewal: int,
        always: bool,
        progress: bool = False,
    ) -> None:
        self.source, self.kernel, self.matching = source, kernel, matching
        self.renewal, self.always, self.progress = renewal, always, progress
        self.samples: WeightedSamples | None = None
        self.refining: bool | None = None

    @property
    def phase(self) -> int:
        """The number of the samples that the next call uses, 0 or 1."""
        return int(self.calls >= self.renewal)

    def __call__(self, module: nn.Module, generator: torch.Generator) -> Evaluated:
        """Return the loss of ``module`` on one batch, and metrics."""
        if self.refining is None:
            self.samples = self.draw(module, generator)
            self.refining = self.always or (
                is_worthwhile(self.samples)
                and (has_rare_weights(self.samples) or self.unevenness(module, generator) > CALM)
            )
        elif self.refining and self.calls == self.renewal:
            assert self.samples is not None
            self.samples = self.samples.pooled(self.draw(module, generator))
        self.calls += 1
        if not self.refining:
            return self.matching(module, generator)
        return self.flow_matching(module, generator)

    def draw(self, module: nn.Module, generator: torch.Generator) -> WeightedSamples:
        """Return weighted samples of the chain of ``module``, of all processes.

        Raises:
            ValueError: a log-weight is NaN or +∞, or all under one condition are -∞.
        """
        source, config = self.source, self.source.config
        n, groups = distributed.share(config.refine_samples or DRAWN), 1
        if source.cond_sampler is not None:
            groups = max(1, n // PER_CONDITION)
            n = groups * (n // groups)
        x0, cond = source.starts(n, groups, generator)
        module.eval()
        terms = TermMeans(source.reward)
        certificate = certify(
            Evaluator(module, config.micro_batch),
            Evaluator(source.plain_base, config.micro_batch),
            terms,
            self.kernel.to(generator.device),
            x0,
            cond=cond,
            groups=groups,
            batch_size=config.eval_batch_size or n,
            generator=generator,
            progress=self.progress,
            description="samples",
        )
        if not bool(certificate.grouped.logsumexp(1).isfinite().all()):
            raise ValueError("log-weights are NaN or infinite: look at the reward at the samples")
        each = None
        if cond is not None:  # of each group one
            each = {name: distributed.gather(c[:: n // groups]) for name, c in cond.items()}
        samples = WeightedSamples.of(certificate, each, terms.means())
        return samples.to(source.storage_device)

    def unevenness(self, module: nn.Module, generator: torch.Generator) -> float:
        """Return the mean over the median of the squared targets of the control of trajectories."""
        kernel = self.matching.kernel
        lam = self.matching.collect(module, generator).adjoint
        lam = lam[1:] if kernel.residual_at_next else lam[:-1]
        scale = kernel.residual_a.to(lam).reshape(-1, 1, 1)
        squares = distributed.gather((scale * lam.flatten(2)).square().sum((0, 2)))
        return float(squares.mean() / squares.median())

    def flow_matching(self, module: nn.Module, generator: torch.Generator) -> Evaluated:
        """Return the flow-matching loss on samples drawn by their weights, and metrics.

        As many states as in an update of adjoint matching, K·B, at times that are spread evenly.
        """
        source, samples = self.source, self.samples
        assert samples is not None
        steps, device = source.config.steps, source.storage_device
        x1, cond = samples.draw(steps, self.matching.batch_size, generator)
        x0 = torch.randn(x1.shape, generator=generator, dtype=x1.dtype, device=generator.device)
        late = torch.rand(steps, generator=generator, dtype=x1.dtype, device=generator.device)
        x0, late = x0.to(device), late.to(device)
        t = (torch.arange(steps, dtype=x1.dtype, device=device) + late) / steps
        t = t.clamp_max(1 - torch.finfo(t.dtype).eps)  # at 1 itself not every velocity is finite
        xs = interpolate(x0, x1, t)
        prepare_dropout(module)
        v = source.model(module).along(xs, t, cond).to(source.dtype)
        loss = (v - (x1 - x0)).square().flatten(2).sum(2).mean()
        return loss, dict(samples.metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of calls and the samples, for a checkpoint.

        Every process has the same samples, and the first one saves them.
        """
        samples = None
        if self.samples is not None and distributed.rank() == 0:
            samples = self.samples.state_dict()
        return {"calls": self.calls, "refining": self.refining, "samples": samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned; every process must call this."""
        self.calls, self.refining = int(state["calls"]), state["refining"]
        self.samples = None
        samples = distributed.from_first(lambda: state["samples"])
        if samples is not None:
            self.samples = WeightedSamples(**samples).to(self.source.storage_device)


def is_worthwhile(samples: WeightedSamples) -> bool:
    """Tell whether flow matching on ``samples`` comes closer to the tilt than their model is."""
    n = samples.effective / len(samples.log_weights)  # each condition has a tilt of its own
    return n >= FEWEST and n * samples.variance > samples.x[0].numel() ** 2


def has_rare_weights(samples: WeightedSamples) -> bool:
    """Tell whether few samples weigh more than their variance says, as one in a rare mode does.

    Gaussian log-weights of variance V have the effective number N exp(-V).
    """
    gaussian = samples.log_weights.numel() * math.exp(-samples.variance)
    return samples.effective < RARE * gaussian
