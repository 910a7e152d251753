r"""Draws exact samples by rejection, from proposals whose weights are known.

A proposal x of density q comes with its weight w = p*(x) Z / q(x), where p* is the distribution
that is wanted.  Accepted with probability min(1, w/L), it is a sample of

    p_L ∝ q min(w, L),        p* = (1 - m) p_L + m p_cut,    m = E[(w - L)₊] / E[w],

so that the total variation between p_L and p* is at most m, the mass of p* that lies above the
ceiling L.  A fraction (1 - m) E[w] / L of the proposals is accepted: all of them where w is
constant.  Unlike resampling, no sample repeats; unlike weighted means, the samples go anywhere.

Given m, the smallest L that holds it follows from weights that have been seen: those known before
and those of all proposals made so far.  As more are seen L rises.  With u uniform, w is accepted if
log w - log u > log L, a number that is kept with each sample, so that those accepted at a lower
ceiling are thinned to the new one.

A ceiling rests on the weights seen so far.  Where they have heavy tails, the true m is larger than
the m among these weights.  Each half of the weights is therefore held against the ceiling of the
other half, and a warning says where m is larger than asked for.

Source: rejection sampling (von Neumann 1951) with the supremum of the weights seen so far (Caffo,
Booth and Davis, "Empirical supremum rejection sampling", 2002), here a quantile of their mass.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from adjoint.certificate import ENOUGH, log_mean_exp
from flows.training import distributed

Proposal = Callable[[int], tuple[Tensor, Tensor]]
"""A function that draws n samples (n, *) and returns them with their log-weights (n,)."""

RELIABLE = 200
"""Effective samples, at least, among the weights that make a ceiling."""

UNEVEN = 1 / 200
"""Effective samples, as a fraction of `TELLING` proposals or more, of too uneven weights."""

TELLING = 40_000
"""Proposals that show whether weights are too uneven."""

CUT = 0.001
"""Mass of the target above the ceiling, unless another is asked for."""

MAX_TRAJECTORIES = 1_000_000
"""Most proposals that are made, unless another number is given."""


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


def sample_by_rejection(
    propose: Proposal,
    n: int,
    *,
    like: Tensor,
    distribution: str,
    seen: Tensor | None = None,
    cut: float = CUT,
    batch_size: int = 4096,
    max_trajectories: int = MAX_TRAJECTORIES,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Tensor:
    """Return ``n`` independent samples (n, *) of the distribution that the weights aim at.

    Arguments:
        propose: draws proposals with their log-weights.
        like: one sample (*), for shape, dtype and device.
        distribution: name of the distribution in the bar, in errors and warnings.
        seen: (N,) log-weights of the same proposals that are known already.  Without, or if they
            are few, more is proposed than ``n`` need: until the weights count as 1/cut effective
            samples, and `RELIABLE`.
        cut: largest total variation between the distribution of the samples and the exact one, as
            far as the weights tell (a few times this, where they are no more than 1/cut); a smaller
            one accepts fewer proposals.
        batch_size: proposals at a time.
        max_trajectories: refuse to go on where more proposals than this are needed, as far as the
            weights seen tell; with ``seen`` before the first proposal.
        generator: of the uniform numbers, on the device of ``like``.
        progress: show a bar with the expected time; None shows one on a terminal.

    Raises:
        ValueError: ``cut`` or ``max_trajectories`` out of range, weights so uneven that nearly
            every proposal would be rejected, or NaN.

    Warns:
        UserWarning: more of the mass than asked for lies above the ceiling, as far as the halves of
            the weights know of each other.
    """
    log_ceiling(torch.zeros(1), cut)  # refuses a cut out of range
    if not max_trajectories >= 1:
        raise ValueError(f"max_trajectories must be at least 1, got {max_trajectories}")
    if progress is None:
        progress = sys.stderr.isatty() and distributed.rank() == 0
    enough = max(RELIABLE, 1 / (cut or CUT))
    kept, heights = like.new_empty(0, *like.shape), like.new_empty(0, dtype=torch.float64)
    log_w = heights if seen is None else seen.to(heights)
    _check_weights(log_w)
    ceiling, proposed = -math.inf, 0
    with tqdm(total=n, desc=f"samples of {distribution}", disable=not progress, leave=False) as bar:
        while (effective := _effective(log_w)) < enough or len(kept) < n:
            _check_evenness(len(log_w), effective, distribution)
            rate = acceptance(log_w, cut) if len(log_w) else 1.0
            if effective >= ENOUGH:
                more = max((n - len(kept)) / rate, (enough / effective - 1) * len(log_w))
                _check_expected(n, proposed + more, rate, cut, max_trajectories, distribution)
            size = min(batch_size, max(RELIABLE, math.ceil(1.1 * (n - len(kept)) / rate)))
            samples, new = propose(size)
            proposed += size
            log_u = torch.rand(
                size, generator=generator, dtype=torch.float64, device=like.device
            ).log()
            log_w = torch.cat([log_w, new.double()])
            _check_weights(log_w)
            ceiling = max(ceiling, log_ceiling(log_w, cut))
            kept = torch.cat([kept, samples])
            heights = torch.cat([heights, new.double() - log_u])
            accepted = heights > ceiling  # earlier samples too: a ceiling that rises thins them
            kept, heights = kept[accepted], heights[accepted]
            bar.n = min(n, len(kept))
            bar.refresh()
    unseen = _mass_beyond_a_half(log_w, cut)
    if unseen > 2 * cut + 0.004:
        warnings.warn(
            f"{distribution}: about {unseen:.1%} of the tilt's mass lies above the ceiling, where "
            f"cut={cut} was asked for: the weights of {len(log_w)} trajectories do not show their "
            "tail, and the samples are of a tilt without it; train longer, or give more "
            "certificate_samples",
            stacklevel=4,  # the caller of `Tilted.sample_exact`
        )
    return kept[:n]


def _check_evenness(count: int, effective: float, distribution: str) -> None:
    """Refuse weights that are known well and would reject nearly every proposal."""
    if count >= TELLING and effective < UNEVEN * count:
        raise ValueError(
            f"the tilt's weights are too uneven: {count} trajectories count as {effective:.1f}, so "
            f"that nearly every one would be rejected as a sample of {distribution}; train longer, "
            "or at a higher temperature"
        )


def _check_expected(
    n: int, expected: float, rate: float, cut: float, most: int, distribution: str
) -> None:
    """Refuse a number of expected proposals above ``most``."""
    if expected > most:
        raise ValueError(
            f"{n:,} samples of {distribution} would take about {expected:,.0f} trajectories, since "
            f"their weights accept {rate:.2%} of them, and max_trajectories is {most:,}: train "
            f"longer, ask for fewer samples, accept a larger cut than {cut}, or raise "
            "max_trajectories"
        )


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
