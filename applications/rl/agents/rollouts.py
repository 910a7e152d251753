r"""Rollouts: how the flow of an agent acts, alone, as the best of n, or together with its chain.

A flow acts by the end of dx/dt = v(x, t | s) from Gaussian noise, in K equal steps and clipped to
[-1, 1] at the end only.

A policy flow f that is the tilt of a behaviour flow b also runs the memoryless chain of
`adjoint.rollout`.  The chain and an ODE of K steps need f at the same times k / K, so one
evaluation of f on the states of both serves both (`chain_and_actions`).

The losses of an agent treat rollouts as constants: they are made first and without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adjoint import Kernel, rollout
from applications.rl.agents.bridge import Bridge
from flows import Cond, VelocityField

Noise = Mapping[str, Tensor]
Solver = Literal["euler", "ab2"]


@dataclass(frozen=True)
class PolicyChain:
    """States ``xs`` (K+1, B, chunk_dim) of a policy's chain or bridge, and its ``kernel``."""

    kernel: Kernel
    xs: Tensor


class Rollouts(NamedTuple):
    """Rollouts of a policy flow at a batch, which its losses treat as constants.

    Attributes:
        next_actions: (B, chunk_dim) the policy's actions at the next observations.
        chain: the memoryless chain at the observations.
        flow_actions: (B, chunk_dim) the flow's actions at the observations, to imitate or to edit;
            None where they are not used.
    """

    next_actions: Tensor
    chain: PolicyChain
    flow_actions: Tensor | None = None


def condition(observations: Tensor) -> Cond:
    """Name observations (B, observation_dim) as the condition of a flow actor."""
    return {"observation": observations}


class FlowODE:
    """The ODE of a flow under way, after some of its steps.

    Agrees with `flows.sample` on a uniform grid, but is differentiable, never waits for the device,
    and takes each step when it is told to.

    Arguments:
        observations: (B, observation_dim).
        x: noise (B, d).
        steps: K.
        solver: Euler as published, or two-step Adams-Bashforth (first step Euler), which is of
            second order at the same cost.

    Attributes:
        x: state (B, d) at time k / K.
        k: steps taken.
        cond: condition of the field.
    """

    def __init__(
        self, observations: Tensor, x: Tensor, steps: int, solver: Solver = "euler"
    ) -> None:
        self.cond, self.x, self.k = condition(observations), x, 0
        self.steps, self.solver = steps, solver
        self._previous: Tensor | None = None

    def joined(self, observations: Tensor, x: Tensor) -> FlowODE:
        """Return this ODE and that from ``x`` at ``observations``, in later rows, at their start.

        Raises:
            ValueError: steps have been taken already.
        """
        if self.k:
            raise ValueError(f"an ODE must be joined at its start, got {self.k} steps taken")
        rows = torch.cat([self.cond["observation"], observations])
        return FlowODE(rows, torch.cat([self.x, x]), self.steps, self.solver)

    def advance(self, v: Tensor) -> None:
        """Take a step, given the velocity (B, d) at ``x`` and time k / K."""
        previous, self._previous = self._previous, v
        move = v if self.solver == "euler" or previous is None else 1.5 * v - 0.5 * previous
        self.x = self.x + move / self.steps
        self.k += 1

    def finish(self, field: VelocityField) -> Tensor:
        """Take the steps that are left with ``field`` and return the action (B, d), clipped."""
        while self.k < self.steps:
            t = torch.full((), self.k / self.steps, dtype=self.x.dtype, device=self.x.device)
            self.advance(field(self.x, t, self.cond))
        return self.x.clamp(-1, 1)


def flow_action(
    field: VelocityField, observations: Tensor, x: Tensor, steps: int, solver: Solver = "euler"
) -> Tensor:
    """Return the action (B, d) of a flow from noise ``x``; arguments as for `FlowODE`."""
    return FlowODE(observations, x, steps, solver).finish(field)


def candidates(observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Give each of n candidates a row: observations (B, obs) and noise (B, n, d) in n·B rows.

    Row b·n + j is candidate j of observation b, so that values (E, n·B) become (E, B, n) by `view`.
    """
    n = noise.shape[1]
    rows = observations if n == 1 else observations.repeat_interleave(n, dim=0)
    return rows, noise.flatten(0, 1)


def ensemble_mean(values: Tensor) -> Tensor:
    """Return the mean over the critics, (E, B) -> (B,)."""
    return values.mean(0)


def ensemble_minimum(values: Tensor) -> Tensor:
    """Return the least of the critics, (E, B) -> (B,)."""
    return values.amin(0)


def best_of(
    critic: Callable[[Tensor, Tensor], Tensor],
    rows: Tensor,
    actions: Tensor,
    n: int,
    rank: Callable[[Tensor], Tensor] = ensemble_mean,
) -> Tensor:
    """Choose the first-ranked of n candidates (n·B, d) for each observation: (B, d).

    Arguments:
        critic: gives values (E, n·B); it is not evaluated where n is 1.
        rows: observations (n·B, observation_dim) of the candidates, see `candidates`.
        actions: the candidates.
        n: candidates an observation.
        rank: makes one score (n·B,) of the values.
    """
    if n == 1:
        return actions
    best = rank(critic(rows, actions)).reshape(-1, n).argmax(1)
    index = best[:, None, None].expand(-1, 1, actions.shape[1])
    return actions.reshape(-1, n, actions.shape[1]).gather(1, index).squeeze(1)


def first_ranked(
    propose: Callable[[Tensor, Noise], Tensor],
    critic: Callable[[Tensor, Tensor], Tensor],
    observations: Tensor,
    noise: Noise,
    rank: Callable[[Tensor], Tensor] = ensemble_mean,
) -> Tensor:
    """Propose n actions for each observation, and return the first-ranked of each, (B, d).

    Arguments:
        propose: makes actions (n·B, d) of observations (n·B, observation_dim) and noise (n·B, ...).
        critic: gives values (E, n·B); it is not evaluated where n is 1.
        observations: (B, observation_dim).
        noise: the noises (B, n, ...) of the candidates by name.
        rank: makes one score (n·B,) of the values.
    """
    first = next(iter(noise.values()))
    rows, _ = candidates(observations, first)
    own = {name: value.flatten(0, 1) for name, value in noise.items()}
    return best_of(critic, rows, propose(rows, own), first.shape[1], rank)


def stop_weight_gradient(network: nn.Module) -> VelocityField:
    """Return the network as a velocity field of constant weights: gradients reach x only."""
    if not any(parameter.requires_grad for parameter in network.parameters()):
        return network

    def velocity(x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        held = {name: p.detach() for name, p in network.named_parameters()}
        return functional_call(network, held, (x, t, cond))

    return velocity


@dataclass(frozen=True)
class PolicyFlow:
    """The velocity of a policy f that is the tilt of a behaviour flow b.

    With ``residual`` f is a correction: the chain's velocity is b̄ + f, that of acting b + f, as
    published.  Gradients reach f and x, never the weights of b and b̄.

    Attributes:
        policy: network of f.
        behaviour: network of b.
        target_behaviour: target network b̄, or None where f is compared with b itself.
        residual: whether f is a correction.
    """

    policy: nn.Module
    behaviour: nn.Module
    target_behaviour: nn.Module | None
    residual: bool = False

    @property
    def reference(self) -> nn.Module:
        """Return the flow with which the policy is compared: b̄ if there is one, else b."""
        return self.behaviour if self.target_behaviour is None else self.target_behaviour

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Evaluate the policy's velocity in the chain, of the shape of ``x``."""
        return self._on(self.reference, self.policy(x, t, cond), x, t, cond)

    def acting_velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Evaluate the policy's velocity when it acts, of the shape of ``x``."""
        return self._on(self.behaviour, self.policy(x, t, cond), x, t, cond)

    def shared_velocity(self, ode: FlowODE) -> VelocityField:
        """Return `velocity` for a chain that starts with ``ode``, which each call moves a step too.

        The ODE moves by `acting_velocity`.  One evaluation of f serves both.
        """

        def velocity(x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
            assert cond is not None
            rows = {name: torch.cat([c, ode.cond[name]]) for name, c in cond.items()}
            f = self.policy(torch.cat([x, ode.x]), t, rows)
            own, others = f.split([len(x), len(ode.x)])
            ode.advance(self._on(self.behaviour, others, ode.x, t, ode.cond))
            return self._on(self.reference, own, x, t, cond)

        return velocity

    def _on(self, base: nn.Module, f: Tensor, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        return f + stop_weight_gradient(base)(x, t, cond) if self.residual else f


@torch.no_grad()
def chain_and_actions(
    flow: PolicyFlow, kernel: Kernel, observations: Tensor, noise: Noise, ode: FlowODE
) -> tuple[PolicyChain, Tensor]:
    """Run the chain of a policy and its ODE, with one evaluation of f for both at each time.

    A `Bridge` has no chain: its states are made from the ends of the policy's ODE from ``sde_x0``,
    not clipped, with the noise ``sde_eps``.

    Arguments:
        flow: the policy.
        kernel: of K steps.
        observations: (B, observation_dim) of the chain.
        noise: ``sde_x0`` (B, chunk_dim) and ``sde_eps`` (K, B, chunk_dim) of the chain.
        ode: the ODE at its start, at observations of its own.

    Returns: the chain, and the actions of the ODE.
    """
    cond, x0, eps = condition(observations), noise["sde_x0"], noise["sde_eps"]
    if isinstance(kernel, Bridge):
        both = ode.joined(observations, x0)
        actions = both.finish(flow.acting_velocity)[: -len(x0)]
        return PolicyChain(kernel, kernel.states(both.x[-len(x0) :], eps)), actions
    xs = rollout(flow.shared_velocity(ode), flow.reference, kernel, x0, eps, cond).xs
    # A noiseless last step follows the reference, and leaves that of the ODE to be taken.
    return PolicyChain(kernel, xs), ode.finish(flow.acting_velocity)
