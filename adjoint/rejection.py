r"""Independent samples of the exact tilt, from a tilt that is not quite exact.

A trajectory of the tilted chain comes with its weight w = p*(path) Z / p_θ(path)
(`adjoint.certificate`).  Accepted with probability min(1, w/L), its end is a sample of

    p_L ∝ p_θ min(w, L),        p* = (1 - m) p_L + m p_cut,    m = E[(w - L)₊] / E[w],

so that the total variation between p_L and p* is at most m, the mass of the tilt that lies above
the ceiling L.  A fraction (1 - m) E[w] / L of the trajectories is accepted: all of them at the
optimum, where w is constant.  Unlike resampling, no sample repeats; unlike weighted means, the
samples go anywhere.

Given m, the smallest L that holds it follows from weights that have been seen: those of the
certificate and of all trajectories proposed so far.  As more are seen L rises.  With u uniform, w
is accepted if log w - log u > log L, a number that is kept with each sample, so that those accepted
at a lower ceiling are thinned to the new one.

A ceiling rests on the weights seen so far.  Where they have heavy tails, the true m is larger than
the m among these weights.  Each half of the weights is therefore held against the ceiling of the
other half, and a warning says where m is larger than asked for.

"Exact" refers to the tilt of the base's *chain*, as in the certificate.

Source: rejection sampling (von Neumann 1951) with the supremum of the weights seen so far (Caffo,
Booth and Davis, "Empirical supremum rejection sampling", 2002), here a quantile of their mass; of
paths, as in Beskos and Roberts, "Exact simulation of diffusions" (2005), with a learned proposal.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from adjoint.certificate import certify_batch, log_mean_exp
from adjoint.chain.kernels import Kernel
from adjoint.evaluator import Evaluator
from adjoint.rewards.reward import ValueFunction
from flows.field import Cond, VelocityField

RELIABLE = 200
"""Effective samples, at least, among the weights that make a ceiling."""

UNEVEN = 1 / 200
"""Effective samples, as a fraction of `TELLING` trajectories or more, of too uneven weights."""

TELLING = 40_000
"""Trajectories that show whether weights are too uneven."""

CUT = 0.001
"""Mass of the tilt above the ceiling, unless another is asked for."""


def log_ceiling(log_weights: Tensor, cut: float) -> float:
    """Return log L of the ceiling above which lies the fraction ``cut`` of the weights' sum.

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
    """Return the fraction of trajectories that is accepted, mean min(1, w/L)."""
    return float((log_weights.double() - log_ceiling(log_weights, cut)).clamp_max(0).exp().mean())


def sample_exact(
    field: VelocityField | Evaluator,
    base: VelocityField | Evaluator,
    reward: ValueFunction,
    kernel: Kernel,
    n: int,
    *,
    like: Tensor,
    seen: Tensor | None = None,
    cut: float = CUT,
    cond: Cond | None = None,
    batch_size: int = 4096,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Return ``n`` independent samples (n, *) of the exact tilt of the base's chain, by rejection.

    Arguments:
        field, base, reward, kernel: as for `adjoint.certificate.certify`.
        like: one sample (*), for shape, dtype and device.
        seen: (N,) log-weights known already, of a certificate of the same tilt.  Without, or if
            they are few, more trajectories are proposed than ``n`` need: until the weights count as
            1/cut effective samples, and `RELIABLE`.
        cut: largest total variation between the distribution of the samples and the exact tilt, as
            far as the weights tell (a few times this, where they are no more than 1/cut); a smaller
            one accepts fewer trajectories.
        cond: one condition, of leading size 1: Z, and so the ceiling, is of one alone.
        batch_size: trajectories at a time.
        generator: on the device of ``like``.
        progress: show a bar.

    Several processes draw each its own, with numbers of evaluations that differ: not for fields
    that are sharded over them, whose evaluations have to meet.

    Raises:
        TypeError: ``n`` is no integer, ``generator`` no generator or ``cond`` no mapping.
        ValueError: ``n`` or ``cut`` out of range, several conditions, weights so uneven that nearly
            every trajectory would be rejected, or NaN.

    Warns:
        UserWarning: more of the tilt's mass than asked for lies above the ceiling, as far as the
            halves of the weights know of each other.
    """
    check_request(n, cond, generator)
    sizes = {name: len(c) for name, c in (cond or {}).items()}
    if any(size != 1 for size in sizes.values()):
        raise ValueError(
            f"cond must be one condition, of leading size 1, got leading sizes {sizes}: under "
            "several conditions log Z has several values"
        )
    log_ceiling(torch.zeros(1), cut)  # refuses a cut out of range
    enough = max(RELIABLE, 1 / (cut or CUT))
    kept, heights = like.new_empty(0, *like.shape), like.new_empty(0, dtype=torch.float64)
    log_w = heights if seen is None else seen.to(heights)
    _check_weights(log_w)
    ceiling = -math.inf
    with tqdm(total=n, desc="exact samples", disable=not progress, leave=False) as bar:
        while len(kept) < n or _effective(log_w) < enough:
            if len(log_w) >= TELLING and _effective(log_w) < UNEVEN * len(log_w):
                raise ValueError(
                    f"the tilt's weights are too uneven: {len(log_w)} trajectories count as "
                    f"{_effective(log_w):.1f}, so that nearly every one would be rejected; train "
                    "longer, or at a higher temperature"
                )
            rate = acceptance(log_w, cut) if len(log_w) else 1.0
            size = min(batch_size, max(RELIABLE, math.ceil(1.1 * (n - len(kept)) / rate)))
            x0 = torch.randn(
                (size, *like.shape), generator=generator, dtype=like.dtype, device=like.device
            )
            some = {name: c.expand(size, *c.shape[1:]) for name, c in (cond or {}).items()} or None
            new = certify_batch(field, base, reward, kernel, x0, some, generator=generator)
            log_u = torch.rand(
                size, generator=generator, dtype=torch.float64, device=like.device
            ).log()
            log_w = torch.cat([log_w, new.log_weights.double()])
            _check_weights(log_w)
            ceiling = max(ceiling, log_ceiling(log_w, cut))
            kept = torch.cat([kept, new.samples])
            heights = torch.cat([heights, new.log_weights.double() - log_u])
            accepted = heights > ceiling
            kept, heights = kept[accepted], heights[accepted]
            bar.n = min(n, len(kept))
            bar.refresh()
    unseen = _mass_beyond_a_half(log_w, cut)
    if unseen > 2 * cut + 0.004:
        warnings.warn(
            f"about {unseen:.1%} of the tilt's mass lies above the ceiling, where cut={cut} was "
            f"asked for: the weights of {len(log_w)} trajectories do not show their tail, and the "
            "samples are of a tilt without it; train longer, or give more certificate_samples",
            stacklevel=3,  # the caller of `Tilted.sample_exact`
        )
    return kept[:n]


def check_request(n: int, cond: Cond | None, generator: torch.Generator | None) -> None:
    """Refuse a number of samples, conditions or a generator of the wrong type.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.
    """
    if not isinstance(n, numbers.Integral) or isinstance(n, bool):
        raise TypeError(f"n must be an integer, got {n!r}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    if cond is not None and not isinstance(cond, Mapping):
        raise TypeError(f"cond must map names to tensors, got {type(cond).__name__}")


def _check_weights(log_weights: Tensor) -> None:
    """Refuse log-weights that are NaN or infinite."""
    if not bool((log_weights < math.inf).all()):
        raise ValueError("log-weights are NaN or infinite: look at the reward")


def _effective(log_weights: Tensor) -> float:
    """Return the effective number of samples with these log-weights (N,)."""
    return log_mean_exp(log_weights)[2] * len(log_weights) if len(log_weights) else 0.0


def _mass_beyond_a_half(log_weights: Tensor, cut: float) -> float:
    """Return the mass of one half of the weights above the ceiling of the other, on average."""
    first, second = log_weights[::2].double(), log_weights[1::2].double()

    def beyond(seen: Tensor, fresh: Tensor) -> float:
        ratio = (fresh - log_ceiling(seen, cut)).exp()
        return float((ratio - 1).clamp_min(0).sum() / ratio.sum())

    return 0.5 * (beyond(first, second) + beyond(second, first))
