"""What each kernel is, in a line; `adjoint.chain.kernels` derives them."""

from __future__ import annotations

DESCRIPTIONS = {
    "euler_published": "the Euler-Maruyama pair of the published Q-learning code",
    "euler_consistent": "the same chain with the adjoint of its own mean",
    "ancestral_pair": "the ancestral kernel with the adjoint of its own mean",
    "ancestral": "the ancestral kernel, adjoint read at its own time",
    "moment_matched": "the same, with the noise of the exact transition on average (the default)",
    "covariance_matched": "the same, with the full conditional covariance, for low dimensions",
}
"""By the name in `adjoint.KERNELS`, in its order; some refer to the one before."""
