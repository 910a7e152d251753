r"""The conditional covariance of the data given the state, from the base velocity alone.

On the canonical path x̂₁ = x + (1-t) v and the second-order Tweedie identity gives

    Cov(X_1 | X_t = x) = (1-t)²/t · ∂x̂₁/∂x = (1-t)²/t · (I + (1-t) J),   J = ∂v/∂x,

at the cost of d vector-Jacobian products in one batch.  At t = 0 it is the covariance of the data,
which has to be measured.  A transition kernel with mean A x + g x̂₁ and covariance
Σ(x) = q I + g² Cov(X_1 | x) has the exact conditional mean and covariance of the reverse process,
where a scalar noise has only the average of its trace: its error falls with the square of the step.

The noise is L(x) ε with Σ = L Lᵀ (Cholesky).  It depends on the state, so the lean adjoint of such
a chain has a term beside the Jacobian of the mean,

    a_k = (∂μ_β/∂x)ᵀ a_{k+1} + ∇_x [(L(x_k) ε_k)ᵀ a_{k+1}],

second derivatives of the velocity by one more backward pass (`noise_pull`).  Without it the tilt
keeps a bias that refining the grid hardly removes.

A learned velocity has no exactly symmetric Jacobian, and its symmetric part need not be positive:
the symmetric part is taken, and where its smallest eigenvalue is below a small floor a multiple of
the identity lifts it there.
"""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor

from adjoint.chain.kernels import Kernel
from flows.field import Cond, VelocityField

MAX_DIM = 16
"""Largest dimension for which the full covariance is formed."""

FLOOR = 1e-4
"""Smallest eigenvalue of Cov(X_1|x), as a fraction of (1-t)²."""


def jacobian(
    field: VelocityField,
    x: Tensor,
    t: Tensor,
    cond: Cond | None = None,
    *,
    create_graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """Velocity (B, *) and Jacobian (B, d, d), rows ∂v_i/∂x, by one batch of d·B products.

    Arguments:
        create_graph: keep the Jacobian differentiable in x, which then must require a gradient.

    Raises:
        ValueError: a sample has more than ``MAX_DIM`` entries.
    """
    batch, dim = x.shape[0], x[0].numel()
    if dim > MAX_DIM:
        raise ValueError(
            f"the full conditional covariance is formed up to dimension {MAX_DIM}, got {dim}; "
            "use kernel 'moment_matched'"
        )
    rows = torch.eye(dim, dtype=x.dtype, device=x.device).repeat_interleave(batch, 0)
    if cond is not None:
        cond = {name: repeat(c, "b ... -> (d b) ...", d=dim) for name, c in cond.items()}
    with torch.enable_grad():
        if not create_graph:
            x = x.detach().requires_grad_(True)
        repeated = repeat(x, "b ... -> (d b) ...", d=dim)
        v = field(repeated, t, cond)
        products = torch.zeros_like(repeated)  # a constant velocity has a zero Jacobian
        if v.requires_grad:
            (products,) = torch.autograd.grad(
                v,
                repeated,
                rows.reshape(repeated.shape).to(v.dtype),
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,
            )
    return v[:batch], products.reshape(dim, batch, dim).transpose(0, 1)


def conditional_covariance(jac: Tensor, t: Tensor) -> Tensor:
    """Cov(X_1 | x), (B, d, d), symmetric and lifted to the floor, from J (B, d, d) at t > 0."""
    eye = torch.eye(jac.shape[-1], dtype=jac.dtype, device=jac.device)
    symmetric = 0.5 * (jac + jac.transpose(1, 2))
    covariance = ((1 - t) ** 2 / t).to(jac.dtype) * (eye + (1 - t).to(jac.dtype) * symmetric)
    smallest = torch.linalg.eigvalsh(covariance.detach())[:, :1, None]
    lift = (FLOOR * (1 - t) ** 2).to(jac.dtype) - smallest
    return covariance + lift.clamp_min(0) * eye


def noise_root(
    base: VelocityField,
    kernel: Kernel,
    k: int,
    x: Tensor,
    cond: Cond | None = None,
    *,
    create_graph: bool = False,
) -> Tensor:
    """L (B, d, d) with L Lᵀ = q I + g² Cov(X_1 | x_k) at step k of a chain with full covariance."""
    assert kernel.bridge is not None
    assert kernel.gain is not None
    assert kernel.start_covariance is not None
    if k == 0:
        covariance = kernel.start_covariance.to(x.dtype).expand(x.shape[0], -1, -1)
    else:
        _, jac = jacobian(base, x, kernel.t[k].to(x.dtype), cond, create_graph=create_graph)
        covariance = conditional_covariance(jac, kernel.t[k])
    eye = torch.eye(covariance.shape[-1], dtype=x.dtype, device=x.device)
    full = kernel.bridge[k].to(x.dtype) * eye + kernel.gain[k].to(x.dtype) * covariance
    return torch.linalg.cholesky_ex(full)[0]


def noise_pull(
    base: VelocityField,
    kernel: Kernel,
    k: int,
    x: Tensor,
    noise: Tensor,
    adjoint: Tensor,
    cond: Cond | None = None,
) -> Tensor:
    """∇_x [(L(x_k) ε_k)ᵀ a] (B, *): what the state-dependent noise adds to the adjoint."""
    if k == 0:  # the covariance at t = 0 is that of the data, whatever the state
        return torch.zeros_like(x)
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        root = noise_root(base, kernel, k, x, cond, create_graph=True)
        with torch.autocast(x.device.type, enabled=False):  # it would round the product
            kick = (root @ noise.flatten(1).unsqueeze(2)).squeeze(2)
        if not kick.requires_grad:  # a velocity linear in x has a constant Jacobian
            return torch.zeros_like(x)
        (pull,) = torch.autograd.grad((kick * adjoint.flatten(1)).sum(), x, allow_unused=True)
    return torch.zeros_like(x) if pull is None else pull
