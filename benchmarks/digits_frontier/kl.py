r"""Closeness to the base: the relative entropy KL(q ‖ p) of a method to the base, in nats.

A tilt minimises it: of all distributions q with E_q[r] = R, the tilt of p that has this reward is
the closest to p, since KL(q ‖ p) = KL(q ‖ p*) + E_q[r]/T - log Z for p* ∝ p exp(r/T).  Pixel
distances and coverage do not see a change that is small in pixels and yet leads off the images;
relative entropy does.  All distributions are those that the ODEs sample:

`ode_kl`      for a velocity field: the mean over its own samples of log q(x) - log p(x), both by
              the change of variables (`flows.sampling`) with the same random signs;
`best_of_kl`  for the best of n independent samples, whatever the reward, if it has no ties:
              log n - (n-1)/n, as the rank u of the best has the density n u^(n-1);
`tilt_kl`     for the exact tilt: E_q[r]/T - log Z, from the weights of the base's samples.

With labels q and p are conditional on one label, and the result is the mean over the labels.

The remaining error of `ode_kl`: the samples come from two-step Adams-Bashforth steps and are taken
for samples of the ODE, which the likelihood follows by midpoint steps of the same number.  For two
fields that are equal the result is 0 exactly, as the two likelihoods err alike.  Otherwise the
error is of second order in the step; the change by twice as many steps is recorded with every
such point.  Adams-Bashforth steps of the likelihood cost half as much and err several times as
much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.digits_frontier.distributions import SampleSet, rows_of
from flows import VelocityField, log_likelihood


def ode_kl(
    field: VelocityField,
    base: VelocityField,
    drawn: SampleSet,
    *,
    batch: int,
    steps: int,
    probes: int,
    seed: int,
) -> Tensor:
    """Return KL(ODE of ``field`` ‖ ODE of ``base``) by batch, (m,), unbiased but for the steps.

    Arguments:
        field: differentiable twice in x if it computes a gradient itself.
        drawn: samples of the ODE of ``field``; an incomplete last batch is left out.
        batch: samples in each batch.
        steps: midpoint steps of the likelihoods.
        probes: random sign vectors for the divergence of each sample.
        seed: seed of the sign vectors.
    """
    x, labels = drawn.samples, drawn.labels
    cond = None if labels is None else {"label": labels}
    found = []
    for i in range(len(x) // batch):
        some = slice(i * batch, (i + 1) * batch)
        of_field, of_base = (
            log_likelihood(
                velocity,
                x[some],
                grid=steps,
                method="midpoint",
                divergence="hutchinson",
                probes=probes,
                cond=rows_of(cond, some),
                generator=torch.Generator().manual_seed(seed + i),
            )[0]
            for velocity in (field, base)
        )
        found.append((of_field - of_base).double().mean())
    return torch.stack(found)


def best_of_kl(n: int) -> float:
    """Return the KL of the best of ``n`` samples to the distribution of one sample."""
    return math.log(n) - (n - 1) / n


def tilt_kl(rewards: Sequence[Tensor], batches: int) -> Tensor:
    """Return the KL of the exact tilt as (m,) values of about equal batches; their mean is the KL.

    With weights w of mean 1 the KL is E[w log w].  The value of a batch is the KL plus the batch's
    mean of a sample's influence on it, w (r - E_q[r]) - (w - 1), with r divided by the temperature.

    Arguments:
        rewards: r / T of samples of the base, a tensor (N,) for each label.
        batches: number of batches m.
    """
    found = []
    for r in map(Tensor.double, rewards):
        w = torch.softmax(r, 0) * len(r)
        tilted = (w * r).mean()
        kl = tilted - (r.logsumexp(0) - math.log(len(r)))
        moves = w * (r - tilted) - (w - 1)
        found.append(kl + torch.stack([part.mean() for part in moves.tensor_split(batches)]))
    return torch.stack(found).mean(0)
