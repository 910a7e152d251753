r"""The moment-matched chain: the ancestral mean with the noise of the exact transition on average.

The reverse process has given X_t = x the covariance q I + g² Cov(X_1|x) at s (with q and g of
`adjoint.chain.kernels.ancestral`), where the ancestral kernel has only q.  The average of its trace
over x is known once the mean squared error of the base's estimate of the data is,

    std² = q + g² mmse(t),      mmse(t) = E‖X_1 - x̂₁(X_t)‖²/d

(as in Analytic-DPM, Bao et al. 2201.06503).  Adjoint and residual are those of ``ancestral``.  The
chain was derived for this project.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adjoint.chain.kernels.ancestral import own_time_kernel
from adjoint.chain.kernels.kernel import Kernel
from adjoint.chain.kernels.scheme import Moments, Scheme
from adjoint.evaluator import Evaluator
from flows.field import Cond, VelocityField
from flows.path import interpolate


class MomentMatched(Scheme):
    """Ancestral mean with the noise that the exact transition has on average."""

    name = "moment_matched"
    summary = "the ancestral kernel with the noise of the exact transition on average (the default)"
    needs = frozenset({"mmse"})

    def __call__(self, grid: Tensor, moments: Moments) -> Kernel:
        """Return the table of the chain on ``grid`` (K+1,), with the mmse (K,) of the base."""
        return own_time_kernel(grid, moments.mmse)


@torch.no_grad()
def measure_mmse(
    base: VelocityField | Evaluator,
    grid: Tensor,
    x1: Tensor,
    *,
    cond: Cond | None = None,
    batch_size: int = 4096,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the mean squared error of the base's estimate of the data by time, (K,) float64.

    mmse(t) = E‖X_1 - x̂₁(X_t)‖²/d is (1-t)² times the base's flow-matching loss per dimension.

    Arguments:
        base: velocity field, or an evaluator of one.
        grid: (K+1,) times; the error is measured at grid[:-1].
        x1: (N, *) samples of the base.
        cond: their conditions, with leading size N.
        batch_size: samples at a time.
        generator: of the noise X_0, on the device of x1.
    """
    base = Evaluator.of(base)
    x0 = torch.randn(x1.shape, generator=generator, dtype=x1.dtype, device=x1.device)
    errors = torch.zeros(len(grid) - 1, dtype=torch.float64)
    for k, t in enumerate(grid[:-1].to(x1.dtype)):
        for i in range(0, len(x1), batch_size):
            rows = slice(i, i + batch_size)
            some = None if cond is None else {name: c[rows] for name, c in cond.items()}
            v = base.at(interpolate(x0[rows], x1[rows], t), t, some)
            errors[k] += (v - (x1[rows] - x0[rows])).double().square().sum().cpu()
    return (1 - grid[:-1].double().cpu()) ** 2 * errors / x1.numel()
