r"""Control variates for the lean adjoint: less noise the better the model, and none at the optimum.

The regression of adjoint matching sees one sample of the adjoint λ_k at each state, whose noise is
many times the control itself where much is still undecided.  That noise comes from the steps that
follow, x_{j+1} = m_j + std_j ε_j, and most of it is known: the control says what the adjoint at
x_{j+1} is on average, Λ(x_{j+1}) = -(read_v / read_a) (v_θ - v_β), and so how it changes with ε_j.
Subtracting from λ_{j+1} the odd part of that change,

    C_{j+1} = ½ [Λ(m_j + std_j ε_j) - Λ(m_j - std_j ε_j)],        C_K with Λ = -∇r,

before it is carried on, λ_k = A_kᵀ (λ_{k+1} - C_{k+1}), changes no expectation: given x_j, C_{j+1}
is odd in ε_j and A_j a function of x_j, so its mean is zero whatever Λ is, and with it the fixed
point is that of adjoint matching itself.  What it changes is the variance.  Where Λ is the exact
conditional mean, λ_{j+1} - C_{j+1} depends on ε_j only by even terms, of second order in std_j, so
that the noise vanishes at the optimum as the grid becomes fine, as that of the log-variance loss
does (`adjoint.loss`); at the base, where Λ = 0 but for the last step, nothing is subtracted.  In
contrast to bootstrapping, an error of the model is never taken for a target.

With importance weights the mean of C_{j+1} is that of ε_j under the tilted path law, which is
(u* - u)_j: zero at the optimum too, but not on the way there.  Where the noise is L(x_j) ε_j with a
full covariance, the derivative of L enters the adjoint as a term odd in ε_j of its own
(`adjoint.covariance`); C is left out of that term, as their product would be even.

The price is the model at K - 1 mirrored states, in one batch, and the gradient of one more reward.

Sources: antithetic variates as in Owen, "Monte Carlo theory", ch. 8; estimators without noise at
the optimum, Roeder et al. 1703.09194 ("sticking the landing").  The combination with the lean
adjoint was derived for this project.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adjoint.kernel import Kernel
from adjoint.rollout import Trajectory, velocity_along
from flows.field import Cond, VelocityField


@torch.no_grad()
def control_variates(
    field: VelocityField,
    base: VelocityField,
    kernel: Kernel,
    trajectory: Trajectory,
    terminal: Callable[[Tensor], Tensor],
    cond: Cond | None = None,
    *,
    micro_batch: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """C_1 … C_K, (K, B, *), of a trajectory that ``field`` made; see the module docstring.

    Arguments:
        terminal: -∇r at states (B, *), of their shape.
        cond: conditions with leading size B.
        micro_batch, device: see `adjoint.rollout`.
    """
    xs, noise = trajectory.xs, trajectory.noise
    noisy = kernel.steps - int(kernel.noiseless_last)  # C of a noiseless step is zero
    std, mean_x, mean_v, ratio = (
        column.to(xs.device, xs.dtype).reshape(-1, *([1] * (xs.ndim - 1)))
        for column in (kernel.std, kernel.mean_x, kernel.mean_v, kernel.read_v / kernel.read_a)
    )
    if trajectory.roots is None:
        kick = std * noise
    else:
        kick = (trajectory.roots @ noise.flatten(2).unsqueeze(3)).reshape(noise.shape)
    mirrored = (xs[1:] - 2 * kick)[:noisy]

    def along(field: VelocityField, states: Tensor, times: Tensor) -> Tensor:
        v = velocity_along(field, states, times, cond, micro_batch=micro_batch, device=device)
        return v.to(xs.dtype)

    end = mirrored[-1]
    if kernel.noiseless_last:
        end = mean_x[-1] * end + mean_v[-1] * along(base, end[None], kernel.t[noisy:-1])[0]
    last = (terminal(xs[-1]) - terminal(end))[None]
    rest = torch.zeros_like(xs[noisy + 1 :])
    if noisy == 1:
        return torch.cat([last / 2, rest])
    states = [xs[1:noisy], mirrored[:-1]]
    times = kernel.t[1:noisy]
    v_base = along(base, torch.cat(states), times.repeat(2))
    there = along(field, states[1], times)
    own, other = (torch.cat([trajectory.v[1:noisy], there]) - v_base).chunk(2)
    return torch.cat([ratio[1:noisy] * (other - own) / 2, last / 2, rest])
