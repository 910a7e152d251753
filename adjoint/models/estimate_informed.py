"""A residual network on a base that sees the base's estimate of the sample beside the state.

The control that a network beside the base has to learn depends on the modes that a state may still
end in, and on their weights.  The base knows them: its estimate of the sample,

    x̂_1 = x + (1 - t) v(x, t) = E[X_1 | X_t = x],

is the mean over these modes, and costs nothing, since the velocity of the base is evaluated in any
case.  A network that is given x̂_1 need not rebuild the base in itself; the gain grows with the
dimension (docs/exactness.md).  `adjoint.models.reward_informed` gives its network the reward too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flows.field import Cond, Corrected, batch_time

ESTIMATE = "estimate of the base"
"""Name under which the correction finds x̂_1 among its conditions."""


class EstimateInformed(Corrected):
    """A velocity field ``base + correction(x, t, cond)`` whose correction sees the base's estimate.

    The correction finds x̂_1, of the shape of x, among its conditions under the name `ESTIMATE`.
    """

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the velocity, of the shape of ``x``."""
        v = self.base(x, t, cond)
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        estimate = torch.addcmul(x, 1 - batch_time(t, x), v.to(x.dtype))
        return v + self.correction(x, t, {**(cond or {}), ESTIMATE: estimate})
