r"""Concludes from the numbers of a certificate how far a tilt can be trusted.

The certificate knows the log-weights of the trajectories that the tilted chain has made.  It can
mislead in four ways, each of which leaves a trace that is looked for here.

Samples that are used without their weights.  The chain's samples differ from its exact tilt by a
total variation of at most ½ E|w/Z - 1|.  The samples of the tilted flow's ODE have no weights, and
are compared by their mean reward with the mean under the certificate's weights.

Weights that are rare and heavy.  If log w were Gaussian with standard deviation s, the effective
sample size would be exp(-s²).  A mode that the model hardly visits has few samples of large weight,
which s does not show but the effective sample size does: a mode of probability q under the model
and p under the tilt leaves an effective sample size of about q/p².

Weights with a heavy tail.  Their shape k (`adjoint.pareto`) says whether the sample variance, and
so every error that is stated, can be believed.

Modes that the chain does not have.  The tilt of the flow can be estimated without a chain: by ODE
samples of the base under the weights e^r, as many as count.  Where they know better, they tell of
the chain's discretisation (log Z, the mean reward) and of modes that no trajectory has reached: the
share of the weight at rewards that no sample of the certificate has.

With conditions, the base's ODE samples are under other conditions than the certificate's, and only
log Z is compared.

Sources: Vehtari et al. 1507.02646 for the tail; Agapiou et al. 1511.06196 for effective sample size
and error of importance sampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adjoint.certificate import ENOUGH, Certificate, log_mean_exp
from adjoint.pareto import tail_shape

GOOD, USE_WEIGHTS, DO_NOT_TRUST = "good", "use weights / sample_exact", "do not trust"
"""Levels of a judgement: samples may be used as they are; only with weights; not even so."""

LEVELS = (GOOD, USE_WEIGHTS, DO_NOT_TRUST)
"""The levels from the best to the worst."""

MOST_VARIATION = 0.2
"""Largest total variation between the chain's samples and its exact tilt that is still good."""

RARE = 0.5
"""Effective sample size, as a fraction of exp(-std(log w)²), below which weights are rare and
heavy."""

RARE_ESS = 0.1
"""Effective sample size / N below which rare and heavy weights are not trusted."""

HEAVY_TAIL = 0.7
"""Shape of the tail of the weights above which they are not trusted (1507.02646)."""

JOINT_ERRORS = 5.0
"""Joint standard errors by which two estimates of a mean reward may differ."""

DEVIATIONS, NATS = 0.15, 0.01
"""Difference of two mean rewards that never matters: in standard deviations of the reward under the
tilt, and in units of the scaled reward."""

LOG_Z_ERRORS, LOG_Z_NATS = 5.0, 0.1
"""Joint standard errors, and nats, by which two estimates of log Z may differ."""

UNVISITED, UNVISITED_SAMPLES = 0.05, 10
"""Share of the tilt, by ODE samples of the base, that may be at rewards above all those of the
certificate, and the number of the certificate's samples that it may be worth: on average 1."""


@dataclass(frozen=True)
class Finding:
    """States one reason not to use a tilt as it is.

    Attributes:
        level: one of `LEVELS`.
        text: the numbers seen, and what they mean.
    """

    level: str
    text: str


@dataclass(frozen=True)
class BaseSamples:
    """Holds rewards of samples of the base's ODE, with weights that make them samples of the tilt.

    Attributes:
        rewards: (N,) scaled rewards, r / temperature.
        log_weights: (N,) the same rewards, plus log(density of the base / density of the samples)
            where they were drawn from another distribution.
    """

    rewards: Tensor
    log_weights: Tensor


@dataclass(frozen=True)
class Judgement:
    """Says how far a tilt can be trusted, with the numbers that this rests on.

    Attributes:
        findings: reasons against it; none where it is good.
        total_variation: ½ E|w/Z - 1|, a bound on that between chain and exact tilt.
        tail_shape: shape k of the tail of the weights; -∞ where they are equal.
        log_z_gap, log_z_gap_stderr: log Z by the chain minus log Z by the base's ODE, and the joint
            standard error.
    """

    findings: tuple[Finding, ...]
    total_variation: float
    tail_shape: float
    log_z_gap: float
    log_z_gap_stderr: float

    @property
    def level(self) -> str:
        """Return the level, the worst of the findings."""
        return max((finding.level for finding in self.findings), key=LEVELS.index, default=GOOD)

    def __str__(self) -> str:
        """Return the level, and a line for each finding."""
        lines = [f"judgement: {self.level}", *(f"- {finding.text}" for finding in self.findings)]
        return "\n".join(lines)


def judgement_of(
    certificate: Certificate,
    base: Sequence[BaseSamples],
    *,
    rewards_ode: Tensor | None = None,
    temperature: float = 1.0,
) -> Judgement:
    """Return the judgement of a tilt, by its certificate and ODE samples of base and tilted flow.

    Arguments:
        certificate: of the tilted flow, after training.
        base: ODE samples of the base; the first are unweighted but for e^r, and give log Z.
        rewards_ode: (N,) scaled rewards of ODE samples of the tilted flow, in the certificate's
            groups; None where there are none.
        temperature: the rewards in the texts are multiplied by it.
    """
    weights = certificate.grouped.softmax(1)
    variation = 0.5 * float((weights.shape[1] * weights - 1).abs().mean())
    within = certificate.grouped - certificate.grouped.logsumexp(1, keepdim=True)
    shape = tail_shape(within.flatten())
    log_z, error = log_z_of_mean(certificate)
    log_z_ode, error_ode, _ = log_mean_exp(base[0].log_weights)
    gap, joint = log_z - log_z_ode, math.hypot(error, error_ode)

    def findings() -> Iterator[Finding | None]:
        yield _not_finite(certificate)
        yield _few_or_rare(certificate)
        yield _heavy_tail(shape)
        yield _log_z_apart((log_z, error), (log_z_ode, error_ode))
        if certificate.groups == 1:
            yield _unvisited(certificate, base)
            yield next(filter(None, (_base_apart(certificate, b, temperature) for b in base)), None)
        yield _spread(certificate, variation)
        if rewards_ode is not None:
            yield _ode_apart(certificate, rewards_ode, temperature)

    found = tuple(finding for finding in findings() if finding is not None)
    return Judgement(found, variation, shape, gap, joint)


def log_z_of_mean(certificate: Certificate) -> tuple[float, float]:
    """Return the logarithm of the mean of Z(c) over the conditions, and its standard error.

    Without conditions that is log Z.  With them `Certificate.log_z` is the mean of log Z(c).
    """
    if certificate.groups == 1:
        return certificate.log_z, certificate.log_z_stderr
    each = certificate.grouped.logsumexp(1) - math.log(certificate.grouped.shape[1])
    log_z, error, _ = log_mean_exp(each)  # the error is that of as many conditions
    return log_z, error


def weighted_mean(values: Tensor, log_weights: Tensor) -> tuple[float, float, float]:
    """Return the mean of the groups' weighted means, its standard error, and the deviation.

    The error holds how values vary within groups, not how the groups' means differ.  It is infinite
    below `ENOUGH` effective samples in the typical group.  The deviation is the standard deviation
    of the values within groups under the weights.

    Arguments:
        values, log_weights: (G, N) of G groups.
    """
    values, weights = values.double(), log_weights.double().softmax(1)
    means = (weights * values).sum(1, keepdim=True)
    deviation = float((weights * (values - means).square()).sum(1).mean().sqrt())
    variances = (weights * (values - means)).square().sum(1)
    effective = len(weights) / float(weights.square().sum())
    error = float(variances.sum().sqrt()) / len(weights) if effective >= ENOUGH else math.inf
    return float(means.mean()), error, deviation


def unvisited_share(base: BaseSamples, visited: Tensor) -> float:
    """Return the share of the base samples' weight at rewards above the largest of ``visited``."""
    above = base.rewards > visited.max().to(base.rewards)
    return float(base.log_weights.double().softmax(0)[above].sum())


def _not_finite(certificate: Certificate) -> Finding | None:
    bad = int((~(certificate.log_weights < math.inf)).sum())
    if not bad:
        return None
    return Finding(
        DO_NOT_TRUST,
        f"{bad} of {len(certificate.log_weights)} log-weights are NaN or infinite: look at the "
        "reward at the samples",
    )


def _few_or_rare(certificate: Certificate) -> Finding | None:
    ess, std = certificate.ess, certificate.log_weight_std
    if ess * certificate.grouped.shape[1] < ENOUGH:
        return Finding(
            DO_NOT_TRUST,
            f"fewer than {ENOUGH} effective samples have all the weight (ESS {ess:.2g}): nothing "
            "is known of the errors",
        )
    gaussian = math.exp(-(std**2))
    if not ess < RARE * gaussian:
        return None
    return Finding(
        DO_NOT_TRUST if ess < RARE_ESS else USE_WEIGHTS,
        f"ESS {ess:.2g}, where std(log w) {std:.2f} would leave {gaussian:.2f}: a few samples are "
        "heavy, as where a mode of the tilt is hardly visited; the chain may have too little of "
        "such a mode even under the weights (more steps, or sample_exact with distribution='flow')",
    )


def _heavy_tail(shape: float) -> Finding | None:
    if shape <= HEAVY_TAIL:
        return None
    return Finding(
        DO_NOT_TRUST,
        f"the weights have a tail of shape k = {shape:.2f}, above {HEAVY_TAIL}: standard errors "
        "are too small, and means under the weights miss what is in the tail",
    )


def _log_z_apart(chain: tuple[float, float], ode: tuple[float, float]) -> Finding | None:
    """Compare log E Z(c) by the chain and by the base's ODE, where both know it."""
    gap = abs(chain[0] - ode[0])
    if not max(LOG_Z_NATS, LOG_Z_ERRORS * math.hypot(chain[1], ode[1])) < gap < math.inf:
        return None
    return Finding(
        DO_NOT_TRUST,
        f"the base's ODE gives log Z = {ode[0]:.3f} ± {ode[1]:.3f}, its memoryless chain "
        f"{chain[0]:.3f} ± {chain[1]:.3f}: the tilt is that of the chain's distribution. "
        "Either the grid is coarse (more steps), or the base is not the flow of independent "
        "noise (optimal-transport coupling, reflow, distillation, guidance)",
    )


def _unvisited(certificate: Certificate, base: Sequence[BaseSamples]) -> Finding | None:
    share = max(unvisited_share(samples, certificate.rewards) for samples in base)
    if share <= max(UNVISITED, UNVISITED_SAMPLES / len(certificate.rewards)):
        return None
    return Finding(
        DO_NOT_TRUST,
        f"{share:.0%} of the tilt, by ODE samples of the base, is at rewards above all those of "
        "the certificate: the tilted chain does not visit a mode, or has not come so far",
    )


def _base_apart(certificate: Certificate, base: BaseSamples, temperature: float) -> Finding | None:
    chain = weighted_mean(certificate.rewards[None], certificate.grouped)
    ode = weighted_mean(base.rewards[None], base.log_weights[None])
    if not _apart(chain, ode):
        return None
    return Finding(
        DO_NOT_TRUST,
        f"the mean reward of the tilt is {_say(chain, temperature)} by the chain under its "
        f"weights, {_say(ode, temperature)} by ODE samples of the base under e^r: "
        "chain and ODE of the base differ where the reward is large (more steps)",
    )


def _spread(certificate: Certificate, variation: float) -> Finding | None:
    if not variation > MOST_VARIATION:
        return None
    return Finding(
        USE_WEIGHTS,
        f"std(log w) {certificate.log_weight_std:.2f}: without weights, up to {variation:.0%} of "
        "the chain's samples are not as in the exact tilt (train longer)",
    )


def _ode_apart(certificate: Certificate, rewards_ode: Tensor, temperature: float) -> Finding | None:
    chain = weighted_mean(certificate.rewards.reshape(certificate.groups, -1), certificate.grouped)
    grouped = rewards_ode.reshape(certificate.groups, -1)
    ode = weighted_mean(grouped, torch.zeros_like(grouped))
    if not _apart(chain, ode):
        return None
    return Finding(
        USE_WEIGHTS,
        f"samples of the tilted flow's ODE have mean reward {_say(ode, temperature)}, the exact "
        f"tilt {_say(chain, temperature)}: `sample` does not draw from the tilt",
    )


def _apart(exact: tuple[float, float, float], other: tuple[float, float, float]) -> bool:
    """Tell whether two weighted means differ by more than their errors and by what matters."""
    joint = math.hypot(exact[1], other[1])
    return abs(exact[0] - other[0]) > max(JOINT_ERRORS * joint, DEVIATIONS * exact[2], NATS)


def _say(mean: tuple[float, float, float], temperature: float) -> str:
    return f"{temperature * mean[0]:.3f} ± {temperature * mean[1]:.3f}"
