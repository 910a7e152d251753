r"""Losses of the agents: pure functions that return a scalar and its metrics.

An agent adds them up.  Each trains one network and holds all others constant.  A window has the
observation s, the actions A flattened time-major, the discounted rewards R, the mask m after it,
the last valid next observation s', and the weight w = 0 if it crosses the end of an episode, else
1.  Q_i are the critics, Q̄_i their target networks, and sd is the population standard deviation
over the critics.

    critic_loss      mean over critics and batch of w (Q_i(s, A) - y)²
    value penalty    c [mean Q_i(s, clip x_K) - mean Q_i(s, A)]
    td_target        y = R + γ^h m [mean Q̄(s', a') - ρ sd Q̄(s', a')]
    behaviour_loss   mean_B [w mean_d (b(x_t, t | s) - (A - x_0))²],   x_t = (1 - t) x_0 + t A
    matching_loss    mean_B Σ_k ‖(2/σ_k) (f - b̄)(s, x_k, t_k) + σ_k a_k‖²  (the published kernel)
    one_step_loss    α mean (g(s, z) - clip ODE(s, z))² - mean Q(s, clip g(s, z))
    expectile_loss   mean |κ - 1[d < 0]| d²

`tilt_terms` are the three losses that QAM, QAM-E and QAM-F have in common: critic_loss,
behaviour_loss and matching_loss.  Losses of tanh-Gaussian actors are in
`applications.rl.agents.losses_gaussian`.

Only critic_loss and behaviour_loss weight windows by w.  Where a loss climbs Q, the critics are the
online ones and their weights are held constant.

Sources: Li and Levine, "Q-learning with adjoint matching" (arXiv 2601.14234); Park et al., "Flow
Q-learning" (arXiv 2502.02538); Kostrikov et al., "Offline reinforcement learning with implicit
Q-learning" (arXiv 2110.06169); Lipman et al., "Flow matching for generative modeling" (arXiv
2210.02747).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adjoint import (
    Adjoint,
    Reward,
    adjoint_matching_loss,
    lean_adjoint,
    scalar_adjoint,
    velocity_along,
)
from applications.rl.agents.bridge import Bridge
from applications.rl.agents.networks import Critics, OneStepActor, TimedCritics
from applications.rl.agents.options import MatchingOptions
from applications.rl.agents.rollouts import Noise, PolicyChain, PolicyFlow, condition
from applications.rl.agents.trust_region import TrustRegion
from flows import Cond, VelocityField, flow_matching_loss

if TYPE_CHECKING:
    from applications.rl.data.replay import Batch

Metrics = dict[str, Tensor]
Term = tuple[Tensor, Metrics]
"""One loss: the scalar to minimise, and detached scalar metrics."""


def pessimistic(values: Tensor, rho: float) -> Tensor:
    """Return mean - ρ sd over the critics, (E, B) -> (B,)."""
    mean = values.mean(0)
    return mean - rho * values.std(0, correction=0) if rho else mean


@torch.no_grad()
def bootstrap(batch: Batch, next_value: Tensor, discount: float) -> Tensor:
    """Return y = R + γ^h m V' (B,), without gradient.

    Arguments:
        batch: rewards R and masks m (B,).
        next_value: V' (B,), the value of the next observations.
        discount: γ^h, of a whole window.
    """
    return batch.rewards + discount * batch.masks * next_value


@torch.no_grad()
def td_target(
    target_critic: Critics | TimedCritics,
    batch: Batch,
    next_actions: Tensor,
    discount: float,
    rho: float,
) -> Tensor:
    """Return the temporal-difference target y (B,), without gradient.

    Arguments:
        target_critic: the target critics Q̄.
        batch: rewards R, masks m and next observations s'.
        next_actions: the policy's actions a' (B, chunk_dim).
        discount: γ^h, of a whole window.
        rho: pessimism ρ.
    """
    values = target_critic(batch.next_observations, next_actions)
    return bootstrap(batch, pessimistic(values, rho), discount)


def critic_loss(
    critic: Critics | TimedCritics,
    observations: Tensor,
    actions: Tensor,
    target: Tensor,
    valid: Tensor,
) -> Term:
    """Compute the squared temporal-difference error of the critics.

    Arguments:
        critic: the network that is trained.
        observations: (B, observation_dim).
        actions: chunks of the data (B, chunk_dim).
        target: y (B,), see `td_target`.
        valid: w (B,).
    """
    values = critic(observations, actions)
    return critic_term(values, (values - target).square(), valid)


def penalised_critic_term(
    critic: Critics,
    observations: Tensor,
    actions: Tensor,
    target: Tensor,
    valid: Tensor,
    policy_actions: Tensor,
    value_penalty: float,
) -> Term:
    """Compute `critic_loss` plus the value penalty, by one evaluation of the critics.

    The penalty lowers the critics at the policy's actions and raises them at the data's; windows
    are not weighted in it.

    Arguments:
        critic, observations, actions, target, valid: as in `critic_loss`.
        policy_actions: (B, chunk_dim) in [-1, 1], constants.
        value_penalty: weight c of the penalty.
    """
    rows = torch.cat([observations, observations])
    values, at_policy = critic(rows, torch.cat([actions, policy_actions])).chunk(2, dim=1)
    gap = at_policy.mean() - values.mean()
    loss, metrics = critic_term(values, (values - target).square(), valid)
    return loss + value_penalty * gap, {**metrics, "critic/value_gap": gap.detach()}


def critic_term(values: Tensor, errors: Tensor, valid: Tensor) -> Term:
    """Average errors (E, B) of critics, weighted by w (B,), and report their values (E, B)."""
    loss = (valid * errors).mean()
    seen = values.detach()
    return loss, {
        "critic/loss": loss.detach(),
        "critic/q_mean": seen.mean(),
        "critic/q_min": seen.amin(),
        "critic/q_max": seen.amax(),
        "critic/q_spread": seen.std(0, correction=0).mean(),
    }


def behaviour_loss(
    field: VelocityField, observations: Tensor, actions: Tensor, valid: Tensor, noise: Noise
) -> Term:
    """Compute the flow-matching error of a flow that imitates the actions of the data.

    Arguments:
        field: the flow that is trained.
        observations: (B, observation_dim).
        actions: chunks of the data (B, chunk_dim).
        valid: w (B,).
        noise: ``bc_x0`` (B, chunk_dim) and ``bc_t`` (B, 1) in [0, 1).
    """
    loss, _ = flow_matching_loss(
        field,
        actions,
        x0=noise["bc_x0"],
        t=noise["bc_t"].squeeze(1),
        cond=condition(observations),
        weights=valid,
    )
    return loss, {"actor/flow_loss": loss.detach()}


def critic_reward(critic: Critics, inverse_temperature: float, *, clip: bool = True) -> Reward:
    """Make the reward τ mean_i Q_i(s, x) of a tilt from critics of constant weights.

    Arguments:
        clip: evaluate the critics at x clipped to [-1, 1], so that the gradient is 0 outside.
    """

    def value(x: Tensor, cond: Cond | None) -> Tensor:
        assert cond is not None
        x = x.clamp(-1, 1) if clip else x
        return critic(cond["observation"], x, stop_weight_gradient=True).mean(0)

    return Reward(value, scale=inverse_temperature)


def tilt_reward(critic: Critics, target_critic: Critics, options: MatchingOptions) -> Reward:
    """Make the reward of an agent's tilt by its options, from the critics or the target critics."""
    chosen = target_critic if options.target_gradient else critic
    return critic_reward(chosen, options.inverse_temperature, clip=options.clip_terminal)


def chain_adjoint(
    flow: PolicyFlow, chain: PolicyChain, observations: Tensor, reward: Reward
) -> Adjoint:
    """Return the adjoint along a policy's chain or bridge, at observations (B, observation_dim).

    It is the lean one along a chain and the scalar one along a `Bridge`.
    """
    cond = condition(observations)
    _, gradient, _ = reward.value_and_gradient(chain.xs[-1], cond)
    if isinstance(chain.kernel, Bridge):
        return scalar_adjoint(flow.reference, chain.kernel, chain.xs, -gradient, cond)
    return lean_adjoint(flow.reference, chain.kernel, chain.xs, -gradient, cond)


def matching_loss(
    flow: PolicyFlow,
    chain: PolicyChain,
    observations: Tensor,
    reward: Reward,
    trust_region: TrustRegion | None = None,
) -> Term:
    """Compute the adjoint-matching error of a policy flow along its chain.

    Arguments:
        flow: the policy that is trained, and the behaviour it is compared with.
        chain: states of the policy, constants.
        observations: (B, observation_dim) of the chain.
        reward: the reward toward which the behaviour is tilted, see `tilt_reward`.
        trust_region: the temperature of the tilt, and the metrics of its dual ascent; None for
            the temperature 1.
    """
    kernel = chain.kernel
    adjoint = chain_adjoint(flow, chain, observations, reward)
    v = velocity_along(flow.velocity, chain.xs[:-1], kernel.t[:-1], condition(observations))
    tempered, dual = kernel, {}
    if trust_region is not None:
        tempered = trust_region.tempered(kernel)
        dual = trust_region.metrics(kernel, v - adjoint.v_base)
    loss, metrics = adjoint_matching_loss(v, adjoint, tempered)
    return loss, {
        "actor/matching_loss": loss.detach(),
        "actor/adjoint_norm": metrics["adjoint_norm"],
        "actor/control_norm": metrics["control_norm"],
        "actor/q_gradient": adjoint.values[-1].norm(dim=1).mean(),
        **dual,
    }


def tilt_terms(
    critic: Critics,
    flow: PolicyFlow,
    reward: Reward,
    chain: PolicyChain,
    batch: Batch,
    actions: Tensor,
    target: Tensor,
    noise: Noise,
    *,
    value_penalty: float = 0.0,
    trust_region: TrustRegion | None = None,
) -> dict[str, Term]:
    """Compute the losses of an agent that tilts its behaviour flow by adjoint matching.

    Arguments:
        critic: the online critics.
        flow: the policy and the behaviour that are trained.
        reward: the reward toward which the behaviour is tilted, see `tilt_reward`.
        chain: states of the policy at the observations, constants.
        batch: observations and weights of the windows.
        actions: chunks of the data (B, chunk_dim).
        target: y (B,), see `td_target`.
        noise: ``bc_x0`` and ``bc_t``, see `behaviour_loss`.
        value_penalty: weight of the penalty of the critics at the clipped ends of the chain; 0 is
            none, see `penalised_critic_term`.
        trust_region: of the policy, see `matching_loss`.

    Returns: ``critic``, ``behaviour`` and ``matching``.
    """
    s, w = batch.observations, batch.valid
    if value_penalty:
        ends = chain.xs[-1].clamp(-1, 1)
        of_critic = penalised_critic_term(critic, s, actions, target, w, ends, value_penalty)
    else:
        of_critic = critic_loss(critic, s, actions, target, w)
    return {
        "critic": of_critic,
        "behaviour": behaviour_loss(flow.behaviour, s, actions, w, noise),
        "matching": matching_loss(flow, chain, s, reward, trust_region),
    }


def one_step_loss(
    actor: OneStepActor,
    critic: Critics,
    observations: Tensor,
    z: Tensor,
    flow_actions: Tensor,
    alpha: float,
) -> Term:
    """Compute the loss of a one-step policy that imitates a flow's action and climbs the critics.

    The imitation is of the unclipped g.

    Arguments:
        actor: the policy g that is trained.
        critic: the online critics.
        observations: (B, observation_dim).
        z: noise (B, chunk_dim).
        flow_actions: the flow's actions from z (B, chunk_dim), without gradient.
        alpha: weight α of the imitation.
    """
    actions = actor(observations, z)
    distill = (actions - flow_actions).square().mean()
    q = critic(observations, actions.clamp(-1, 1), stop_weight_gradient=True).mean()
    return alpha * distill - q, {
        "actor/distill_loss": distill.detach(),
        "actor/q_loss": -q.detach(),
    }


def expectile_errors(differences: Tensor, expectile: float) -> Tensor:
    """Compute κ d² where d >= 0 and (1 - κ) d² elsewhere, for differences d of any shape."""
    squares = differences.square()
    return torch.where(differences >= 0, expectile * squares, (1 - expectile) * squares)


def expectile_loss(values: Tensor, targets: Tensor, expectile: float) -> Term:
    """Compute the asymmetric squared error that fits values (B,) to an expectile κ of targets.

    Targets are (B,).  With d = target - value the error is κ d² where d >= 0 and
    (1 - κ) d² elsewhere.
    """
    difference = targets - values
    loss = expectile_errors(difference, expectile).mean()
    return loss, {
        "value/loss": loss.detach(),
        "value/v_mean": values.detach().mean(),
        "value/advantage": difference.detach().mean(),
    }
