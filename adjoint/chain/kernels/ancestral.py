r"""Ancestral chains: transitions with the exact mean of the reverse process.

With x̂₁ = x + (1-t) v and x̂₀ = x - t v, and ρ = t(1-s)/(s(1-t)), the ancestral kernel is

    x_s = s x̂₁ + (1-s) ρ x̂₀ + (1-s) √(1-ρ²) ε
        = A x + g x̂₁ + √q ε,      A = ρ(1-s)/(1-t),  g = s(1-ρ²),  q = (1-s)²(1-ρ²),

the conditional mean of X_s given X_t = x, with the noise of a bridge whose end X_1 is known.

``ancestral_pair`` has the exact adjoint of its own mean (`Kernel.consistent`).

``ancestral`` has the left-point adjoint c = a/t, read at its own time: the target velocity at
(x_k, t_k) is v_β - (1-t_k) c_k.  From a_k = (∂μ_β/∂x)ᵀ a_{k+1},

    c_k = [s²/t + (1-s)²/(1-t)] c_{k+1} + [s²(1-t)/t - t(1-s)²/(1-t)] Jᵀ c_{k+1}.

Then g (1-t)² c_k = s Σ_k(x) c_{k+1} with Σ_k = q + g² Cov(X_1|x): reading c_k at its own time is
the tilt with the exact conditional covariance, although the chain itself has only q.

The own-time schemes weight step k by g²(1-t)²/std², the path-measure weight of the control, capped
and normalised to mean 1 (any positive weight has the same minimiser).  At t = 0 the left-point
coefficients divide by t; there the rule is evaluated at a small positive time (`LEFT_TIME`).

The left-point rule and the residual at its own time were derived for this project.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adjoint.chain.kernels.kernel import Kernel
from adjoint.chain.kernels.scheme import Moments, Scheme

LEFT_TIME = 0.02
"""Time at which the left-point rule is evaluated on a step that starts at t = 0."""

WEIGHT_CAP = 5.0
"""Largest loss weight of a step relative to the median step, in the own-time schemes."""


def ancestral_moments(grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return coefficients A and g and the bridge variance q of the ancestral kernel, each (K,)."""
    t, s = grid[:-1], grid[1:]
    rho = t * (1 - s) / (s * (1 - t))
    return rho * (1 - s) / (1 - t), s * (1 - rho**2), (1 - s) ** 2 * (1 - rho**2)


def own_time_kernel(grid: Tensor, mmse: Tensor | None = None) -> Kernel:
    """Return the table of ``ancestral`` or, given the mmse of the base, of ``moment_matched``.

    For a base that changes while it is tilted: a plain function of tensors, which checks nothing
    and does not wait for the device.  Otherwise call `adjoint.make_kernel`.

    Arguments:
        grid: (K+1,) float64, strictly increasing from 0 to 1.
        mmse: (K,) float64, positive, on the device of the grid.
    """
    t, s = grid[:-1], grid[1:]
    coefficient, g, q = ancestral_moments(grid)
    variance = q if mmse is None else q + g**2 * mmse
    left = torch.where(t > 0, t, torch.minimum(torch.full_like(t, LEFT_TIME), s / 2))
    mean_v = g * (1 - t)
    # The plain chain ends noiseless: its last residual takes the weight of the step before.
    weight = torch.where(variance > 0, mean_v**2 / variance, torch.full_like(t, torch.nan))
    weight = torch.where(weight.isnan(), weight.nan_to_num(0.0).amax(), weight)
    weight = weight.clamp_max(WEIGHT_CAP * weight.median())
    residual_v = (weight / weight.mean()).sqrt()
    return Kernel(
        name="ancestral" if mmse is None else "moment_matched",
        t=grid,
        mean_x=coefficient + g,
        mean_v=mean_v,
        std=variance.sqrt(),
        adjoint_t=left,
        adjoint_x=s**2 / left + (1 - s) ** 2 / (1 - left),
        adjoint_v=s**2 * (1 - left) / left - left * (1 - s) ** 2 / (1 - left),
        residual_v=residual_v,
        residual_a=residual_v * (1 - t),
        adjoint_scale=torch.cat([left, grid[-1:]]),
        residual_at_next=False,
        noiseless_last=mmse is None,
        own_time=(False, *[True] * (len(t) - 1)),  # all but the step from t = 0
    )


class AncestralPair(Scheme):
    """Ancestral chain with the exact adjoint of its own mean."""

    name = "ancestral_pair"
    summary = "the ancestral kernel with the adjoint of its own mean"

    def __call__(self, grid: Tensor, moments: Moments) -> Kernel:
        """Return the table of the chain on ``grid`` (K+1,)."""
        coefficient, g, q = ancestral_moments(grid)
        return Kernel.consistent(
            self.name, grid, mean_x=coefficient + g, mean_v=g * (1 - grid[:-1]), std=q.sqrt()
        )


class Ancestral(Scheme):
    """Ancestral chain with the left-point adjoint, read at its own time."""

    name = "ancestral"
    summary = "the ancestral kernel, adjoint read at its own time"

    def __call__(self, grid: Tensor, moments: Moments) -> Kernel:
        """Return the table of the chain on ``grid`` (K+1,)."""
        return own_time_kernel(grid)
