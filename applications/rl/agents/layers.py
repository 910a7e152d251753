r"""Layers of the agents' networks: perceptrons, whose Jacobian products need no graph.

Hidden layers are Linear -> GELU (tanh approximation) -> LayerNorm (eps 1e-6, where there is one),
in that order: the norm comes *after* the activation.  Weights start Xavier-uniform, U(-b, b) with
b² = 6 / (in + out), biases at zero.  These are the published choices (Li and Levine, 2601.14234);
PyTorch's defaults differ in each.
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

LAYER_NORM_EPS = 1e-6


def gelu(x: Tensor) -> Tensor:
    """Evaluate the tanh approximation of GELU, x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    if torch.compiler.is_compiling():  # where the logistic is fused with its neighbours
        return gelu_and_slope(x)[0]
    return functional.gelu(x, approximate="tanh")


def gelu_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate `gelu` and its derivative by the logistic s of 2√(2/π) (x + 0.044715 x³)."""
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
    """Make a linear layer with Xavier-uniform weights and zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def in_full(layer: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """Compute ``layer(x)``, an output, also under autocast in the precision of its ``weight``.

    A value of -200 has its neighbours in bfloat16 at -199 and -201, a whole step of reward away.
    """
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return layer(x)
    with torch.autocast(kind, enabled=False):
        return layer(x.to(weight.dtype))


def _held(layers: nn.ModuleList) -> tuple[list[Tensor], list[Tensor]]:
    """Return weights and biases of layers as constants."""
    weights = [cast(Tensor, layer.weight).detach() for layer in layers]
    return weights, [cast(Tensor, layer.bias).detach() for layer in layers]


def stacked_linear(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Apply weights to x (E, B, in): weights (E, in, out) and biases (E, 1, out).

    The bias is added to the product, where a compiler fuses it with what follows: `torch.baddbmm`
    copies it into the result first.  One output is a sum of products, which is fused too.
    """
    if weight.shape[-1] == 1:
        product = (x * weight.mT).sum(-1, keepdim=True)
    else:
        product = torch.bmm(x, weight)
    return product + bias.to(product.dtype)


def normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise x (..., n) as a layer norm does; return it and the scale (..., 1) of x in it."""
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    scale = (variance + LAYER_NORM_EPS).rsqrt()
    return (x - mean) * scale, scale


def pull_normalised(cotangent: Tensor, own: Tensor, scale: Tensor) -> Tensor:
    """Pull a cotangent (..., n) back through `normalised`, which gave ``own`` and ``scale``."""
    mean = cotangent.mean(-1, keepdim=True)
    along = (cotangent * own).mean(-1, keepdim=True)
    return scale * (cotangent - mean - own * along)


class MLP(nn.Module):
    """Perceptron that maps (..., sizes[0]) to (..., sizes[-1]), with a linear output.

    Arguments:
        sizes: widths from the input to the output.
        layer_norm: normalise after each activation.
        activate_last: the output is a hidden layer too.
        activation: `gelu` as a rule; `linearised` knows no other.

    Raises:
        ValueError: fewer than two sizes, or one that is not positive.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        layer_norm: bool = False,
        activate_last: bool = False,
        activation: Callable[[Tensor], Tensor] = gelu,
    ) -> None:
        super().__init__()
        self.activation = activation
        check_widths(sizes, "sizes")
        self.layers = nn.ModuleList(xavier_linear(m, n) for m, n in itertools.pairwise(sizes))
        self.hidden = len(self.layers) - (not activate_last)
        widths = sizes[1 : 1 + self.hidden] if layer_norm else ()
        self.norms = nn.ModuleList(nn.LayerNorm(n, eps=LAYER_NORM_EPS) for n in widths)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate outputs (..., sizes[-1]) at inputs (..., sizes[0])."""
        for i, layer in enumerate(self.layers):
            if i < self.hidden:
                x = self.activation(layer(x))
                if self.norms:
                    x = self.norms[i](x)
            else:
                x = in_full(layer, x, cast(Tensor, layer.weight))
        return x

    def linearised(self, x: Tensor) -> tuple[Tensor, Callable[[int, Tensor], Tensor]]:
        """Evaluate outputs (S, ..., sizes[-1]), and prepare (k, c) -> Jᵀ c with J at ``x[k]``.

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
                    normed.append(normalised(x))
                    x = torch.addcmul(shifts[i], normed[i][0], gains[i])

        def pull(k: int, cotangent: Tensor) -> Tensor:
            for i in reversed(range(len(weights))):
                if i < self.hidden:
                    if gains:
                        own, scale = (column[k] for column in normed[i])
                        cotangent = pull_normalised(cotangent * gains[i], own, scale)
                    cotangent = cotangent * slopes[i][k]
                product = partial(torch.matmul, other=weights[i])
                last = i == self.hidden
                cotangent = in_full(product, cotangent, weights[i]) if last else product(cotangent)
            return cotangent

        return x, pull
