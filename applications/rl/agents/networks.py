r"""The networks of the agents: critics, flow actors, one-step actors, tanh-Gaussian actors, values.

All are perceptrons whose hidden layers are Linear -> GELU (tanh approximation) -> LayerNorm (eps
1e-6, where there is one), in that order: the norm comes *after* the activation.  Weights start
Xavier-uniform, U(-b, b) with b² = 6 / (in + out), biases at zero.  These are the published choices
(Li and Levine, 2601.14234); PyTorch's defaults differ in each.

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

from flows import Cond

LAYER_NORM_EPS = 1e-6
LOG_STD_RANGE = (-20.0, 2.0)
"""Limits of log σ of a tanh-Gaussian actor."""


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    if torch.compiler.is_compiling():  # where the logistic is fused with its neighbours
        return gelu_and_slope(x)[0]
    return functional.gelu(x, approximate="tanh")


def gelu_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """`gelu` and its derivative, written by the logistic s of 2√(2/π) (x + 0.044715 x³)."""
    rate = x.new_full((), 2 * math.sqrt(2 / math.pi))
    cubic = 0.044715 * 2 * math.sqrt(2 / math.pi)
    s = torch.sigmoid(torch.addcmul(rate, x, x, value=cubic) * x)
    value = x * s
    return value, torch.addcmul(s, s, torch.addcmul(rate, x, x, value=3 * cubic) * (x - value))


def check_widths(sizes: Sequence[int], name: str) -> None:
    """Refuse layer sizes that are not positive.

    Raises:
        ValueError: ``sizes`` has fewer than two entries, or one that is not positive.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"{name} must be at least two positive layer sizes, got {tuple(sizes)}")


def xavier_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with Xavier-uniform weights and zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def in_full(layer: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """``layer(x)``, also under autocast in the precision of its ``weight``: for output layers.

    A value of -200 has its neighbours in bfloat16 at -199 and -201, a whole step of reward away.
    """
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return layer(x)
    with torch.autocast(kind, enabled=False):
        return layer(x.to(weight.dtype))


def _held(layers: nn.ModuleList) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of layers as constants."""
    weights = [cast(Tensor, layer.weight).detach() for layer in layers]
    return weights, [cast(Tensor, layer.bias).detach() for layer in layers]


def _stacked(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """x (E, B, in) through weights (E, in, out) and biases (E, 1, out).

    The bias is added to the product, where a compiler fuses it with what follows: `torch.baddbmm`
    copies it into the result first.  One output is a sum of products, which is fused too.
    """
    if weight.shape[-1] == 1:
        product = (x * weight.mT).sum(-1, keepdim=True)
    else:
        product = torch.bmm(x, weight)
    return product + bias.to(product.dtype)


class MLP(nn.Module):
    """Perceptron (..., sizes[0]) -> (..., sizes[-1]) with a linear output.

    Arguments:
        sizes: widths from the input to the output.
        layer_norm: normalise after each activation.
        activate_last: the output is a hidden layer too.

    Raises:
        ValueError: fewer than two sizes, or one that is not positive.
    """

    def __init__(
        self, sizes: Sequence[int], *, layer_norm: bool = False, activate_last: bool = False
    ) -> None:
        super().__init__()
        check_widths(sizes, "sizes")
        self.layers = nn.ModuleList(xavier_linear(m, n) for m, n in itertools.pairwise(sizes))
        self.hidden = len(self.layers) - (not activate_last)
        widths = sizes[1 : 1 + self.hidden] if layer_norm else ()
        self.norms = nn.ModuleList(nn.LayerNorm(n, eps=LAYER_NORM_EPS) for n in widths)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., sizes[-1]) for inputs (..., sizes[0])."""
        for i, layer in enumerate(self.layers):
            if i < self.hidden:
                x = gelu(layer(x))
                if self.norms:
                    x = self.norms[i](x)
            else:
                x = in_full(layer, x, cast(Tensor, layer.weight))
        return x

    def linearised(self, x: Tensor) -> tuple[Tensor, Callable[[int, Tensor], Tensor]]:
        """Outputs (S, ..., sizes[-1]), and (k, c) -> Jᵀ c with the Jacobian J at ``x[k]``.

        The weights are held constant.
        """
        weights, biases = _held(self.layers)
        gains, shifts = _held(self.norms)
        slopes, normed = [], []
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            layer = partial(functional.linear, weight=weight, bias=bias)
            if i == self.hidden:
                x = in_full(layer, x, weight)
            else:
                x, slope = gelu_and_slope(layer(x))
                slopes.append(slope)
                if gains:
                    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
                    scale = (variance + LAYER_NORM_EPS).rsqrt()
                    normed.append(((x - mean) * scale, scale))
                    x = torch.addcmul(shifts[i], normed[i][0], gains[i])

        def pull(k: int, cotangent: Tensor) -> Tensor:
            for i in reversed(range(len(weights))):
                if i < self.hidden:
                    if gains:
                        own, scale = (column[k] for column in normed[i])
                        cotangent = cotangent * gains[i]
                        mean = cotangent.mean(-1, keepdim=True)
                        along = (cotangent * own).mean(-1, keepdim=True)
                        cotangent = scale * (cotangent - mean - own * along)
                    cotangent = cotangent * slopes[i][k]
                product = partial(torch.matmul, other=weights[i])
                last = i == self.hidden
                cotangent = in_full(product, cotangent, weights[i]) if last else product(cotangent)
            return cotangent

        return x, pull


class Critics(nn.Module):
    """E independent critics Q_i(s, a) as one stack of weights.

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
        """Values (E, B) of observations (B, observation_dim) and actions (B, chunk_dim).

        Arguments:
            stop_weight_gradient: hold the weights constant: gradients reach the actions only,
                and the products for gradients of the weights are not computed.
        """

        def held(parameter: Tensor) -> Tensor:
            return parameter.detach() if stop_weight_gradient else parameter

        x = torch.cat([observations, actions], dim=-1).expand(self.members, -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            layer = partial(_stacked, held(weight), held(bias))
            if i == len(self.weights) - 1:
                x = in_full(layer, x, weight)
            else:
                x = gelu(layer(x))
                if len(self.scales):
                    x = functional.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
                    x = torch.addcmul(held(self.shifts[i]), x, held(self.scales[i]))
        return x.squeeze(-1)


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
        """Velocity (B, chunk_dim) at ``x`` (B, chunk_dim) and ``t`` (scalar or (B,)).

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
        """Velocities at states (S, B, chunk_dim) and times (S,), and products with the Jacobians.

        See `flows.field`; states and conditions have no gradient.
        """
        s = cond["observation"].expand(*x.shape[:2], -1)
        time = t[:, None, None].expand(*x.shape[:2], 1)
        v, pull = self.mlp.linearised(torch.cat([s, x, time], dim=2))
        start, width = s.shape[2], x.shape[2]
        return v, lambda k, cotangent: pull(k, cotangent).narrow(1, start, width)


class OneStepActor(nn.Module):
    """Map g(s, z) from noise to a chunk of actions, unclipped.

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
        """Chunks (B, chunk_dim) for observations (B, observation_dim) and z (B, chunk_dim)."""
        return self.mlp(torch.cat([observations, z], dim=1))


class TanhGaussianActor(nn.Module):
    """Policy e = tanh(m(x) + σ(x) ε), with log σ limited to `LOG_STD_RANGE`.

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
        """Mean and log σ of u, each (B, action_dim), for inputs (B, input_dim)."""
        features = self.trunk(x)
        return self.mean(features), self.log_std(features).clamp(*LOG_STD_RANGE)

    def sample(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Action e (B, action_dim) by the noise ``eps`` of its shape, and log p(e) (B,)."""
        mean, log_std = self(x)
        u = mean + log_std.exp() * eps
        return u.tanh(), tanh_gaussian_log_prob(u, mean, log_std)


def tanh_gaussian_log_prob(u: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log p(tanh u) in nats, (B,), for u ~ N(mean, exp(log_std)²); arguments (B, d)."""
    normal = -0.5 * ((u - mean) * (-log_std).exp()).square() - log_std
    normal = normal - 0.5 * math.log(2 * math.pi)
    squash = 2 * (math.log(2) - u - functional.softplus(-2 * u))
    return (normal - squash).sum(-1)


class ValueNetwork(nn.Module):
    """State value V(s).

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
        """Values (B,) of observations (B, observation_dim)."""
        return self.mlp(observations).squeeze(-1)
