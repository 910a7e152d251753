r"""Control variates of the lean adjoint, which remove noise that the model predicts.

The regression of adjoint matching sees one sample of the adjoint λ_k at each state, whose noise can
be many times the control itself where much is still undecided.  It comes from the steps that
follow, x_{j+1} = m_j + std_j ε_j, and most of it is known: the control says what the adjoint at
x_{j+1} is on average, Λ(x_{j+1}) = -(residual_v / residual_a) (v_θ - v_β), and so how it changes
with ε_j. The odd part of that change,

    C_{j+1} = ½ [Λ(m_j + std_j ε_j) - Λ(m_j - std_j ε_j)],    with -∇r as Λ at the last noisy step,

carried back like the adjoint itself, e_k = A_kᵀ (e_{k+1} + C_{k+1}) from e_K = 0, is taken from the
target, λ_k - e_k.  No expectation changes: given x_j, C_{j+1} is odd in ε_j and A_j is a function
of x_j, so that the mean of e_k at a state is zero whatever Λ is, and the fixed point is that of
adjoint matching.  What changes is the variance.  If Λ is the exact mean, then what is left of the
step's noise is even in ε_j, of second order in std_j: little on a fine grid, and less on a finer
one, though the first steps of a memoryless chain renew most of the noise on any grid.  At the base,
Λ is zero, and only the last step's noise is taken away.  Unlike in bootstrapping the model's error
is never taken for a target.

Importance weights w.  Under the tilted path distribution ε_j is neither centred nor symmetric, so
that w e has a mean, of the order of the step.  Only w λ is weighted therefore: the gradient of the
loss is that of w (residual_v (v_θ - v_β) + residual_a λ) - residual_a e (`adjoint.loss`).  A cap on
the terms of the loss would spoil the mean as well, and is refused.

Other kernels.  Where the residual of step k reads λ_{k+1}, the noise of step k is in it too, and so
C_{k+1} is added to e_{k+1}; Λ(x_{j+1}) is then the mean of λ_{j+2}, a little off.  Before a
noiseless last step Λ is -∇r at its end, without the Jacobian of that step.  Where the noise is
L(x_j) ε_j with a full covariance, the adjoint has a term odd in ε_j, from the derivative of L; C is
left out of that term, as their product would be even.

The price: a second pass of the adjoint, the model at K - 1 mirrored states and the base at twice as
many, each in one batch, and one more gradient of the reward.

Sources: antithetic variates as in Owen, "Monte Carlo theory", ch. 8; estimators without noise at
the optimum, Roeder et al. 1703.09194 ("sticking the landing").  The combination with the lean
adjoint was derived for this project.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adjoint.chain.conditional_covariance import scaled_noise
from adjoint.chain.kernels import Kernel
from adjoint.chain.rollout import Trajectory
from adjoint.evaluator import Evaluator
from flows.field import Cond, VelocityField


@torch.no_grad()
def control_variates(
    field: VelocityField | Evaluator,
    base: VelocityField | Evaluator,
    kernel: Kernel,
    trajectory: Trajectory,
    end: Tensor,
    terminal: Callable[[Tensor], Tensor],
    cond: Cond | None = None,
) -> Tensor:
    """Return the control variates C_1 … C_K (K, B, *) of a trajectory that ``field`` made.

    Arguments:
        field, base: velocity fields of the model and of the base, or evaluators of them.
        kernel: table of the chain.
        end: -∇r at the end of the trajectory, (B, *).
        terminal: function that returns -∇r at other states (B, *).
        cond: conditions with leading size B.
    """
    field, base = Evaluator.of(field), Evaluator.of(base)
    xs, noise = trajectory.xs, trajectory.noise
    noisy = kernel.steps - int(kernel.noiseless_last)  # C of a noiseless step is zero
    std, mean_x, mean_v, ratio = (
        column.to(xs.device, xs.dtype).reshape(-1, *([1] * (xs.ndim - 1)))
        for column in (
            kernel.std,
            kernel.mean_x,
            kernel.mean_v,
            kernel.residual_v / kernel.residual_a,
        )
    )
    grid = kernel.t.to(xs.device)
    roots = trajectory.roots
    kick = std * noise if roots is None else scaled_noise(roots, noise)
    mirrored = (xs[1:] - 2 * kick)[:noisy]
    other_end = mirrored[-1]
    if kernel.noiseless_last:
        v = base.along(other_end[None], grid[noisy:-1], cond).to(xs.dtype)[0]
        other_end = mean_x[-1] * other_end + mean_v[-1] * v
    last = (end - terminal(other_end))[None]
    rest = torch.zeros_like(xs[noisy + 1 :])
    if noisy == 1:
        return torch.cat([last / 2, rest])
    states = [xs[1:noisy], mirrored[:-1]]
    times = grid[1:noisy]
    v_base = base.along(torch.cat(states), times.repeat(2), cond).to(xs.dtype)
    there = field.along(states[1], times, cond).to(xs.dtype)
    own, other = (torch.cat([trajectory.v[1:noisy], there]) - v_base).chunk(2)
    return torch.cat([ratio[1:noisy] * (other - own) / 2, last / 2, rest])
