r"""Independent samples of the exact tilt, from a tilt that is not quite exact.

A trajectory of the tilted chain comes with its weight w = p*(path) Z / p_θ(path)
(`adjoint.certificate`).  Accepted with probability min(1, w/L), its end is a sample of

    p_L ∝ p_θ min(w, L),        p* = (1 - m) p_L + m p_cut,    m = E[(w - L)₊] / E[w],

so that the total variation between p_L and p* is at most m, the mass of the tilt that lies above
the ceiling L.  Given m, the smallest L that holds it follows from any sample of the weights; a
fraction (1 - m) E[w] / L of the trajectories is accepted: all of them at the optimum, where w is
constant.  Unlike resampling, no sample repeats; unlike weighted means, the samples go anywhere.

Exact means: of the tilt of the base's *chain*, like everything that the certificate says.

Source: rejection sampling (von Neumann 1951); of paths, as in Beskos and Roberts, "Exact simulation
of diffusions" (2005), here with a learned proposal and a ceiling that is not quite a bound.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor
from tqdm import tqdm

from adjoint.certificate import ENOUGH, Certificate, certify_batch, joined
from adjoint.kernel import Kernel
from adjoint.reward import Reward, ValueFunction
from adjoint.rollout import chunks
from flows.field import Cond, VelocityField

PILOT = 4096
"""Trajectories that the ceiling is taken from where no certificate is given."""

CUT = 0.001
"""Mass of the tilt above the ceiling, unless another is asked for."""


def log_ceiling(log_weights: Tensor, cut: float) -> float:
    """log L of the smallest ceiling above which lies the fraction ``cut`` of the weights' sum.

    Arguments:
        log_weights: (N,).
        cut: m = mean (w - L)₊ / mean w, in [0, 1); 0 makes L the largest weight.

    Raises:
        ValueError: a cut outside [0, 1).
    """
    if not 0 <= cut < 1:
        raise ValueError(f"cut must lie in [0, 1), got {cut}")
    largest = float(log_weights.max())
    w = (log_weights.double() - largest).exp().sort(descending=True).values
    lost = cut * w.sum()
    sums, count = w.cumsum(0), torch.arange(1, len(w) + 1, dtype=w.dtype, device=w.device)
    following = torch.cat([w[1:], w.new_zeros(1)])
    above = sums - count * following  # Σ (w - L)₊ for L the next smaller weight: increasing
    j = int(torch.searchsorted(above, lost).clamp_max(len(w) - 1))
    return largest + math.log(float((sums[j] - lost) / count[j]))


def acceptance(log_weights: Tensor, cut: float) -> float:
    """Fraction of trajectories with such log-weights (N,) that is accepted: mean min(1, w/L)."""
    return float((log_weights.double() - log_ceiling(log_weights, cut)).clamp_max(0).exp().mean())


def sample_exact(
    field: VelocityField,
    base: VelocityField,
    reward: Reward | ValueFunction,
    kernel: Kernel,
    n: int,
    *,
    like: Tensor,
    pilot: Certificate | None = None,
    cut: float = CUT,
    cond: Cond | None = None,
    batch_size: int = 4096,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """``n`` independent samples (n, *) of the exact tilt of the base's chain, by rejection.

    Arguments:
        field, base, reward, kernel: as for `adjoint.certificate.certify`.
        like: one sample (*), for shape, dtype and device.
        pilot: their certificate, which the ceiling is taken from; `PILOT` trajectories unless
            given.
        cut: largest total variation between the law of the samples and the exact tilt, as far as
            the pilot's weights tell; smaller ones accept less.
        cond: one condition, of leading size 1: Z, and so the ceiling, is of one alone.
        batch_size: trajectories at a time.
        generator: on the device of ``like``.
        progress: show a bar.

    Several processes draw each its own; where fields are sharded over them, they cannot.

    Raises:
        ValueError: ``n`` or ``cut`` out of range, several conditions, a pilot of fewer than
            `ENOUGH` effective samples, or log-weights that are NaN.

    Warns:
        UserWarning: more of the tilt's mass than asked for lies above the ceiling, as far as the
            halves of the pilot know of each other, or the new trajectories of the pilot.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    sizes = {name: len(c) for name, c in (cond or {}).items()}
    if any(size != 1 for size in sizes.values()):
        raise ValueError(
            f"cond must be one condition, of leading size 1, got leading sizes {sizes}: under "
            "several conditions log Z has several values"
        )

    def propose(size: int) -> Certificate:
        x0 = torch.randn(
            (size, *like.shape), generator=generator, dtype=like.dtype, device=like.device
        )
        some = {name: c.expand(size, *c.shape[1:]) for name, c in (cond or {}).items()} or None
        return certify_batch(field, base, reward, kernel, x0, some, generator=generator)

    if pilot is None:
        pilot = joined([propose(min(batch_size, PILOT)) for _ in chunks(PILOT, batch_size)])
    ceiling = log_ceiling(pilot.log_weights, cut)
    effective = pilot.ess * len(pilot.log_weights)
    if not effective >= ENOUGH:
        raise ValueError(
            f"the certificate must have {ENOUGH} effective samples or more, got {effective:.1f}: "
            "nearly every trajectory would be rejected; train longer, or at a higher temperature"
        )
    rate = acceptance(pilot.log_weights, cut)
    tolerated = 2 * cut + 0.004
    unseen = _mass_beyond_a_half(pilot.log_weights, cut)
    if unseen > tolerated:
        _warn_of_the_tail(unseen, cut)
    found: list[Tensor] = []
    left, mass, lost, variance = n, 0.0, 0.0, 0.0
    with tqdm(total=n, desc="exact samples", disable=not progress, leave=False) as bar:
        while left > 0:
            part = propose(min(batch_size, math.ceil(1.1 * left / rate) + 10))
            ratio = (part.log_weights.double() - ceiling).exp()  # w / L
            if not bool(ratio.isfinite().all()):
                raise ValueError("new trajectories have weights that are NaN: look at the reward")
            u = torch.rand(ratio.shape, generator=generator, dtype=ratio.dtype, device=ratio.device)
            accepted = part.samples[u < ratio]
            found.append(accepted)
            mass += float(ratio.sum())
            above = (ratio - 1).clamp_min(0)
            lost += float(above.sum())
            variance += float(above.square().sum())
            bar.update(min(left, len(accepted)))
            left -= len(accepted)
    significant = lost - 2 * math.sqrt(variance) > tolerated * mass
    if unseen <= tolerated and (significant or lost > max(0.05, tolerated) * mass):
        _warn_of_the_tail(lost / mass, cut)
    return torch.cat(found)[:n]


def _mass_beyond_a_half(log_weights: Tensor, cut: float) -> float:
    """Mass above the ceiling of one half of the weights in the other, mean of both ways round."""
    first, second = log_weights[::2].double(), log_weights[1::2].double()

    def beyond(seen: Tensor, fresh: Tensor) -> float:
        ratio = (fresh - log_ceiling(seen, cut)).exp()
        return float((ratio - 1).clamp_min(0).sum() / ratio.sum())

    return 0.5 * (beyond(first, second) + beyond(second, first))


def _warn_of_the_tail(lost: float, cut: float) -> None:
    warnings.warn(
        f"{lost:.1%} of the tilt's mass lies above the ceiling, where cut={cut} was asked for: the "
        "weights have a heavier tail than the certificate shows, and the samples are of a tilt "
        "without it; give it more certificate_samples, or train longer",
        stacklevel=3,
    )
