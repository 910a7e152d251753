r"""Diffusion policies: the network that predicts the noise, its loss, and the sampler of DDPM.

An action A of the data is noised in T steps,

    x_t = √ᾱ_t A + √(1 - ᾱ_t) ε,      t = 1, ..., T,      ε normal,

by the variance-preserving (VP) schedule, whose β_t = 1 - exp(-0.1/T - 4.95 (2t - 1)/T²) have the
product ᾱ_t = Π (1 - β_s) in closed form:

    ᾱ_t = exp(-0.1 t/T - 4.95 (t/T)²),      ᾱ_0 = 1,      α_t = 1 - β_t = ᾱ_t / ᾱ_{t-1}.

The network ε_θ(x, t | s) is fitted to ε by squared error, together with a guidance g that an agent
makes of ε_θ and of the critics' gradient, both at the noised actions x_t:

    L_π = α mean_B (mean_d (ε - ε_θ)²)^w + mean_B g^w.

The weight w of a window is an exponent, as published: a window of weight 0 has a constant 1 in
place of each term.  Its gradient is that of a factor w.

A step of the sampler goes from x_t to x_{t-1} = μ + 1[t > 1] √β_t z, with the prediction of the
action x̂ = (x_t - √(1 - ᾱ_t) ε_θ) / √ᾱ_t and one of two means μ:

    the posterior's   μ = [√ᾱ_{t-1} β_t clip(x̂) + √α_t (1 - ᾱ_{t-1}) x_t] / (1 - ᾱ_t),
    the prediction    μ = x̂, where x_{t-1} is clipped at each step.

Both end within [-1, 1].

Sources: Ho et al., "Denoising diffusion probabilistic models" (arXiv 2006.11239), eqs. 4, 7 and 14;
schedule and weights as in the code of Li and Levine (arXiv 2601.14234).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from applications.rl.agents.base import Shapes, Uniform
from applications.rl.agents.layers import MLP
from applications.rl.agents.losses import Term
from applications.rl.agents.rollouts import Noise

FOURIER_DEVIATION = 0.2
"""Standard deviation of the initial frequencies."""

Fraction = TypeVar("Fraction", float, Tensor)


def log_signal(fraction: Fraction) -> Fraction:
    """Return log ᾱ at the fraction t/T of the schedule."""
    return -(0.1 * fraction + 4.95 * fraction**2)


class NoisePredictor(nn.Module):
    """Predicts the noise ε_θ(x, t | s) in a noised chunk of actions.

    The time enters by learnt frequencies f, as cos(2π f t) and sin(2π f t), and a perceptron of its
    own.

    Arguments:
        observation_dim: size of s.
        chunk_dim: size of x.
        hidden: widths of the hidden layers; the perceptron of the time has them as layers too.
        time_features: number of cosines and sines, even.
        layer_norm: normalise after each activation of the prediction.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        observation_dim: int,
        chunk_dim: int,
        *,
        hidden: Sequence[int],
        time_features: int,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(FOURIER_DEVIATION * torch.randn(time_features // 2))
        self.time = MLP([time_features, *hidden], activation=functional.mish)
        self.mlp = MLP(
            [chunk_dim + observation_dim + hidden[-1], *hidden, chunk_dim],
            layer_norm=layer_norm,
            activation=functional.mish,
        )

    def forward(self, x: Tensor, t: Tensor, observations: Tensor) -> Tensor:
        """Evaluate the noise (B, chunk_dim) in ``x`` (B, chunk_dim) at the steps t (B,), 1 to T."""
        angles = 2 * math.pi * t[:, None] * self.frequencies
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=1))
        return self.mlp(torch.cat([x, observations, time], dim=1))


def acting_shapes(batch_size: int, chunk_dim: int, steps: int) -> Shapes:
    """Declare the noises of `ddpm_action`: its start, and that of all steps but the last."""
    return {
        "noise": (batch_size, 1, chunk_dim),
        "ddpm_z": (batch_size, steps - 1, chunk_dim),
    }


def update_shapes(batch_size: int, chunk_dim: int, steps: int) -> Shapes:
    """Declare the noises of the next actions, and of the noised actions of the policy's loss."""
    return {
        "next_action_noise": (batch_size, 1, chunk_dim),
        "next_ddpm_z": (batch_size, steps - 1, chunk_dim),
        "denoise_t": Uniform((batch_size, 1)),
        "denoise_eps": (batch_size, chunk_dim),
    }


def noised(actions: Tensor, noise: Noise, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise actions (B, d) to x_t (B, d) at random steps; return x_t, t (B,) and √(1 - ᾱ_t) (B, 1).

    Arguments:
        actions: chunks of the data.
        noise: ``denoise_eps`` (B, d), and ``denoise_t`` (B, 1) in [0, 1), of which steps from 1 to
            T are made, all as likely.
        steps: T.
    """
    t = (noise["denoise_t"] * steps).floor().clamp_max(steps - 1) + 1
    signal = log_signal(t / steps).exp()
    deviation = (1 - signal).sqrt()
    x = signal.sqrt() * actions + deviation * noise["denoise_eps"]
    return x, t.squeeze(1), deviation


def denoising_loss(
    predicted: Tensor, eps: Tensor, guidance: Tensor, valid: Tensor, alpha: float
) -> Term:
    """Compute the error of a predicted noise, with the guidance of the critics.

    Arguments:
        predicted: ε_θ (B, d) at the noised actions.
        eps: ε (B, d), the noise in them.
        guidance: g (B,).
        valid: w (B,), 0 or 1; it is an exponent, see the module docstring.
        alpha: weight α of the imitation.
    """
    imitation = (eps - predicted).square().mean(1).pow(valid).mean()
    guiding = guidance.pow(valid).mean()
    return alpha * imitation + guiding, {
        "actor/denoising_loss": imitation.detach(),
        "actor/guidance_loss": guiding.detach(),
    }


def ddpm_action(
    network: NoisePredictor, observations: Tensor, noise: Noise, steps: int, *, posterior: bool
) -> Tensor:
    """Return the actions (B, d) in [-1, 1] of a diffusion, by T steps from noise.

    Arguments:
        network: ε_θ.
        observations: (B, observation_dim).
        noise: ``noise`` (B, 1, d), the start, and ``ddpm_z`` (B, T-1, d), added after each step but
            the last.
        steps: T.
        posterior: go to the posterior's mean, or else to the predicted action.
    """
    x, z = noise["noise"].squeeze(1), noise["ddpm_z"]
    for t in range(steps, 0, -1):
        level, before = (math.exp(log_signal(s / steps)) for s in (t, t - 1))
        alpha = level / before
        eps = network(x, x.new_full((x.shape[0],), t), observations)
        action = (x - math.sqrt(1 - level) * eps) / math.sqrt(level)
        if posterior:
            kept = math.sqrt(alpha) * (1 - before) / (1 - level)
            x = math.sqrt(before) * (1 - alpha) / (1 - level) * action.clamp(-1, 1) + kept * x
        else:
            x = action
        if t > 1:
            x = x + math.sqrt(1 - alpha) * z[:, steps - t]
        if not posterior:
            x = x.clamp(-1, 1)
    return x
