"""The exact tilt p*(x) = p(x) exp(r(x)) / Z, and distances of samples from it.

Two independent methods give it.  Where the density p is known, the midpoint rule on a square grid
of cells of side h gives every integral:

    Z = Σ_i p(x_i) exp(r(x_i)) / Σ_i p(x_i),    p*_i ∝ p(x_i) exp(r(x_i)),

with an error that falls faster than any power of h for smooth densities that vanish at the edge of
the window (and is exact for the checkerboard where cell edges are grid lines, as at 400 cells on
[-4, 4]).  Where only samples x_i of the base are known, importance resampling gives estimates in
any dimension:

    Z ≈ (1/N) Σ_i exp(r(x_i)),    w_i = exp(r(x_i)) / Σ_j exp(r(x_j)),    ESS/N = 1/(N Σ_i w_i²),

with the standard errors of a mean and of a ratio of means.  The distances of samples from either
are in `distances` and can be imported from here too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from adjoint import log_mean_exp
from adjoint.certificate import ENOUGH
from applications.toy2d.distances import mode_tv, sliced_wasserstein, w2_ratio
from applications.toy2d.targets import nearest

__all__ = [
    "GridTilt",
    "ResampledTilt",
    "RewardFunction",
    "grid_tilt",
    "mask_unreliable",
    "mode_tv",
    "resample_tilt",
    "sliced_wasserstein",
    "w2_ratio",
]

Generator = torch.Generator | None
CHUNK = 16384


class RewardFunction(Protocol):
    """A reward is a callable (x (B, *), cond) to (B,), such as a `ToyReward`."""

    def __call__(self, x: Tensor, cond: Mapping[str, Tensor] | None = None, /) -> Tensor:
        """Return the rewards (B,) of ``x`` (B, *)."""
        ...


@dataclass(frozen=True, eq=False)
class GridTilt:
    """The tilt is known by quadrature on R×R cells of the square [-extent, extent]²; all float64.

    Arguments:
        axis: Cell centres (R,) along either axis.
        base: Density p at the cells (R, R), first index x, second index y; integrates to one.
        density: Density p* at the cells (R, R); integrates to one.
        log_z: log Z, relative to the part of the base that lies in the window.
        mass: The integral of the given density over the window: 1 if that was normalised and the
            window holds it.
        reward_base: E[r] under p.
        reward_tilted: E[r] under p*.
    """

    axis: Tensor
    base: Tensor
    density: Tensor
    log_z: float
    mass: float
    reward_base: float
    reward_tilted: float

    @property
    def log_z_stderr(self) -> float:
        """Return the standard error of log Z, which is zero for a quadrature."""
        return 0.0

    @property
    def cell(self) -> float:
        """Return the side h of a cell."""
        return float(self.axis[1] - self.axis[0])

    @property
    def points(self) -> Tensor:
        """Return the cell centres (R², 2) in the order of ``density.flatten()``."""
        return torch.cartesian_prod(self.axis, self.axis)

    @property
    def kl(self) -> float:
        """Return KL(p* ‖ p) in nats, E*[r] - log Z."""
        return self.reward_tilted - self.log_z

    def mean(self, values: Tensor | None = None) -> Tensor:
        """Return E*[f] (*) of ``values`` f (R², *) at ``points``; without values, E*[x], (2,)."""
        values = self.points if values is None else values
        return torch.tensordot(self._probabilities(), values.double(), dims=1)

    def mode_frequencies(self, modes: Tensor) -> Tensor:
        """Return the probability (C,) of the nearest-centre cell of each of ``modes`` (C, 2)."""
        cells = nearest(self.points, modes)
        return self.axis.new_zeros(len(modes)).index_add_(0, cells, self._probabilities())

    def sample(self, n: int, generator: Generator = None) -> Tensor:
        """Draw ``n`` points (n, 2), float32: a cell by its probability, then a place in it."""
        cells = torch.multinomial(self._probabilities(), n, replacement=True, generator=generator)
        offset = torch.rand(n, 2, generator=generator, dtype=torch.float64) - 0.5
        return (self.points[cells] + self.cell * offset).float()

    def _probabilities(self) -> Tensor:
        p = self.density.flatten()
        return p / p.sum()


def grid_tilt(
    log_density: Callable[[Tensor], Tensor],
    reward: RewardFunction,
    extent: float = 4.0,
    resolution: int = 400,
) -> GridTilt:
    """Tilt exp(``log_density``) by ``reward``, by the midpoint rule.

    Arguments:
        log_density: log p, (B, 2) to (B,); -inf is allowed, a constant offset does not matter.
        reward: r, called as ``reward(x, None)``.
        extent: Half-width of the window.
        resolution: R, cells per axis.

    Raises:
        ValueError: ``extent`` is not positive, ``resolution`` is below 2, the density vanishes on
            all of the window or is NaN somewhere, or the reward is not finite where it does not.
    """
    if not extent > 0:
        raise ValueError(f"extent must be positive, got {extent}")
    if resolution < 2:
        raise ValueError(f"resolution must be at least 2 cells per axis, got {resolution}")
    h = 2 * extent / resolution
    axis = (torch.arange(resolution, dtype=torch.float64) + 0.5) * h - extent
    points = torch.cartesian_prod(axis, axis)
    log_p = _evaluate(log_density, points, "log_density")
    if bool(log_p.isnan().any()) or bool((log_p == torch.inf).any()):
        raise ValueError("log_density must be finite or -inf, got NaN or +inf on the grid")
    log_mass = log_p.logsumexp(0)
    if not bool(log_mass.isfinite()):
        raise ValueError(f"log_density must be finite somewhere within extent {extent}, got -inf")
    r = _evaluate(lambda x: reward(x, None), points, "reward")
    r = torch.where(log_p > -torch.inf, r, 0.0)  # where the base has no mass r does not matter
    _check_finite(r, "reward")
    log_z = (log_p + r).logsumexp(0) - log_mass
    base = (log_p - log_mass).exp()
    tilted = (log_p - log_mass + r - log_z).exp()
    return GridTilt(
        axis=axis,
        base=base.reshape(resolution, resolution) / h**2,
        density=tilted.reshape(resolution, resolution) / h**2,
        log_z=float(log_z),
        mass=float(log_mass.exp()) * h**2,
        reward_base=float(base @ r),
        reward_tilted=float(tilted @ r),
    )


@dataclass(frozen=True, eq=False)
class ResampledTilt:
    """The tilt is known as weighted samples of the base.

    Arguments:
        samples: The base's samples (N, *).
        rewards: r at the samples (N,), float64.
        weights: w (N,), float64, summing to one.
        log_z: log Z estimated by the mean of exp(r).
        log_z_stderr: Its standard error (delta method); infinite, like that of ``mean``, below
            `adjoint.certificate.ENOUGH` effective samples.
        ess: Effective sample size divided by N, in (0, 1].
    """

    samples: Tensor
    rewards: Tensor
    weights: Tensor
    log_z: float
    log_z_stderr: float
    ess: float

    @property
    def effective(self) -> float:
        """Return the effective sample size."""
        return self.ess * len(self.samples)

    @property
    def reward_base(self) -> float:
        """Return E[r] under the base."""
        return float(self.rewards.mean())

    @property
    def reward_tilted(self) -> float:
        """Return E[r] under the tilt."""
        return float(self.weights @ self.rewards)

    def mean(self, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return E*[f] of ``values`` f (N, *) at the samples, and its standard error, both (*).

        Without values f(x) = x.
        """
        values = (self.samples if values is None else values).double()
        mean = torch.tensordot(self.weights, values, dims=1)
        if self.effective < ENOUGH:
            return mean, torch.full_like(mean, math.inf)
        variance = torch.tensordot(self.weights.square(), (values - mean).square(), dims=1)
        return mean, variance.sqrt()

    def mode_frequencies(self, modes: Tensor) -> Tensor:
        """Return the probability (C,) of the nearest-centre cell of each of ``modes`` (C, d)."""
        cells = nearest(self.samples, modes)
        return self.weights.new_zeros(len(modes)).index_add_(0, cells, self.weights)

    def sample(self, n: int, generator: Generator = None) -> Tensor:
        """Draw ``n`` of the samples (n, *) by weight with replacement."""
        chosen = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        return self.samples[chosen]


def mask_unreliable(
    report: dict[str, str | int | float],
    names: Sequence[str],
    exact: GridTilt | ResampledTilt,
    source: str,
) -> dict[str, str | int | float]:
    """Replace ``names`` in ``report`` by NaN where too few samples carry the exact tilt.

    Arguments:
        report: numbers by name.
        names: numbers that were made with ``exact``.
        exact: the exact tilt.
        source: the flow whose tilt it is, for the warning.

    Warns:
        UserWarning: the tilt has fewer than `adjoint.certificate.ENOUGH` effective samples.
    """
    if isinstance(exact, GridTilt) or exact.effective >= ENOUGH:
        return report
    warnings.warn(
        f"{exact.effective:.1f} effective samples, of {len(exact.samples)} of {source}, are too "
        f"few (below {ENOUGH}) to know the exact tilt: {', '.join(names)} are left out",
        stacklevel=2,
    )
    return report | dict.fromkeys(names, math.nan)


def resample_tilt(samples: Tensor, reward: RewardFunction) -> ResampledTilt:
    """Tilt the distribution of ``samples`` (N, *) by ``reward``, called as ``reward(x, None)``.

    Raises:
        ValueError: fewer than two samples, or a reward that is not finite.
    """
    n = len(samples)
    if n < 2:
        raise ValueError(f"samples must hold at least 2 rows, got {n}")
    rewards = _evaluate(lambda x: reward(x, None), samples, "reward")
    _check_finite(rewards, "reward")
    log_z, error, ess = log_mean_exp(rewards)
    return ResampledTilt(
        samples=samples,
        rewards=rewards,
        weights=torch.softmax(rewards, 0),
        log_z=log_z,
        log_z_stderr=error,
        ess=ess,
    )


def _evaluate(function: Callable[[Tensor], Tensor], x: Tensor, name: str) -> Tensor:
    """Evaluate ``function`` at the rows of ``x``, in pieces, without gradients: (N,), float64."""
    values = []
    for part in x.split(CHUNK):
        with torch.no_grad():
            values.append(function(part).double())
        if values[-1].shape != (len(part),):
            raise ValueError(
                f"{name} must return shape ({len(part)},) for x of shape {tuple(part.shape)}, "
                f"got {tuple(values[-1].shape)}"
            )
    return torch.cat(values)


def _check_finite(values: Tensor, name: str) -> None:
    bad = int((~values.isfinite()).sum())
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} values of {len(values)} that are not")
