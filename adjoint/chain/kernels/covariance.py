r"""The covariance-matched chain: the ancestral mean with the exact covariance at each state.

The noise is that of the exact transition, q I + g² Cov(X_1|x_k) (with q and g of
`adjoint.chain.kernels.ancestral`), from d vector-Jacobian products of the base
(`adjoint.chain.conditional_covariance`): for low dimensions.  Its adjoint has a further term, the
derivative of the state-dependent noise; the residual is that of ``ancestral``.  The column std is
that of ``moment_matched`` and only weights the loss.  With importance weights its fixed point is
the most exact of all schemes.  The chain was derived for this project.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from adjoint.chain.conditional_covariance import MAX_DIM, ConditionalNoise
from adjoint.chain.kernels.ancestral import ancestral_moments, own_time_kernel
from adjoint.chain.kernels.kernel import Kernel
from adjoint.chain.kernels.scheme import Moments, Scheme


class CovarianceMatched(Scheme):
    """Ancestral mean with the covariance that the exact transition has at each state."""

    name = "covariance_matched"
    summary = "the ancestral kernel with the full conditional covariance, for low dimensions"
    needs = frozenset({"mmse", "covariance"})
    state_noise = True
    max_dim = MAX_DIM

    def __call__(self, grid: Tensor, moments: Moments) -> Kernel:
        """Return the table of the chain on ``grid`` (K+1,), from mmse and covariance."""
        assert moments.covariance is not None
        _, g, q = ancestral_moments(grid)
        noise = ConditionalNoise(
            t=grid, bridge=q, gain=g**2, start_covariance=moments.covariance.to(grid)
        )
        return replace(own_time_kernel(grid, moments.mmse), name=self.name, state_noise=noise)
