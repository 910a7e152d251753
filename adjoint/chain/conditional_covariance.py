r"""Conditional covariance of the data given the state, from the base velocity alone.

On the canonical path x̂₁ = x + (1-t) v and the second-order Tweedie identity gives

    Cov(X_1 | X_t = x) = (1-t)²/t · ∂x̂₁/∂x = (1-t)²/t · (I + (1-t) J),   J = ∂v/∂x,

at the cost of d vector-Jacobian products in one batch.  At t = 0 it is the covariance of the data,
which has to be measured.  A transition kernel with mean A x + g x̂₁ and covariance
Σ(x) = q I + g² Cov(X_1 | x) has the exact conditional mean and covariance of the reverse process,
where a scalar noise has only the average of its trace: its error falls with the square of the step.

The noise is L(x) ε with Σ = L Lᵀ (Cholesky).  It depends on the state, so the lean adjoint of such
a chain has a term beside the Jacobian of the mean,

    a_k = (∂μ_β/∂x)ᵀ a_{k+1} + ∇_x [(L(x_k) ε_k)ᵀ a_{k+1}],

second derivatives of the velocity by one more backward pass (`ConditionalNoise.pull`).  Without it
the tilt keeps a bias that refining the grid hardly removes.

A learned velocity has no exactly symmetric Jacobian, and its symmetric part need not be positive:
the symmetric part is taken, and where its smallest eigenvalue is below a small floor a multiple of
the identity lifts it there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor

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
    """Return the velocity (B, *) and its Jacobian (B, d, d) by one batch of d·B products.

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
    """Return Cov(X_1 | x) (B, d, d) from J (B, d, d) at t > 0, symmetric and above the floor."""
    eye = torch.eye(jac.shape[-1], dtype=jac.dtype, device=jac.device)
    symmetric = 0.5 * (jac + jac.transpose(1, 2))
    covariance = ((1 - t) ** 2 / t).to(jac.dtype) * (eye + (1 - t).to(jac.dtype) * symmetric)
    smallest = torch.linalg.eigvalsh(covariance.detach())[:, :1, None]
    lift = (FLOOR * (1 - t) ** 2).to(jac.dtype) - smallest
    return covariance + lift.clamp_min(0) * eye


def scaled_noise(root: Tensor, noise: Tensor) -> Tensor:
    """Return products L ε of the shape of the noise ε (..., *), from factors L (..., d, d).

    As a sum of products, since autocast would round a matrix product.
    """
    flat = noise.flatten(root.ndim - 2)
    return (root * flat.unsqueeze(-2)).sum(-1).reshape(noise.shape)


@dataclass(frozen=True)
class ConditionalNoise:
    """Step noise L(x_k) ε_k with L Lᵀ = q I + g² Cov(X_1 | x_k); see the module docstring.

    Attributes:
        t: (K+1,) float64 time grid.
        bridge, gain: (K,) float64, q and g² of each step.
        start_covariance: (d, d) float64, Cov(X_1), the conditional covariance at t = 0.
    """

    t: Tensor
    bridge: Tensor
    gain: Tensor
    start_covariance: Tensor

    def to(self, device: torch.device | str) -> ConditionalNoise:
        """Return a copy of this noise with its tensors on ``device``."""
        return ConditionalNoise(
            *(c.to(device) for c in (self.t, self.bridge, self.gain, self.start_covariance))
        )

    def root(
        self,
        base: VelocityField,
        k: int,
        x: Tensor,
        cond: Cond | None = None,
        *,
        create_graph: bool = False,
    ) -> Tensor:
        """Return lower triangular factors L (B, d, d) at the states x (B, *) of step k.

        Arguments:
            create_graph: keep L differentiable in x, which then must require a gradient.
        """
        if k == 0:
            covariance = self.start_covariance.to(x.device, x.dtype).expand(x.shape[0], -1, -1)
        else:
            t = self.t[k].to(x.device)
            _, jac = jacobian(base, x, t.to(x.dtype), cond, create_graph=create_graph)
            covariance = conditional_covariance(jac, t)
        eye = torch.eye(covariance.shape[-1], dtype=x.dtype, device=x.device)
        bridge, gain = (column[k].to(x.device, x.dtype) for column in (self.bridge, self.gain))
        full = bridge * eye + gain * covariance
        return torch.linalg.cholesky_ex(full)[0]

    def pull(
        self,
        base: VelocityField,
        k: int,
        x: Tensor,
        noise: Tensor,
        adjoint: Tensor,
        cond: Cond | None = None,
    ) -> Tensor:
        """Return the term ∇_x [(L(x_k) ε_k)ᵀ a] (B, *) that L(x) adds to the adjoint."""
        if k == 0:  # the covariance at t = 0 is that of the data, whatever the state
            return torch.zeros_like(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            root = self.root(base, k, x, cond, create_graph=True)
            kick = scaled_noise(root, noise)
            if not kick.requires_grad:  # a velocity linear in x has a constant Jacobian
                return torch.zeros_like(x)
            (pull,) = torch.autograd.grad((kick * adjoint).sum(), x, allow_unused=True)
        return torch.zeros_like(x) if pull is None else pull
