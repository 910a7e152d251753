"""Schedules α(τ), σ(τ) of the Gaussian paths X_τ = α X1 + σ X0 of published models.

The rest of the package uses a schedule through its signal-to-noise ratio ρ = α/σ and the inverse: a
model of any path is evaluated where its ρ is that of the canonical path, t / (1 - t) (see
``flows.path``).  Native time τ is the model's own: it may run either way and over any interval, and
`Schedule.time_range` says which.

    class       α            σ                noise → data    τ(ρ)
    CondOT      τ            1 - τ            0 → 1           ρ / (1 + ρ)
    Cosine      sin(πτ/2)    cos(πτ/2)        0 → 1           (2/π) atan ρ
    LinearVP    τ            √(1 - τ²)        0 → 1           ρ / √(1 + ρ²)
    Polynomial  τⁿ           1 - τⁿ           0 → 1           (ρ / (1 + ρ))^(1/n)
    VP          exp(-T/2)    √(1 - exp(-T))   0 → 1           1 - 2T / (b + √(b² + 2(B-b)T))
    VE          1            τ                σ_max → σ_min   1 / ρ
    Table       tabulated, log ρ linear in τ  either way      linear in log ρ

with T = ½(1-τ)²(B-b) + (1-τ)b for VP, so that T = log(1 + ρ⁻²).  ρ = 0 and ρ = ∞ are values like
any other.  Near τ = 1 LinearVP and VP have σ ∝ √(1-τ): rounding τ by ε moves σ by about ε/σ,
which no arithmetic can undo, and which stays below √ε.

Sources: Lipman et al. (arXiv 2210.02747) and the flow_matching package for CondOT, Cosine,
LinearVP, Polynomial and VP; Song et al. (arXiv 2011.13456) for VP and VE; Karras et al. (arXiv
2206.00364) for VE with σ as the time; Ho et al. (arXiv 2006.11239) for tables.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """The coefficients α and σ of a path and their derivatives, each shaped as the native times."""

    alpha: Tensor
    sigma: Tensor
    alpha_dot: Tensor
    sigma_dot: Tensor


class Schedule(ABC):
    """A schedule gives α and σ as functions of native time.

    All methods are elementwise and keep shape and dtype.

    A schedule defines ``coefficients``, ``_time_at`` and, unless it is (0, 1), ``time_range``.
    """

    time_range: tuple[float, float] = (0.0, 1.0)
    """Native times of the noisiest and of the cleanest state, in this order."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """Return α, σ, dα/dτ and dσ/dτ at native times ``t``."""

    @abstractmethod
    def _time_at(self, rho: Tensor) -> Tensor:
        """Return the native time of a signal-to-noise ratio that the schedule reaches."""

    def alpha(self, t: Tensor) -> Tensor:
        """Return α, the coefficient of the data."""
        return self.coefficients(t).alpha

    def sigma(self, t: Tensor) -> Tensor:
        """Return σ, the coefficient of the noise."""
        return self.coefficients(t).sigma

    def alpha_dot(self, t: Tensor) -> Tensor:
        """Return dα/dτ."""
        return self.coefficients(t).alpha_dot

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Return dσ/dτ, which is -∞ at the data end of `LinearVP` and `VP`."""
        return self.coefficients(t).sigma_dot

    def snr(self, t: Tensor) -> Tensor:
        """Return the signal-to-noise ratio ρ = α/σ, in [0, ∞]."""
        alpha, sigma, _, _ = self.coefficients(t)
        return alpha / sigma

    def snr_inverse(self, rho: Tensor) -> Tensor:
        """Return the native time at which α/σ is ``rho``, or the nearer end of `time_range`."""
        tau = self._time_at(rho.clamp(*self._snr_range))
        return tau.clamp(min(self.time_range), max(self.time_range))

    @cached_property
    def canonical_range(self) -> tuple[float, float]:
        """The canonical times t = α / (α + σ) of the noisiest and of the cleanest state."""
        alpha, sigma, _, _ = self.coefficients(torch.tensor(self.time_range, dtype=torch.float64))
        noisy, clean = (alpha / (alpha + sigma)).tolist()
        return noisy, clean

    @cached_property
    def _snr_range(self) -> tuple[float, float]:
        """The least and the greatest signal-to-noise ratio."""
        noisy, clean = self.snr(torch.tensor(self.time_range, dtype=torch.float64)).tolist()
        return noisy, clean


class CondOT(Schedule):
    """The optimal-transport schedule α = τ, σ = 1 - τ, which is the canonical path."""

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return α, σ, dα/dτ and dσ/dτ."""
        return Coefficients(t, 1 - t, torch.ones_like(t), -torch.ones_like(t))

    def _time_at(self, rho: Tensor) -> Tensor:
        return 1 / (1 + 1 / rho)


class Cosine(Schedule):
    """The cosine schedule α = sin(πτ/2), σ = cos(πτ/2), variance-preserving, as in torchcfm."""

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return α, σ, dα/dτ and dσ/dτ."""
        rate = math.pi / 2
        alpha = (rate * t).sin()
        sigma = (rate * (1 - t)).sin()  # exactly 0 at τ = 1, unlike the cosine
        return Coefficients(alpha, sigma, rate * sigma, -rate * alpha)

    def _time_at(self, rho: Tensor) -> Tensor:
        return rho.atan() / (math.pi / 2)


class LinearVP(Schedule):
    """The linear variance-preserving schedule α = τ, σ = √(1 - τ²)."""

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return α, σ, dα/dτ and dσ/dτ."""
        sigma = ((1 - t) * (1 + t)).sqrt()
        return Coefficients(t, sigma, torch.ones_like(t), -t / sigma)

    def _time_at(self, rho: Tensor) -> Tensor:
        return rho.atan().sin()


@dataclass(frozen=True)
class Polynomial(Schedule):
    """The polynomial schedule α = τⁿ, σ = 1 - τⁿ.

    Raises:
        ValueError: ``n`` is not positive and finite.
    """

    n: float

    def __post_init__(self) -> None:
        if not 0 < self.n < math.inf:
            raise ValueError(f"n must be positive and finite, got {self.n}")

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return α, σ, dα/dτ and dσ/dτ."""
        alpha, alpha_dot = t**self.n, self.n * t ** (self.n - 1)
        return Coefficients(alpha, 1 - alpha, alpha_dot, -alpha_dot)

    def _time_at(self, rho: Tensor) -> Tensor:
        return (1 / (1 + 1 / rho)) ** (1 / self.n)


@dataclass(frozen=True)
class VP(Schedule):
    """The variance-preserving (VP) schedule with a rate that falls linearly toward the data.

    α = exp(-T/2) and σ² = 1 - α² with T = ½(1-τ)²(B-b) + (1-τ)b.  In the reversed time 1 - τ it is
    the VP of score_sde.  It does not reach pure noise: α(0) = exp(-(B+b)/4), 0.0066 by default.

    Raises:
        ValueError: not 0 < ``beta_min`` <= ``beta_max`` < ∞.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(
                "beta_min and beta_max must satisfy 0 < beta_min <= beta_max < inf, "
                f"got {self.beta_min} and {self.beta_max}"
            )

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return α, σ, dα/dτ and dσ/dτ."""
        s, growth = 1 - t, self.beta_max - self.beta_min
        T = 0.5 * growth * s.square() + self.beta_min * s
        alpha, sigma = (-0.5 * T).exp(), (-torch.expm1(-T)).sqrt()
        alpha_dot = 0.5 * (growth * s + self.beta_min) * alpha
        return Coefficients(alpha, sigma, alpha_dot, -alpha * alpha_dot / sigma)

    def _time_at(self, rho: Tensor) -> Tensor:
        T, b = torch.log1p(rho**-2), self.beta_min
        # The root of the quadratic in 1 - τ, in the form that does not cancel for small T.
        return 1 - 2 * T / (b + (b**2 + 2 * (self.beta_max - b) * T).sqrt())


@dataclass(frozen=True)
class VE(Schedule):
    """The variance-exploding (VE) schedule α = 1, σ = τ: native time is the noise level.

    The networks of EDM and k-diffusion, and the VE networks of score_sde, take the noise level as
    their time.  It runs from ``sigma_max`` (noise) down to ``sigma_min`` (data).  The defaults are
    EDM's.

    Raises:
        ValueError: not 0 <= ``sigma_min`` < ``sigma_max`` < ∞.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                "sigma_min and sigma_max must satisfy 0 <= sigma_min < sigma_max < inf, "
                f"got {self.sigma_min} and {self.sigma_max}"
            )
        object.__setattr__(self, "time_range", (self.sigma_max, self.sigma_min))

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return α, σ, dα/dτ and dσ/dτ."""
        return Coefficients(torch.ones_like(t), t, torch.zeros_like(t), torch.ones_like(t))

    def _time_at(self, rho: Tensor) -> Tensor:
        return 1 / rho


class Table(Schedule):
    """A tabulated schedule, whose native time is the (fractional) index into two tables.

    Between the entries log(α/σ) and log(α² + σ²) are linear in the index, so that a
    variance-preserving table stays variance-preserving; at an entry the derivatives are those of
    the piece that begins there.  The tables may run either way: DDPM's, with
    α = ``alphas_cumprod.sqrt()`` and σ = ``(1 - alphas_cumprod).sqrt()``, start at the data.  They
    are kept in float64 and used in the dtype of the times.

    Arguments:
        alphas: α, shape (K,), K >= 2, positive.
        sigmas: σ, shape (K,), positive.

    Raises:
        ValueError: a shape does not fit, an entry is not positive and finite, or α/σ is not
            strictly monotone.
    """

    def __init__(self, alphas: Tensor | Sequence[float], sigmas: Tensor | Sequence[float]) -> None:
        alpha, sigma = (
            torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in (alphas, sigmas)
        )
        if alpha.ndim != 1 or alpha.shape != sigma.shape or len(alpha) < 2:
            raise ValueError(
                "alphas and sigmas must both have shape (K,) with K >= 2, "
                f"got {tuple(alpha.shape)} and {tuple(sigma.shape)}"
            )
        for name, value in (("alphas", alpha), ("sigmas", sigma)):
            bad = value[~((value > 0) & value.isfinite())]
            if len(bad):
                raise ValueError(f"{name} must be positive and finite, got {bad[0].item()}")
        log_snr = alpha.log() - sigma.log()
        rise = log_snr.diff() * (log_snr[-1] - log_snr[0]).sign()
        if not bool((rise > 0).all()):
            k = int(rise.argmin())
            raise ValueError(
                "alphas / sigmas must be strictly monotone, "
                f"got {(alpha / sigma)[k : k + 2].tolist()} at indices {k} and {k + 1}"
            )
        last = float(len(alpha) - 1)
        self.time_range = (0.0, last) if log_snr[-1] > log_snr[0] else (last, 0.0)
        index = torch.arange(len(alpha), dtype=torch.float64)
        self._rows = torch.stack([index, log_snr, torch.hypot(alpha, sigma).log()])
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return α, σ, dα/dτ and dσ/dτ."""
        index, log_snr, log_norm = self._copy(t)
        snr, snr_slope = _interpolate(t, index, log_snr)
        norm, norm_slope = _interpolate(t, index, log_norm)
        signal, noise = torch.sigmoid(2 * snr), torch.sigmoid(-2 * snr)  # shares of α² + σ²
        alpha, sigma = norm.exp() * signal.sqrt(), norm.exp() * noise.sqrt()
        alpha_dot = alpha * (norm_slope + snr_slope * noise)
        return Coefficients(alpha, sigma, alpha_dot, sigma * (norm_slope - snr_slope * signal))

    def _time_at(self, rho: Tensor) -> Tensor:
        index, log_snr, _ = self._copy(rho)
        if self.time_range[0] > 0:
            index, log_snr = index.flip(0), log_snr.flip(0)
        return _interpolate(rho.log(), log_snr, index)[0]

    def _copy(self, like: Tensor) -> Tensor:
        """Return the table in dtype and device of ``like``, copied once, as copies synchronise."""
        key = (like.device, like.dtype)
        if key not in self._copies:
            self._copies[key] = self._rows.to(like)
        return self._copies[key]


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
    """Interpolate linearly between nodes (``xs`` ascending, ``ys``); return y(x) and dy/dx."""
    k = (torch.searchsorted(xs, x.detach().contiguous(), right=True) - 1).clamp(0, len(xs) - 2)
    slope = (ys[k + 1] - ys[k]) / (xs[k + 1] - xs[k])
    return ys[k] + (x - xs[k]) * slope, slope
