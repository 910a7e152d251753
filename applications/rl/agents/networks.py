r"""Networks of the agents: critics, flow actors, one-step actors, tanh-Gaussian actors, values.

All are perceptrons (`applications.rl.agents.layers`).

The critics Q_1..Q_E are independent networks held as stacked weights (E, in, out), so that a layer
of all of them is one batched product; each is initialised by its own shape, not by that of the
stack.

A flow actor is a velocity field v(x, t, cond) with cond = {"observation": s} (`flows.field`), whose
input is [s, x, t] with the raw time.  The core's samplers, rollouts and adjoints take it as it is.

A tanh-Gaussian actor draws e = tanh(u), u = m(s) + σ(s) ε.  Its log-density is taken from u,

    log p(e) = Σ_d [log N(u_d; m_d, σ_d²) - 2 (log 2 - u_d - softplus(-2 u_d))],

where the second term is log(1 - tanh² u), written without cancellation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from applications.rl.agents.layers import (
    LAYER_NORM_EPS,
    MLP,
    check_widths,
    gelu,
    gelu_and_slope,
    in_full,
    normalised,
    pull_normalised,
    stacked_linear,
)
from flows import Cond

LOG_STD_RANGE = (-20.0, 2.0)
"""Limits of log σ in a tanh-Gaussian actor."""


class Critics(nn.Module):
    """Ensemble of E independent critics Q_i(s, a), held as one stack of weights.

    Arguments:
        observation_dim: size of s.
        chunk_dim: size of a, a flattened chunk of actions.
        hidden: widths of the hidden layers.
        members: E.
        layer_norm: normalise after each activation.

    Raises:
        ValueError: a size or ``members`` is not positive.
    """

    def __init__(
        self,
        observation_dim: int,
        chunk_dim: int,
        *,
        hidden: Sequence[int],
        members: int,
        layer_norm: bool = True,
    ) -> None:
        super().__init__()
        sizes = [observation_dim + chunk_dim, *hidden, 1]
        check_widths(sizes, "observation_dim + chunk_dim, hidden")
        if members < 1:
            raise ValueError(f"members must be at least 1, got {members}")
        self.members = members
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for m, n in itertools.pairwise(sizes):
            bound = math.sqrt(6 / (m + n))
            self.weights.append(nn.Parameter(torch.empty(members, m, n).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.zeros(members, 1, n)))
        widths = hidden if layer_norm else ()
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(members, 1, n)) for n in widths)
        self.shifts = nn.ParameterList(nn.Parameter(torch.zeros(members, 1, n)) for n in widths)

    def forward(
        self, observations: Tensor, actions: Tensor, *, stop_weight_gradient: bool = False
    ) -> Tensor:
        """Evaluate values (E, B) of observations (B, observation_dim) and actions (B, chunk_dim).

        Arguments:
            stop_weight_gradient: hold the weights constant: gradients reach the actions only,
                and the products for gradients of the weights are not computed.
        """

        def held(parameter: Tensor) -> Tensor:
            return parameter.detach() if stop_weight_gradient else parameter

        x = torch.cat([observations, actions], dim=-1).expand(self.members, -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            layer = partial(stacked_linear, held(weight), held(bias))
            if i == len(self.weights) - 1:
                x = in_full(layer, x, weight)
            else:
                x = gelu(layer(x))
                if len(self.scales):
                    x = functional.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
                    x = torch.addcmul(held(self.shifts[i]), x, held(self.scales[i]))
        return x.squeeze(-1)

    @torch.no_grad()
    def action_gradient(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Compute ∇_a mean_i Q_i(s, a), (B, chunk_dim); arguments as for a call.

        It is by hand, layer by layer, so that a policy that follows it can be exported: a program
        of `torch.export` holds no automatic differentiation.
        """
        x = torch.cat([observations, actions], dim=-1).expand(self.members, -1, -1)
        slopes, normed = [], []
        for i in range(len(self.weights) - 1):
            x, slope = gelu_and_slope(stacked_linear(self.weights[i], self.biases[i], x))
            slopes.append(slope)
            if len(self.scales):
                normed.append(normalised(x))
                x = torch.addcmul(self.shifts[i], normed[i][0], self.scales[i])
        cotangent = self.weights[-1].mT / self.members
        for i in reversed(range(len(slopes))):
            if len(self.scales):
                cotangent = pull_normalised(cotangent * self.scales[i], *normed[i])
            cotangent = torch.bmm(cotangent * slopes[i], self.weights[i].mT)
        return cotangent.sum(0)[:, observations.shape[1] :]


class TimedCritics(nn.Module):
    """Evaluates critics Q_i(s, x, t) of actions x that a flow has denoised up to time t.

    Arguments:
        observation_dim: size of s.
        chunk_dim: size of x, a flattened chunk of actions.
        hidden: widths of the hidden layers.
        members: E.

    Raises:
        ValueError: a size or ``members`` is not positive.
    """

    def __init__(
        self, observation_dim: int, chunk_dim: int, *, hidden: Sequence[int], members: int
    ) -> None:
        super().__init__()
        self.critics = Critics(observation_dim, chunk_dim + 1, hidden=hidden, members=members)

    def forward(
        self,
        observations: Tensor,
        actions: Tensor,
        t: Tensor | float = 1.0,
        *,
        stop_weight_gradient: bool = False,
    ) -> Tensor:
        """Evaluate values (E, B) at ``actions`` (B, chunk_dim) and times ``t``, a number or (B,).

        At t = 1 the actions are those that are executed.  Other arguments as for `Critics`.
        """
        timed = self._timed(actions, t)
        return self.critics(observations, timed, stop_weight_gradient=stop_weight_gradient)

    def action_gradient(
        self, observations: Tensor, actions: Tensor, t: Tensor | float = 1.0
    ) -> Tensor:
        """Compute ∇_x mean_i Q_i(s, x, t), (B, chunk_dim); arguments as for a call."""
        gradient = self.critics.action_gradient(observations, self._timed(actions, t))
        return gradient[:, : actions.shape[1]]

    def _timed(self, actions: Tensor, t: Tensor | float) -> Tensor:
        """Return actions with their times as a last column."""
        if not isinstance(t, Tensor):
            t = actions.new_full((), t)
        return torch.cat([actions, t.reshape(-1, 1).expand(actions.shape[0], 1)], dim=1)


class FlowActor(nn.Module):
    """Velocity field v(x, t, {"observation": s}) over flattened chunks of actions.

    Arguments:
        observation_dim: size of s.
        chunk_dim: size of x.
        hidden: widths of the hidden layers.
        layer_norm: normalise after each activation.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        observation_dim: int,
        chunk_dim: int,
        *,
        hidden: Sequence[int],
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.mlp = MLP([observation_dim + chunk_dim + 1, *hidden, chunk_dim], layer_norm=layer_norm)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Evaluate the velocity (B, chunk_dim) at ``x`` (B, chunk_dim) and ``t`` (scalar or (B,)).

        Raises:
            ValueError: ``cond`` is not {"observation": (B, observation_dim)}.
        """
        if cond is None or cond.keys() != {"observation"}:
            got = None if cond is None else sorted(cond)
            raise ValueError(f"cond must name exactly 'observation', got {got}")
        time = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        time = time.reshape(-1, 1).expand(x.shape[0], 1)
        return self.mlp(torch.cat([cond["observation"], x, time], dim=1))

    def linearised(
        self, x: Tensor, t: Tensor, cond: Cond
    ) -> tuple[Tensor, Callable[[int, Tensor], Tensor]]:
        """Evaluate velocities at states (S, B, chunk_dim), and prepare products with the Jacobians.

        The times are (S,).  See `flows.field`; states and conditions have no gradient.
        """
        s = cond["observation"].expand(*x.shape[:2], -1)
        time = t[:, None, None].expand(*x.shape[:2], 1)
        v, pull = self.mlp.linearised(torch.cat([s, x, time], dim=2))
        start, width = s.shape[2], x.shape[2]
        return v, lambda k, cotangent: pull(k, cotangent).narrow(1, start, width)

    @torch.no_grad()
    def zero_output(self) -> None:
        """Set the output layer to zero, so that the velocity is 0 everywhere."""
        for parameter in self.mlp.layers[-1].parameters():
            parameter.zero_()


class OneStepActor(nn.Module):
    """One-step policy g(s, z), which maps noise to a chunk of actions, unclipped.

    Arguments:
        observation_dim: size of s.
        chunk_dim: size of z and of the chunk.
        hidden: widths of the hidden layers.
        layer_norm: normalise after each activation.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        observation_dim: int,
        chunk_dim: int,
        *,
        hidden: Sequence[int],
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.mlp = MLP([observation_dim + chunk_dim, *hidden, chunk_dim], layer_norm=layer_norm)

    def forward(self, observations: Tensor, z: Tensor) -> Tensor:
        """Evaluate chunks (B, chunk_dim) at observations (B, obs) and z (B, chunk_dim)."""
        return self.mlp(torch.cat([observations, z], dim=1))


class DeterministicActor(nn.Module):
    """Deterministic policy μ(s) = tanh(f(s)), near 0 at first.

    Arguments:
        observation_dim: size of s.
        chunk_dim: size of the chunk.
        hidden: widths of the hidden layers.
        layer_norm: normalise after each activation.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        observation_dim: int,
        chunk_dim: int,
        *,
        hidden: Sequence[int],
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.mlp = MLP([observation_dim, *hidden, chunk_dim], layer_norm=layer_norm)
        with torch.no_grad():  # variance scaling by 0.01
            cast(Tensor, self.mlp.layers[-1].weight).mul_(0.1)

    def forward(self, observations: Tensor) -> Tensor:
        """Evaluate chunks (B, chunk_dim) in [-1, 1] at observations (B, observation_dim)."""
        return self.mlp(observations).tanh()


class TanhGaussianActor(nn.Module):
    """Tanh-Gaussian policy e = tanh(m(x) + σ(x) ε), with log σ limited to `LOG_STD_RANGE`.

    Arguments:
        input_dim: size of the input x.
        action_dim: size of e.
        hidden: widths of the hidden layers.

    Raises:
        ValueError: a size is not positive, or ``hidden`` is empty.
    """

    def __init__(self, input_dim: int, action_dim: int, *, hidden: Sequence[int]) -> None:
        super().__init__()
        self.trunk = MLP([input_dim, *hidden], activate_last=True)
        self.mean = MLP([hidden[-1], action_dim])
        self.log_std = MLP([hidden[-1], action_dim])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate mean and log σ of u, each (B, action_dim), for inputs (B, input_dim)."""
        features = self.trunk(x)
        return self.mean(features), self.log_std(features).clamp(*LOG_STD_RANGE)

    def sample(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Make the action e (B, action_dim) of noise ``eps`` (B, action_dim), and log p(e) (B,)."""
        mean, log_std = self(x)
        u = mean + log_std.exp() * eps
        return u.tanh(), tanh_gaussian_log_prob(u, mean, log_std)


def tanh_gaussian_log_prob(u: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return log p(tanh u) in nats, (B,), for u ~ N(mean, exp(log_std)²); arguments (B, d)."""
    normal = -0.5 * ((u - mean) * (-log_std).exp()).square() - log_std
    normal = normal - 0.5 * math.log(2 * math.pi)
    squash = 2 * (math.log(2) - u - functional.softplus(-2 * u))
    return (normal - squash).sum(-1)


class ValueNetwork(nn.Module):
    """Value V(s) of a state, as a network.

    Arguments:
        observation_dim: size of s.
        hidden: widths of the hidden layers.
        layer_norm: normalise after each activation.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(
        self, observation_dim: int, *, hidden: Sequence[int], layer_norm: bool = True
    ) -> None:
        super().__init__()
        self.mlp = MLP([observation_dim, *hidden, 1], layer_norm=layer_norm)

    def forward(self, observations: Tensor) -> Tensor:
        """Evaluate values (B,) of observations (B, observation_dim)."""
        return self.mlp(observations).squeeze(-1)
