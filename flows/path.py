"""Gaussian paths from noise to data, and conversions between the quantities networks predict.

On a Gaussian path X_t = α_t X1 + σ_t X0, X0 ~ N(0, I), the conditional means of its two ends,
x̂1 = E[X1 | X_t] ("clean") and x̂0 = E[X0 | X_t] ("noise"), determine everything else:

    x = α x̂1 + σ x̂0,   velocity v = α̇ x̂1 + σ̇ x̂0,   score = -x̂0 / σ,   v_prediction = α x̂0 - σ x̂1.

Each of these with x gives both ends back; with D = α̇σ - σ̇α

    velocity      x̂1 = (σ v - σ̇ x) / D,          x̂0 = (α̇ x - α v) / D,
    clean                                          x̂0 = (x - α x̂1) / σ,
    noise         x̂1 = (x - σ x̂0) / α,
    score         x̂1 = (x + σ² score) / α,        x̂0 = -σ score,
    v_prediction  x̂1 = (α x - σ o) / (α² + σ²),   x̂0 = (σ x + α o) / (α² + σ²).

The rest of the package works on the canonical path α = t, σ = 1 - t, for which D = 1; this file has
functions for it.  A model of any other path is carried over to it by equal
signal-to-noise, see `OnCanonicalPath`.

Sources: Lipman et al., "Flow matching for generative modeling" (arXiv 2210.02747); Salimans and Ho,
"Progressive distillation" (arXiv 2202.00512) for the v_prediction, which is not a velocity in t.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flows.field import Cond, batch_time, check_velocity
from flows.schedule import Coefficients, Schedule

PREDICTIONS = ("velocity", "clean", "noise", "score", "v_prediction")
MARGIN = 1e-3
"""How far in canonical time `OnCanonicalPath` stays from an end at which a prediction is 0/0."""


def interpolate(x0: Tensor, x1: Tensor, t: Tensor | float) -> Tensor:
    """Return the state x_t = t x1 + (1 - t) x0 of the canonical path, shape (B, *).

    In this file ``t`` is a scalar or (B,), every other argument and the result (B, *).
    """
    time = batch_time(t, x1)
    return time * x1 + (1 - time) * x0


def clean(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """Return the predicted data x̂1 = E[X1 | X_t = x] = x + (1 - t) v."""
    return x + (1 - batch_time(t, x)) * v


def noise(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """Return the predicted noise x̂0 = E[X0 | X_t = x] = x - t v."""
    return x - batch_time(t, x) * v


def velocity(x1_hat: Tensor, x0_hat: Tensor) -> Tensor:
    """Return the velocity v = x̂1 - x̂0."""
    return x1_hat - x0_hat


def score(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """Return the score ∇ log p_t(x) = -x̂0 / (1 - t); v does not determine it at t = 1."""
    return -noise(x, v, t) / (1 - batch_time(t, x))


def velocity_from_clean(x: Tensor, x1_hat: Tensor, t: Tensor | float) -> Tensor:
    """Return the velocity (x̂1 - x) / (1 - t) from predicted data, not finite at t = 1."""
    return (x1_hat - x) / (1 - batch_time(t, x))


def velocity_from_noise(x: Tensor, x0_hat: Tensor, t: Tensor | float) -> Tensor:
    """Return the velocity (x - x̂0) / t from predicted noise, not finite at t = 0."""
    return (x - x0_hat) / batch_time(t, x)


def velocity_from_score(x: Tensor, score: Tensor, t: Tensor | float) -> Tensor:
    """Return the velocity (x + (1 - t) score) / t from a score, not finite at t = 0."""
    time = batch_time(t, x)
    return (x + (1 - time) * score) / time


def convert(
    value: Tensor, x: Tensor, t: Tensor | float, *, source: str, target: str, schedule: Schedule
) -> Tensor:
    """Convert a prediction at (x, t) from the quantity ``source`` to ``target``, shape (B, *).

    Arguments:
        value: the prediction, (B, *).
        x: the state on the path of ``schedule``, (B, *).
        t: native time of ``schedule``, scalar or (B,).
        source, target: two of `PREDICTIONS`.

    The result is not finite where ``source`` does not determine ``target`` (noise or score at
    α = 0, clean at σ = 0), or where σ̇ is infinite and ``target`` is the velocity.

    Raises:
        ValueError: an unknown prediction.
    """
    _check_prediction(source, "source")
    _check_prediction(target, "target")
    if source == target:
        return value
    time = batch_time(t, x)
    coefficients = schedule.coefficients(time)
    of_x1, of_x0 = _ends(source, coefficients)
    x1_hat = of_x1[0] * x + of_x1[1] * value
    x0_hat = of_x0[0] * x + of_x0[1] * value
    alpha, sigma, alpha_dot, sigma_dot = coefficients
    if target == "clean":
        return x1_hat
    if target == "noise":
        return x0_hat
    if target == "score":
        return -x0_hat / sigma
    if target == "v_prediction":
        return alpha * x0_hat - sigma * x1_hat
    return alpha_dot * x1_hat + sigma_dot * x0_hat


class OnCanonicalPath(nn.Module):
    """A velocity field on the canonical path, made of a model of any Gaussian path.

    Two Gaussian paths carry the same information at equal signal-to-noise: with ρ = t / (1 - t)
    and τ the native time at which α/σ = ρ, the state x of the canonical path is z = (α + σ) x on
    the native one, and both have the same x̂1 and x̂0.  So v(x, t) = x̂1 - x̂0 with the ends read
    from ``model(z, τ, cond)``; a derivative of the schedule enters for a native velocity only.

    The velocity is exact for ``t_min`` <= t <= ``t_max`` and held at its value there outside.
    These limits are 0 and 1 unless the schedule does not reach pure noise or data (see
    `Schedule.canonical_range`) or the prediction does not determine the velocity there, when they
    lie `MARGIN` inside: noise and score at pure noise, clean at pure data, the velocity of
    `Polynomial` of degree above 1 at pure noise.

    Arguments:
        model: called as ``model(z, tau, cond)`` with z (B, *) and tau shaped as the given ``t``;
            returns (B, *).  Shared, not copied.  A result of another dtype is cast to that of x.
        schedule: the native α and σ.
        prediction: the quantity that the model returns, one of `PREDICTIONS`.
        t_range: canonical times outside which the model must not be called; narrows the limits.

    Raises:
        ValueError: an unknown prediction, or a ``t_range`` that leaves no times.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor, Cond | None], Tensor],
        schedule: Schedule,
        prediction: str = "velocity",
        *,
        t_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        _check_prediction(prediction, "prediction")
        lowest, highest = schedule.canonical_range
        noisy, clean = (_determined(prediction, schedule, tau) for tau in schedule.time_range)
        self.t_min = max(t_range[0], lowest if noisy else lowest + MARGIN)
        self.t_max = min(t_range[1], highest if clean else highest - MARGIN)
        if not self.t_min < self.t_max:
            raise ValueError(
                f"t_range must overlap the model's canonical times [{lowest:.6g}, {highest:.6g}], "
                f"got {t_range}"
            )
        self.model = model
        self.schedule = schedule
        self.prediction = prediction

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        """Return the canonical velocity, of the shape of ``x``.

        Raises:
            TypeError, ValueError: the model returns no floating-point tensor of the shape of ``x``.
        """
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        time = t.clamp(self.t_min, self.t_max)
        tau = self.schedule.snr_inverse(time / (1 - time))
        native = batch_time(tau, x)
        coefficients = self.schedule.coefficients(native)
        z = (coefficients.alpha + coefficients.sigma) * x
        out = check_velocity(self.model(z, tau, cond), z, "model").to(x.dtype)
        of_x1, of_x0 = _ends(self.prediction, coefficients)
        return velocity(of_x1[0] * z + of_x1[1] * out, of_x0[0] * z + of_x0[1] * out)


Pair = tuple[Tensor, Tensor]


def _ends(source: str, coefficients: Coefficients) -> tuple[Pair, Pair]:
    """Return (a, b) and (c, d) with x̂1 = a x + b value and x̂0 = c x + d value."""
    alpha, sigma, alpha_dot, sigma_dot = coefficients
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if source == "clean":
        return (zero, one), (1 / sigma, -alpha / sigma)
    if source == "noise":
        return (1 / alpha, -sigma / alpha), (zero, one)
    if source == "score":
        return (1 / alpha, sigma.square() / alpha), (zero, -sigma)
    if source == "v_prediction":
        norm = alpha.square() + sigma.square()
        return (alpha / norm, -sigma / norm), (sigma / norm, alpha / norm)
    D = alpha_dot * sigma - sigma_dot * alpha
    # Variance-preserving paths have σ̇ = -∞ at pure data, but the limit of σ̇/D there is -1/α.
    slope = torch.where(sigma_dot.isinf(), -1 / alpha, sigma_dot / D)
    return (-slope, sigma / D), (alpha_dot / D, -alpha / D)


def _determined(source: str, schedule: Schedule, tau: float) -> bool:
    """Tell whether x and a prediction at native time ``tau`` determine both ends."""
    coefficients = schedule.coefficients(torch.tensor(tau, dtype=torch.float64))
    of_x1, of_x0 = _ends(source, coefficients)
    return all(bool(value.isfinite()) for value in (*of_x1, *of_x0))


def _check_prediction(prediction: str, name: str) -> None:
    """Raise ValueError if ``prediction`` is unknown."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"{name} must be one of {', '.join(PREDICTIONS)}; got {prediction!r}")
