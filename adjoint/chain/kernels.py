r"""Memoryless transition kernels, each with its own adjoint rule and its own reading.

A discretised memoryless SDE is a chain of Gaussian kernels.  Step k from t to s = t_{k+1} has a
mean affine in the state and in the velocity, and a noise level shared by base and tilted chain:

    x_{k+1} = mean_x x_k + mean_v v(x_k, t) + std ε_k.

The lean adjoint λ runs backward with one vector-Jacobian product of the *base* velocity a step,

    λ_k = adjoint_x λ_{k+1} + adjoint_v J(x_k, adjoint_t)ᵀ λ_{k+1},    J = ∂v_β/∂x,  λ_K = -∇r(x_K),

and the loss regresses the control onto it, ‖residual_v (v_θ - v_β)(x_k, t) + residual_a λ‖².  A
scheme is a table of these nine columns; rollout, adjoint, loss and certificate read the table and
know no scheme by name.  A step with std = 0 carries no information about the drift: there both
chains follow the base, so that their laws stay absolutely continuous.

Mean and reading belong together.  The schemes, with h = s - t:

``euler_published``
    The Euler-Maruyama pair of the published Q-learning code (Li and Levine, 2601.14234), whose
    coefficients are taken at t + h: σ² = 2(1-t+h)/(t+h), mean (1 - h/s) x + 2h v; λ = a with the
    Jacobian of v_β(·, t+h) taken at x_k; reading (2/σ)(v_θ - v_β) + σ a_k.  The last step is the
    noiseless Euler step x + h v_β of the base's ODE.
``euler_consistent``
    The same chain with the exact adjoint of its own mean, a_k = (∂μ_β/∂x)ᵀ a_{k+1}, and the
    residual of the discrete control problem, d_k/std + std a_{k+1} with d = mean_v (v_θ - v_β).
    Exact relative to the discretised base chain for linear rewards on Gaussian bases at any K.
``ancestral_pair``
    The ancestral kernel x_s = s x̂₁ + (1-s) ρ x̂₀ + (1-s) √(1-ρ²) ε, ρ = t(1-s)/(s(1-t)), with its
    consistent adjoint and reading.  Written A x + g x̂₁ with A = ρ(1-s)/(1-t), g = s(1-ρ²).
``ancestral``
    The same chain with the left-point adjoint c = a/t read at its own time: the target velocity at
    (x_k, t_k) is v_β - (1-t_k) c_k.  From a_k = (∂μ_β/∂x)ᵀ a_{k+1} and x̂₁ = x + (1-t) v,

        c_k = [s²/t + (1-s)²/(1-t)] c_{k+1} + [s²(1-t)/t - t(1-s)²/(1-t)] Jᵀ c_{k+1}.

    g (1-t)² c_k = s Σ_k(x) c_{k+1} with Σ_k = q + g² Cov(X_1|x): reading c_k at its own time is the
    tilt with the exact conditional covariance, although the chain itself has only q.
``moment_matched``
    The ancestral mean with the noise the exact transition has on average, q + g² mmse(t), where
    q = (1-s)²(1-ρ²) and mmse(t) = E‖X_1 - x̂₁‖²/d is a property of the base measured once
    (as in Analytic-DPM, Bao et al. 2201.06503).  Same adjoint and reading as ``ancestral``.
``covariance_matched``
    The ancestral mean with the covariance the exact transition has at each state,
    q I + g² Cov(X_1|x_k), from d vector-Jacobian products of the base
    (`adjoint.chain.conditional_covariance`): for low dimensions.  Its adjoint has a further term,
    the derivative of the state-dependent noise; the reading is the same.  The column std is that of
    ``moment_matched`` and only weights the loss.  With importance weights its fixed point is the
    most exact of all.

The own-time schemes weight step k by g²(1-t)²/std², the path-measure weight of d_k, capped and
normalised to mean 1 (any positive weight has the same minimiser).  At t = 0 the left-point
coefficients divide by t; there the rule is evaluated at a small positive time (`LEFT_TIME`).

Sources: Domingo-Enrich et al. 2409.08861 (memoryless SDE, lean adjoint, loss); the left-point rule,
the own-time reading and the two matched chains were derived for this project.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from flows.field import Cond, VelocityField
from flows.grid import check_grid
from flows.path import interpolate

KERNELS = (
    "euler_published",
    "euler_consistent",
    "ancestral_pair",
    "ancestral",
    "moment_matched",
    "covariance_matched",
)
MATCHED = ("moment_matched", "covariance_matched")
"""Schemes that need the mmse of the base."""

LEFT_TIME = 0.02
"""Where the left-point rule is evaluated on a step that starts at t = 0."""

WEIGHT_CAP = 5.0
"""Largest loss weight of a step relative to the median step, own-time schemes."""


@dataclass(frozen=True)
class Kernel:
    """One row a step of the columns of the module docstring; times and coefficients in float64.

    Attributes:
        name: scheme.
        t: (K+1,) grid.
        mean_x, mean_v, std: (K,) the chain.
        adjoint_t, adjoint_x, adjoint_v: (K,) the backward rule.
        residual_v, residual_a: (K,) the residual.
        adjoint_scale: (K+1,) λ = a / adjoint_scale: ones where λ is the adjoint a, t where it is c.
        residual_at_next: the residual of step k uses λ_{k+1} rather than λ_k.
        noiseless_last: std[-1] is 0, and the last step follows the base.
        own_time: per step, whether adjoint_t equals t (then one evaluation serves both).
        bridge, gain: (K,) q and g², and start_covariance: (d, d) Cov(X_1), of a chain whose noise
            has the full conditional covariance; None for a scalar noise.
    """

    name: str
    t: Tensor
    mean_x: Tensor
    mean_v: Tensor
    std: Tensor
    adjoint_t: Tensor
    adjoint_x: Tensor
    adjoint_v: Tensor
    residual_v: Tensor
    residual_a: Tensor
    adjoint_scale: Tensor
    residual_at_next: bool
    noiseless_last: bool
    own_time: tuple[bool, ...]
    bridge: Tensor | None = None
    gain: Tensor | None = None
    start_covariance: Tensor | None = None

    @property
    def steps(self) -> int:
        """Number of steps K."""
        return self.mean_x.shape[0]

    @property
    def is_exact_adjoint(self) -> bool:
        """Whether the adjoint is the Jacobian of the chain's own mean (all but the published)."""
        return self.own_time[-1]

    def to(self, device: torch.device | str) -> Kernel:
        """The same table on another device (still float64)."""
        moved: dict[str, Any] = {
            f.name: value.to(device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


def _euler(grid: Tensor, *, published: bool) -> Kernel:
    """Both Euler-Maruyama pairs; see the module docstring."""
    t, s = grid[:-1], grid[1:]
    h = s - t
    sigma = (2 * (1 - t + h) / s).sqrt()
    std = h.sqrt() * sigma
    mean_x, mean_v = 1 - h / s, 2 * h
    std[-1], mean_x[-1], mean_v[-1] = 0.0, 1.0, h[-1]  # the last step follows the base's ODE
    ones = torch.ones_like(grid)
    if published:
        adjoint_x, adjoint_v = 1 - h / s, 2 * h
        residual_v, residual_a = 2 / sigma, sigma
    else:  # the noiseless step has no residual
        adjoint_x, adjoint_v = mean_x, mean_v
        residual_v, residual_a = (mean_v / std).nan_to_num(posinf=0.0), std
    return Kernel(
        name="euler_published" if published else "euler_consistent",
        t=grid,
        mean_x=mean_x,
        mean_v=mean_v,
        std=std,
        adjoint_t=s if published else t,
        adjoint_x=adjoint_x,
        adjoint_v=adjoint_v,
        residual_v=residual_v,
        residual_a=residual_a,
        adjoint_scale=ones,
        residual_at_next=not published,
        noiseless_last=True,
        own_time=tuple([not published] * len(t)),
    )


def _ancestral_moments(grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, g and the bridge variance q of the ancestral kernel, each (K,)."""
    t, s = grid[:-1], grid[1:]
    rho = t * (1 - s) / (s * (1 - t))
    return rho * (1 - s) / (1 - t), s * (1 - rho**2), (1 - s) ** 2 * (1 - rho**2)


def _ancestral_pair(grid: Tensor) -> Kernel:
    """Ancestral chain, consistent adjoint and reading."""
    t = grid[:-1]
    coefficient, g, q = _ancestral_moments(grid)
    std = q.sqrt()
    mean_x, mean_v = coefficient + g, g * (1 - t)
    return Kernel(
        name="ancestral_pair",
        t=grid,
        mean_x=mean_x,
        mean_v=mean_v,
        std=std,
        adjoint_t=t,
        adjoint_x=mean_x,
        adjoint_v=mean_v,
        residual_v=torch.where(std > 0, mean_v / std, torch.zeros_like(std)),
        residual_a=std,
        adjoint_scale=torch.ones_like(grid),
        residual_at_next=True,
        noiseless_last=True,
        own_time=tuple([True] * len(t)),
    )


def own_time_kernel(grid: Tensor, mmse: Tensor | None = None) -> Kernel:
    """The table of ``ancestral`` or, with the mmse of the base, of ``moment_matched``.

    Ancestral mean, left-point adjoint c read at its own time; noise q or q + g² mmse.  For a base
    that changes while it is tilted: a plain function of tensors, which checks nothing and does not
    wait for the device.  Otherwise call `make_kernel`.

    Arguments:
        grid: (K+1,) float64, strictly increasing from 0 to 1.
        mmse: (K,) float64, positive, on the device of the grid.
    """
    t, s = grid[:-1], grid[1:]
    coefficient, g, q = _ancestral_moments(grid)
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


def make_kernel(
    name: str, grid: Tensor, *, mmse: Tensor | None = None, covariance: Tensor | None = None
) -> Kernel:
    """The table of a scheme on a time grid.

    Arguments:
        name: one of ``KERNELS``.
        grid: (K+1,) strictly increasing from 0 to 1.
        mmse: (K,) mean squared error per dimension of x̂₁ at grid[:-1]; for the matched chains.
        covariance: (d, d) covariance of the base's samples; for ``covariance_matched``.

    Raises:
        ValueError: unknown name; a grid that is not increasing from 0 to 1; mmse or covariance
            missing, of another shape, not positive, or given to a scheme that does not use it.
    """
    if name not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {name!r}")
    grid = check_grid(grid).to(torch.float64)
    if len(grid) < 3 or grid[0] != 0 or grid[-1] != 1:
        raise ValueError(
            "grid of a memoryless chain must run from 0 to 1 in at least 2 steps, got "
            f"{len(grid) - 1} from {float(grid[0])} to {float(grid[-1])}"
        )
    if (mmse is not None) != (name in MATCHED):
        raise ValueError(f"mmse goes with kernels {', '.join(MATCHED)}, got kernel {name!r}")
    if (covariance is not None) != (name == "covariance_matched"):
        raise ValueError(f"covariance goes with kernel 'covariance_matched', got kernel {name!r}")
    if mmse is not None:
        mmse = mmse.to(grid)
        if mmse.shape != grid[:-1].shape or not bool((mmse > 0).all()):
            raise ValueError(
                f"mmse must hold {len(grid) - 1} positive numbers, one a step, got {mmse.tolist()}"
            )
    if covariance is not None:
        if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
            raise ValueError(f"covariance must be (d, d), got shape {tuple(covariance.shape)}")
        _, g, q = _ancestral_moments(grid)
        return replace(
            own_time_kernel(grid, mmse),
            name=name,
            bridge=q,
            gain=g**2,
            start_covariance=covariance.to(grid),
        )
    if name in ("ancestral", *MATCHED):
        return own_time_kernel(grid, mmse)
    if name == "ancestral_pair":
        return _ancestral_pair(grid)
    return _euler(grid, published=name == "euler_published")


@torch.no_grad()
def measure_mmse(
    base: VelocityField,
    grid: Tensor,
    x1: Tensor,
    *,
    cond: Cond | None = None,
    batch_size: int = 4096,
    generator: torch.Generator | None = None,
) -> Tensor:
    """mmse(t) = E‖X_1 - x̂₁(X_t)‖²/d at grid[:-1], (K,) float64, from samples x1 (N, *) of the base.

    Equal to (1-t)² times the base's flow-matching loss per dimension at t.
    """
    x0 = torch.randn(x1.shape, generator=generator, dtype=x1.dtype, device=x1.device)
    errors = torch.zeros(len(grid) - 1, dtype=torch.float64)
    for k, t in enumerate(grid[:-1].to(x1.dtype)):
        for i in range(0, len(x1), batch_size):
            rows = slice(i, i + batch_size)
            some = None if cond is None else {name: c[rows] for name, c in cond.items()}
            v = base(interpolate(x0[rows], x1[rows], t), t, some)
            errors[k] += (v - (x1[rows] - x0[rows])).double().square().sum().cpu()
    return (1 - grid[:-1].double().cpu()) ** 2 * errors / x1.numel()
