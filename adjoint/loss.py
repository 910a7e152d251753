r"""The adjoint-matching loss: regress the control onto the lean adjoint.

    L = E Σ_k ‖residual_v (v_θ - v_β)(x_k, t_k) + residual_a λ‖²,    λ = λ_k or λ_{k+1},

on trajectories of the current model, with λ, v_β and the states held constant (Domingo-Enrich et
al. 2409.08861, eq. 37).  Its only critical point is the optimal control; it is a regression, so
the minimum is not zero.  Practical options: a random subset of the steps, a cap on each term, and
importance weights per trajectory.

The second loss here is the half variance of the log-weights (`log_variance_loss`).  At the optimum
log w is, up to the error of the grid, one number on every trajectory, so that its gradient there
is zero on every batch and not only on average: after the regression has brought the control near
the optimum, it removes the noise that the regression leaves, and what it leaves in the weights of
modes above all, since log w compares whole trajectories that ended in different ones.  It is no
good start, for its noise grows with the variance itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adjoint.chain.adjoints import Adjoint
from adjoint.chain.kernels import Kernel


def select_steps(
    steps: int,
    *,
    late_fraction: float = 0.25,
    early_fraction: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the indices of the steps in a loss: the last ones and a random part of the others.

    All of the last ``late_fraction`` of the steps and a random ``early_fraction`` of the rest (the
    subset of Domingo-Enrich et al., appendix G).  Returns ascending int64 indices on the device of
    the generator, without waiting for it.

    Raises:
        ValueError: a fraction outside [0, 1], or a selection that would be empty.
    """
    for name, value in (("late_fraction", late_fraction), ("early_fraction", early_fraction)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
    n_late = round(late_fraction * steps)
    n_rest = steps - n_late
    n_early = round(early_fraction * n_rest)
    if n_late + n_early == 0:
        raise ValueError(
            f"late_fraction={late_fraction} and early_fraction={early_fraction} select none of "
            f"{steps} steps"
        )
    device = "cpu" if generator is None else generator.device
    order = torch.randperm(n_rest, generator=generator, device=device)[:n_early]
    return torch.cat([order.sort().values, torch.arange(n_rest, steps, device=device)])


def adjoint_matching_loss(
    v: Tensor,
    adjoint: Adjoint,
    kernel: Kernel,
    *,
    steps: Tensor | None = None,
    weights: Tensor | None = None,
    clip: Tensor | float | None = None,
    control_variate: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and metrics from velocities of the model along the trajectory.

    Arguments:
        v: (S, B, *) velocity of the model at the selected states, with gradient.
        adjoint: of the whole trajectory.
        kernel: the table.
        steps: (S,) indices of the selected steps; all K if None.
        weights: (B,) importance weights of the trajectories; none if None.
        clip: cap on the term of one step of one trajectory.
        control_variate: (K+1, B, *) part of the adjoints with mean zero at each state; see
            `adjoint.chain.control_variates`.  It is subtracted from the target unweighted: the
            gradient of a term is the gradient of
            weight ‖residual_v (v_θ - v_β) + residual_a (λ - control_variate / weight)‖².

    Returns:
        The loss, the mean over the batch of the sum over steps and dimensions, and the metrics
        ``adjoint_norm`` (mean ‖λ‖ over steps), ``control_norm`` (mean ‖v - v_β‖) and
        ``term_quantile`` (the 0.9 quantile of the unclipped terms, for a running cap).
    """
    lam = adjoint.values[1:] if kernel.residual_at_next else adjoint.values[:-1]
    v_base, residual_v, residual_a = adjoint.v_base, kernel.residual_v, kernel.residual_a
    if steps is not None:
        index = steps.to(v.device)
        lam, v_base, residual_v, residual_a = (
            lam[index],
            v_base[index],
            residual_v[index],
            residual_a[index],
        )
    shape = (-1, *([1] * (v.ndim - 1)))
    residual_v = residual_v.to(v.dtype).reshape(shape)
    residual_a = residual_a.to(v.dtype).reshape(shape)
    control = v - v_base
    terms = (residual_v * control + residual_a * lam).square().flatten(2).sum(2)
    # As torch.quantile, which `torch.vmap` does one by one; of very many a cap needs not all.
    ordered = terms.detach().flatten()[: 2**24].float().sort().values
    place = 0.9 * (len(ordered) - 1)
    quantile = torch.lerp(ordered[int(place)], ordered[math.ceil(place)], place % 1)
    if clip is not None:
        terms = terms.clamp_max(clip)
    per_trajectory = terms.sum(0)
    if weights is not None:
        per_trajectory = per_trajectory * weights
    if control_variate is not None:
        off = control_variate[1:] if kernel.residual_at_next else control_variate[:-1]
        off = off if steps is None else off[index]
        linear = 2 * (residual_v * control + residual_a * lam) - residual_a * off
        per_trajectory = per_trajectory - (linear * residual_a * off).flatten(2).sum((0, 2))
    metrics = {
        "adjoint_norm": lam.flatten(2).norm(dim=2).mean(),
        "control_norm": control.detach().flatten(2).norm(dim=2).mean(),
        "term_quantile": quantile,
    }
    return per_trajectory.mean(), metrics


def importance_weights(log_weights: Tensor, *, cap: float = 10.0, min_ess: float = 0.0) -> Tensor:
    """Return self-normalised weights softmax(log w) · B, capped: (B,) → (B,).

    All ones where the batch's effective sample size / B is below ``min_ess``: then a few
    trajectories would stand for all, and the noise would cost more than the bias they remove.
    """
    weights = torch.softmax(log_weights, 0) * log_weights.shape[0]
    ess = 1 / weights.square().mean()
    return torch.where(ess >= min_ess, weights.clamp_max(cap), torch.ones_like(weights))


def log_variance_loss(log_weights: Tensor, groups: int = 1) -> Tensor:
    """Return ½ Var(log w), unbiased, in nats², which is 0 at the exact tilt.

    That holds for trajectories of any distribution.

    On a grid of K steps its minimum is that of the best Gaussian chain, not quite 0.

    Arguments:
        log_weights: (B,) with gradient, of `adjoint.certificate.path_log_ratio` plus the reward at
            the end, on trajectories that are held fixed.
        groups: number of equal groups of neighbours; the variance is within groups.  Trajectories
            under different conditions have different log Z: each group holds one condition.

    Source: Nüsken and Richter, "Solving high-dimensional Hamilton-Jacobi-Bellman PDEs using neural
    networks" (2005.05409), the log-variance divergence.
    """
    return 0.5 * log_weights.reshape(groups, -1).var(1).mean()
