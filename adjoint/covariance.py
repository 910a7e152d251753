r"""The conditional covariance of the data given the state, from the base velocity alone.

On the canonical path x̂₁ = x + (1-t) v and the second-order Tweedie identity gives

    Cov(X_1 | X_t = x) = (1-t)²/t · ∂x̂₁/∂x = (1-t)²/t · (I + (1-t) J),   J = ∂v/∂x,

at the cost of d vector-Jacobian products in one batch.  At t = 0 it is the covariance of the data,
which has to be measured.  A transition kernel with mean A x + g x̂₁ and covariance
q I + g² Cov(X_1 | x) has the exact conditional mean and covariance of the reverse process, where a
scalar noise has only the average of its trace: its error falls with the square of the step.
A learned velocity has no exactly symmetric Jacobian: the symmetric part is taken, and its
eigenvalues are kept above a small floor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flows.field import Cond, VelocityField, velocity_and_vjp

MAX_DIM = 16
"""Largest dimension for which the full covariance is formed."""

FLOOR = 1e-4
"""Smallest eigenvalue of Cov(X_1|x), as a fraction of (1-t)²."""


def jacobian(
    field: VelocityField, x: Tensor, t: Tensor, cond: Cond | None = None
) -> tuple[Tensor, Tensor]:
    """Velocity (B, *) and Jacobian (B, d, d), rows ∂v_i/∂x, by one batch of d·B products.

    Raises:
        ValueError: a sample has more than ``MAX_DIM`` entries.
    """
    batch, dim = x.shape[0], x[0].numel()
    if dim > MAX_DIM:
        raise ValueError(
            f"the full conditional covariance is formed up to dimension {MAX_DIM}, got {dim}; "
            "use kernel 'moment_matched'"
        )
    repeated = x.repeat(dim, *([1] * (x.ndim - 1)))
    rows = torch.eye(dim, dtype=x.dtype, device=x.device).repeat_interleave(batch, 0)
    if cond is not None:
        cond = {name: c.repeat(dim, *([1] * (c.ndim - 1))) for name, c in cond.items()}
    v, products = velocity_and_vjp(field, repeated, t, rows.reshape(repeated.shape), cond)
    return v[:batch], products.reshape(dim, batch, dim).transpose(0, 1)


def covariance_spectrum(jac: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, d), floored, and eigenvectors (B, d, d) of Cov(X_1 | x) from J (B, d, d)."""
    eye = torch.eye(jac.shape[-1], dtype=jac.dtype, device=jac.device)
    symmetric = eye + (1 - t).to(jac.dtype) * 0.5 * (jac + jac.transpose(1, 2))
    values, vectors = torch.linalg.eigh(symmetric)
    scale = ((1 - t) ** 2 / t).to(jac.dtype)
    return (scale * values).clamp_min(FLOOR * float((1 - t) ** 2)), vectors
