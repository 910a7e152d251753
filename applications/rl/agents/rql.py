r"""RQL: critics of partially denoised actions, which a flow policy climbs one step at a time.

The critics Q(s, x, t) value a state x of the policy's own ODE dx/dt = v(x, t | s) at time t: the
return if the ODE is taken to its end and the action found there is executed.  Along a trajectory of
the ODE this value is one number, that of its end.  So the target of an action A of the data is the
target also of every state from which the ODE leads to A, and these are found by the ODE run
backwards from A.  With κ an expectile, w the weight of the window, and z normal noise,

    L     = L_Q + L_π,
    x_f   = A - ∫_f^1 v dt,  by K Euler steps of length d / K,     f = 1 - d,
    y     = R + γ^h m [mean Q̄(s', z, 0) - ρ sd Q̄(s', z, 0)],
    L_Q   = mean over critics and batch of w |κ - 1[δ < 0]| δ²,     δ = y - Q_i(s, x_f, f),
    L_π   = α mean_B w mean_d (v - (A - x_0))² - mean Q(s, x_t + l v, t + l),
    v     = v(x_t, t | s),      x_t = (1 - t) x_0 + t A,      l = min(1 / K, 1 - t).

A target needs no action at s', for noise has a value.  The policy climbs the critics through one
step of its ODE, not through all of them.  Half of the batch has a length d that is uniform on
[0, 1), the other half one of 0, 1/K, ..., 1.  Evaluated, the agent acts by the ODE of the target
policy; while it explores, by that of the policy.

Source: RQL (arXiv 2606.17551).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from applications.rl.agents.base import Agent, Shapes, Uniform
from applications.rl.agents.domains import by_domain
from applications.rl.agents.losses import (
    Term,
    bootstrap,
    critic_term,
    expectile_errors,
    pessimistic,
)
from applications.rl.agents.networks import TimedCritics
from applications.rl.agents.options import (
    AgentConfig,
    CriticOptions,
    Range,
    at_least,
    checked_option,
)
from applications.rl.agents.rollouts import Noise, condition, flow_action
from flows import VelocityField, frozen, interpolate

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch


@dataclass(frozen=True)
class RQLConfig(CriticOptions, AgentConfig):
    """Options of RQL."""

    alpha: float = checked_option(1.0, at_least(0.0))
    """Weight α of the imitation of the data."""
    expectile: float = checked_option(0.7, Range("in (0, 1)", lambda value: 0 < value < 1))
    """Expectile κ: above 1/2 the critics lean to the best outcomes."""
    target_policy_rate: float = checked_option(0.001, Range("in (0, 1]", lambda v: 0 < v <= 1))
    """Polyak rate at which the target policy follows the policy."""


class RQL(Agent):
    """RQL: critics of partially denoised actions, which a flow policy climbs step by step.

    Attributes:
        critic, target_critic: `TimedCritics`.
        policy, target_policy: `FlowActor`; the agent explores by the first and is evaluated by the
            second.
    """

    config: RQLConfig
    config_class = RQLConfig
    color = "#8fd14f"
    page = "docs/agents/rql.md"
    published = by_domain(
        alpha=(1, 3, 10, 0.1, 0.3, 1, 1, 1, 0.1, 0.3),
        expectile=(0.7, 0.7, 0.9, 0.5, 0.5, 0.9, 0.7, 0.9, 0.5, 0.5),
    )

    def __init__(self, config: RQLConfig, observation_dim: int, action_dim: int) -> None:
        super().__init__(config, observation_dim, action_dim)
        self.critic = TimedCritics(
            observation_dim, self.chunk_dim, hidden=config.hidden, members=config.critics
        )
        self.target_critic = frozen(self.critic)
        self.policy = self.flow_actor()
        self.target_policy = frozen(self.policy)

    def noise_shapes(self, batch_size: int) -> Shapes:
        """Declare the noises of the next values, of the reverse ODE and of the policy's loss."""
        chunk = (batch_size, self.chunk_dim)
        return {
            "next_action_noise": chunk,
            "reverse_length": Uniform((batch_size, 1)),
            "bc_x0": chunk,
            "bc_t": Uniform((batch_size, 1)),
        }

    def act_shapes(self, batch_size: int) -> Shapes:
        """Declare the start of the flow; the middle axis counts candidates, as for other agents."""
        return {"noise": (batch_size, 1, self.chunk_dim)}

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Term]:
        """Compute the terms of L = L_Q + L_π."""
        config, s, actions = self.config, batch.observations, self.flatten(batch.actions)
        lengths = reverse_lengths(noise["reverse_length"].squeeze(1), config.flow_steps)
        with torch.no_grad():
            states = reverse_flow(self.policy, s, actions, lengths, config.flow_steps)
            values = self.target_critic(batch.next_observations, noise["next_action_noise"], 0.0)
        y = bootstrap(batch, pessimistic(values, config.rho), config.window_discount)
        return {
            "critic": denoised_value_loss(
                self.critic, s, states, 1 - lengths, y, batch.valid, config.expectile
            ),
            "policy": one_step_ahead_loss(
                self.policy,
                self.critic,
                s,
                actions,
                batch.valid,
                noise,
                alpha=config.alpha,
                steps=config.flow_steps,
            ),
        }

    def chunks(self, observations: Tensor, noise: Noise) -> Tensor:
        """Run the ODE of the policy in training mode, else that of the target policy."""
        config, x = self.config, noise["noise"].squeeze(1)
        field = self.policy if self.training else self.target_policy
        return flow_action(field, observations, x, config.flow_steps, config.solver)


def reverse_lengths(uniform: Tensor, steps: int) -> Tensor:
    """Make the times d (B,) of the reverse ODE from numbers (B,) uniform on [0, 1).

    The first half of the batch keeps its numbers; the other half gets multiples of 1 / K, from 0 to
    1 and all as likely.

    Arguments:
        uniform: the numbers.
        steps: K.
    """
    half = len(uniform) // 2
    free, gridded = uniform[:half], uniform[half:]
    multiples = (gridded * (steps + 1)).floor().clamp_max(steps)
    return torch.cat([free, multiples / steps])


def reverse_flow(
    field: VelocityField, observations: Tensor, actions: Tensor, lengths: Tensor, steps: int
) -> Tensor:
    """Return the states (B, d) at times 1 - d from which the ODE leads to actions at time 1.

    Arguments:
        field: the velocity of the flow.
        observations: (B, observation_dim).
        actions: (B, d).
        lengths: times d (B,) that the ODE is run backwards.
        steps: K Euler steps, each of a K-th of a row's time.
    """
    cond, x, step = condition(observations), actions, lengths / steps
    for k in range(steps):
        x = x - step[:, None] * field(x, 1 - k * step, cond)
    return x


def denoised_value_loss(
    critic: TimedCritics,
    observations: Tensor,
    states: Tensor,
    times: Tensor,
    target: Tensor,
    valid: Tensor,
    expectile: float,
) -> Term:
    """Compute the asymmetric squared error of the critics at partially denoised actions.

    Arguments:
        critic: the network that is trained.
        observations: (B, observation_dim).
        states: x_f (B, chunk_dim), constants.
        times: f (B,).
        target: y (B,).
        valid: w (B,).
        expectile: κ.
    """
    values = critic(observations, states, times)
    return critic_term(values, expectile_errors(target - values, expectile), valid)


def one_step_ahead_loss(
    policy: VelocityField,
    critic: TimedCritics,
    observations: Tensor,
    actions: Tensor,
    valid: Tensor,
    noise: Noise,
    *,
    alpha: float,
    steps: int,
) -> Term:
    """Compute the loss of a flow that imitates the data and climbs the critics by one of its steps.

    Arguments:
        policy: the flow that is trained.
        critic: the online critics.
        observations: (B, observation_dim).
        actions: chunks of the data (B, chunk_dim).
        valid: w (B,); it weights the imitation alone.
        noise: ``bc_x0`` (B, chunk_dim) and ``bc_t`` (B, 1) in [0, 1).
        alpha: weight α of the imitation.
        steps: K; the step is 1 / K long, or shorter where it would pass time 1.
    """
    x0, t = noise["bc_x0"], noise["bc_t"].squeeze(1)
    x = interpolate(x0, actions, t)
    v = policy(x, t, condition(observations))
    imitation = (valid * (v - (actions - x0)).square().mean(1)).mean()
    step = (1 - t).clamp_max(1 / steps)
    ahead = x + step[:, None] * v
    q = critic(observations, ahead, t + step, stop_weight_gradient=True).mean()
    return alpha * imitation - q, {
        "actor/flow_loss": imitation.detach(),
        "actor/q_loss": -q.detach(),
    }
