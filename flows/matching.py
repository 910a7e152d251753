"""Flow matching: the regression whose minimiser is the velocity field, and couplings for it.

For a pair (x0, x1) of noise and data and x_t = t x1 + (1 - t) x0, the minimiser over v of

    E ‖v(X_t, t) - (X1 - X0)‖² / d,    t ~ U(0, 1),

is v(x, t) = E[X1 - X0 | X_t = x], which transports the distribution of X0 to that of X1 for every
coupling of the two (Lipman et al., arXiv 2210.02747, eq. 9; Tong et al., arXiv 2302.00482, for
couplings).  The minimum is not zero.  As X1 - X0 = (X1 - X_t)/(1 - t), it equals

    E ‖X1 - E[X1 | X_t]‖² / (d (1 - t)²) = mmse(t) / (1 - t)²,   averaged over t.

A coupling pairs a batch of noise with a batch of data.  Optimal transport within the minibatch
gives straighter paths, at the price of a bias that vanishes as the batch grows; it must not be used
where X0 and X1 have to be independent, as for a base that is tilted by adjoint matching.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from flows.field import Cond, VelocityField, batch_time, check_velocity
from flows.path import interpolate


def flow_matching_loss(
    field: VelocityField,
    x1: Tensor,
    *,
    x0: Tensor | None = None,
    t: Tensor | None = None,
    cond: Cond | None = None,
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the flow-matching loss, the batch mean of w ‖v(x_t, t) - (x1 - x0)‖² / d, and metrics.

    Arguments:
        field: velocity field to fit.
        x1: data, shape (B, *).
        x0: noise of the same shape; standard normal if not given.
        t: times in [0, 1], scalar or (B,); uniform if not given.
        cond: conditions of leading size B.
        weights: w, shape (B,), as they are (not normalised); 1 if not given.
        generator: source of the noise and times that are not given; x0 is drawn before t.

    Returns:
        The scalar loss, and the detached scalars ``loss`` and ``velocity_rms``.

    Raises:
        ValueError: the shapes of ``x0``, ``t`` or ``weights`` do not fit ``x1``, or the field's
            output does not.
    """
    batch = x1.shape[0]
    if x0 is None:
        x0 = torch.randn(x1.shape, generator=generator, dtype=x1.dtype, device=x1.device)
    if t is None:
        t = torch.rand(batch, generator=generator, dtype=x1.dtype, device=x1.device)
    if x0.shape != x1.shape:
        raise ValueError(f"x0 must have the shape of x1, {tuple(x1.shape)}, got {tuple(x0.shape)}")
    if t.shape not in ((), (batch,)):
        raise ValueError(f"t must be a scalar or ({batch},), got shape {tuple(t.shape)}")
    if weights is not None and weights.shape != (batch,):
        raise ValueError(f"weights must have shape ({batch},), got {tuple(weights.shape)}")
    v = check_velocity(field(interpolate(x0, x1, batch_time(t, x1)), t, cond), x1)
    errors = (v - (x1 - x0)).square().flatten(1).mean(1)
    loss = errors.mean() if weights is None else (weights * errors).mean()
    return loss, {"loss": loss.detach(), "velocity_rms": v.detach().square().mean().sqrt()}


def independent(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs (x0, x1) as they are, with the identity permutation, shape (B,)."""
    _check_pair(x0, x1)
    return x0, x1, torch.arange(x1.shape[0], device=x1.device)


def optimal_transport(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Re-pair a batch so that Σ ‖x1 - x0‖² is least; exact, in O(B³) on the CPU.

    Arguments:
        x0: noise, shape (B, *).
        x1: data of the same shape.

    Returns:
        ``x0``, the permuted data ``x1[permutation]`` and ``permutation``, shape (B,), by which
        conditions of the data have to be permuted as well.

    Raises:
        ValueError: the shapes differ, or a value is not finite.

    Source: Tong et al. (arXiv 2302.00482), minibatch OT-CFM; the assignment is by scipy.
    """
    _check_pair(x0, x1)
    # ‖x1 - x0‖² = ‖x0‖² + ‖x1‖² - 2 x0·x1, whose first two sums do not depend on the pairing.
    cost = -(x0.detach().flatten(1).double() @ x1.detach().flatten(1).double().mT)
    if not bool(cost.isfinite().all()):
        raise ValueError("x0 and x1 must be finite, got an inner product that is not")
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    permutation = torch.as_tensor(columns, dtype=torch.long, device=x1.device)
    return x0, x1[permutation], permutation


def _check_pair(x0: Tensor, x1: Tensor) -> None:
    if x0.shape != x1.shape:
        raise ValueError(
            f"x0 and x1 must have the same shape, got {tuple(x0.shape)} and {tuple(x1.shape)}"
        )
