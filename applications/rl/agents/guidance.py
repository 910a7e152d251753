r"""Guidance: how critics steer a behaviour flow while it acts, without training a policy.

On the path x_t = (1 - t) x_0 + t x_1 with Gaussian x_0, a flow to the density p_1 has the velocity
[x + (1 - t) ∇ log p_t(x)] / t.  The densities exp(τ Q_t) have the score τ ∇Q_t, so the velocity
that leads to actions of large value is [x + (1 - t) τ ∇_x mean_i Q_i(s, x, t)] / t.  A fraction ϑ
of it is added to the velocity of the behaviour b̄:

    v(x, t | s) = b̄(x, t | s) + ϑ [x + (1 - t) τ ∇_x mean_i Q_i(s, x, t')] / t,

where t' is t if the critics know noisy actions, and 1, the time of finished actions, if they do
not.  At t = 0 the quotient has no value, and the first step of the ODE is that of b̄ alone.  Inside
the ODE x is not clipped.

Critics learn noisy actions x_t = (1 - t) ε + t A of the data from the value of the action A itself;
what they learn depends on the loss (`applications.rl.agents.cgql_mse`, `cgql_linex`).

Source: Li and Levine, "Q-learning with adjoint matching" (arXiv 2601.14234), baselines CGQL, CGQL-M
and CGQL-L, after Dhariwal and Nichol, "Diffusion models beat GANs on image synthesis" (arXiv
2105.05233).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from applications.rl.agents.networks import TimedCritics
from applications.rl.agents.options import above, at_least, checked_option
from applications.rl.agents.rollouts import FlowODE, Noise, Solver
from flows import Cond, VelocityField, interpolate


@dataclass(frozen=True)
class GuidanceOptions:
    """Options of the agents whose behaviour flow is guided by critics."""

    inverse_temperature: float = checked_option(10.0, above(0))
    """Inverse temperature τ: the factor of the critics' gradient."""
    guidance: float = checked_option(0.1, at_least(0.0))
    """Strength ϑ of the guidance; 0 is the behaviour itself."""


@dataclass(frozen=True)
class NoisyCriticOptions(GuidanceOptions):
    """Options of the agents whose critics know noisy actions."""

    noisy_weight: float = checked_option(0.1, at_least(0.0))
    """Weight c of the loss of the critics at noisy actions."""


@dataclass(frozen=True)
class GuidedFlow:
    """The velocity of a behaviour flow that critics guide.

    Attributes:
        behaviour: the flow b̄.
        critic: the critics; their weights are held constant.
        options: τ and ϑ.
        noisy: take the critics' gradient at the time t of the state rather than at time 1.
    """

    behaviour: VelocityField
    critic: TimedCritics
    options: GuidanceOptions
    noisy: bool

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Evaluate the velocity (B, d) at ``x`` (B, d) and t > 0, a scalar."""
        assert cond is not None
        options, time = self.options, t if self.noisy else 1.0
        gradient = self.critic.action_gradient(cond["observation"], x, time)
        toward = x + (1 - t) * options.inverse_temperature * gradient
        return self.behaviour(x, t, cond) + options.guidance * toward / t

    def action(self, observations: Tensor, x: Tensor, steps: int, solver: Solver) -> Tensor:
        """Return the clipped end (B, d) of the ODE from noise; arguments as for `FlowODE`."""
        ode = FlowODE(observations, x, steps, solver)
        ode.advance(self.behaviour(x, x.new_zeros(()), ode.cond))
        return ode.finish(self.velocity)


class NoisyValues(NamedTuple):
    """Values of noisy actions, and those of the actions that they were made from.

    Attributes:
        values: Q_i(s, x_t, t) (E, B), with gradient.
        targets: Q̄_i(s, A, 1) (E, B), without.
    """

    values: Tensor
    targets: Tensor


def noisy_values(
    critic: TimedCritics,
    target_critic: TimedCritics,
    observations: Tensor,
    actions: Tensor,
    noise: Noise,
) -> NoisyValues:
    """Evaluate critics at noisy actions of the data, and target critics at the actions themselves.

    Arguments:
        critic: the online critics.
        target_critic: the target critics.
        observations: (B, observation_dim).
        actions: chunks A of the data (B, chunk_dim).
        noise: ``noisy_eps`` (B, chunk_dim) and ``noisy_t`` (B, 1) in [0, 1).
    """
    t = noise["noisy_t"].squeeze(1)
    with torch.no_grad():
        targets = target_critic(observations, actions)
    noisy = interpolate(noise["noisy_eps"], actions, t)
    return NoisyValues(critic(observations, noisy, t), targets)
