r"""Bridge states: where the scalar adjoint is matched, in place of the states of a chain.

The end x_1 is that of the policy's ODE.  States on straight lines to it from fresh noise,

    x_j = (1 - t_j) ε_j + t_j x_1,      t_j = j/K,   j = 1, ..., K,

need no chain.  The adjoint there is a_j = t_j a(1): the reward's gradient, evaluated once, and no
vector-Jacobian product.  The residual is that of the published Euler chain at these times,

    (2/g_j) (f - b̄)(x_j, t_j) + g_j a_j,      g_j² = 2 (1 - t_j + h)/(t_j + h),   h = 1/K,

and so is the path KL, Σ_j (2h/g_j²) ‖f - b̄‖².  It is not the exact tilt: the exact adjoint is t c_t
with c_t constant only where the behaviour's velocity does not depend on x.

Source: "SQAM" (arXiv 2610.10437).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adjoint import Kernel


@dataclass(frozen=True)
class Bridge(Kernel):
    """The table of the scalar adjoint at the K bridge times, which end with t = 1 twice."""

    def states(self, end: Tensor, eps: Tensor) -> Tensor:
        """Return the bridge states and their end, (K+1, B, d), from an end (B, d) and noise.

        Arguments:
            end: x_1 (B, d).
            eps: standard normal noise (K, B, d).
        """
        t = self.t[:-1].to(end.dtype)[:, None, None]
        return torch.cat([torch.lerp(eps, end, t), end[None]])


def make_bridge(steps: int) -> Bridge:
    """Make the table of K = ``steps`` bridge states."""
    h = 1 / steps
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    g = (2 * (1 - t + h) / (t + h)).sqrt()
    ones = torch.ones_like(t)
    return Bridge(
        name="bridge",
        t=torch.cat([t, t[-1:]]),
        mean_x=1 - h / (t + h),
        mean_v=2 * h * ones,
        std=h**0.5 * g,
        adjoint_t=t,
        adjoint_x=ones,
        adjoint_v=0 * ones,
        residual_v=2 / g,
        residual_a=g,
        adjoint_scale=torch.ones(steps + 1, dtype=torch.float64),
        residual_at_next=False,
        noiseless_last=False,
        own_time=(True,) * steps,
    )
