"""One Gaussian target on every path, in closed form and without the package's own formulas.

For X1 ~ N(m, s²) and x = α X1 + σ X0 the ends are Gaussian given x; with c = α² s² + σ²

    x̂1 = m + α s² (x - α m) / c,   x̂0 = σ (x - α m) / c,

and σ̇ x̂0 = σσ̇ (x - α m) / c is finite where σ̇ is not.
"""

import math
from typing import NamedTuple

import torch

from flows.schedule import VE, VP, CondOT, Cosine, LinearVP, Polynomial, Schedule, Table

F64 = torch.float64


class Reference(NamedTuple):
    """A schedule and, independently of it, its α, σ, α̇ and σσ̇ at native times."""

    schedule: Schedule
    alpha: object
    sigma: object
    alpha_dot: object
    sigma_sigma_dot: object


def _vp_T(t):
    return 0.5 * (1 - t) ** 2 * 19.9 + (1 - t) * 0.1


def _vp_alpha(t):
    return torch.exp(-0.5 * _vp_T(t))


def _vp_alpha_dot(t):
    return 0.5 * ((1 - t) * 19.9 + 0.1) * _vp_alpha(t)


def _polynomial(n):
    return Reference(
        Polynomial(n),
        lambda t: t**n,
        lambda t: 1 - t**n,
        lambda t: n * t ** (n - 1),
        lambda t: -n * t ** (n - 1) * (1 - t**n),
    )


# A variance-preserving table without an end in native time 0..19: log ρ = 2 - t/5 exactly.
_LOG_SNR = 2 - torch.arange(20, dtype=F64) / 5
_TABLE = Table(torch.sigmoid(2 * _LOG_SNR).sqrt(), torch.sigmoid(-2 * _LOG_SNR).sqrt())


def _table_share(t):
    """σ² of the table; with α² = 1 - σ² and d log ρ/dτ = -1/5, dσ²/dτ = 2 α² σ² / 5."""
    return torch.sigmoid(2 * t / 5 - 4)


REFERENCES = {
    "condot": Reference(
        CondOT(), lambda t: t, lambda t: 1 - t, torch.ones_like, lambda t: -(1 - t)
    ),
    "cosine": Reference(
        Cosine(),
        lambda t: torch.sin(math.pi / 2 * t),
        lambda t: torch.cos(math.pi / 2 * t),
        lambda t: math.pi / 2 * torch.cos(math.pi / 2 * t),
        lambda t: -math.pi / 4 * torch.sin(math.pi * t),
    ),
    "linear_vp": Reference(
        LinearVP(), lambda t: t, lambda t: (1 - t**2).sqrt(), torch.ones_like, lambda t: -t
    ),
    "vp": Reference(
        VP(),
        _vp_alpha,
        lambda t: (-torch.expm1(-_vp_T(t))).sqrt(),
        _vp_alpha_dot,
        lambda t: -_vp_alpha(t) * _vp_alpha_dot(t),
    ),
    "ve": Reference(VE(), torch.ones_like, lambda t: t, torch.zeros_like, lambda t: t),
    "ve_to_zero": Reference(
        VE(sigma_min=0.0), torch.ones_like, lambda t: t, torch.zeros_like, lambda t: t
    ),
    "polynomial_1": _polynomial(1),
    "polynomial_2": _polynomial(2),
    "polynomial_3": _polynomial(3),
    "table": Reference(
        _TABLE,
        lambda t: (1 - _table_share(t)).sqrt(),
        lambda t: _table_share(t).sqrt(),
        lambda t: -(1 - _table_share(t)).sqrt() * _table_share(t) / 5,
        lambda t: (1 - _table_share(t)) * _table_share(t) / 5,
    ),
}


def predictions(reference, x, t, m, s):
    """All predictions for N(m, s²) at native state ``x`` and time ``t`` (broadcastable to x)."""
    alpha, sigma = reference.alpha(t), reference.sigma(t)
    whitened = (x - alpha * m) / (alpha**2 * s**2 + sigma**2)
    x1, x0 = m + alpha * s**2 * whitened, sigma * whitened
    return {
        "velocity": reference.alpha_dot(t) * x1 + reference.sigma_sigma_dot(t) * whitened,
        "clean": x1,
        "noise": x0,
        "score": -whitened,
        "v_prediction": alpha * x0 - sigma * x1,
    }


def canonical_velocity(x, t, m, s):
    """v = m + (t s² - (1 - t)) (x - t m) / (t² s² + (1 - t)²), and dv/dx."""
    slope = (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2)
    return m + slope * (x - t * m), slope
