"""A flow of the handwritten digits by a small perceptron.

The flow is a Gaussian plus what is not Gaussian: v = v_G + v_θ, where v_G is the closed-form
velocity of N(mean, covariance) of the images and v_θ a network that starts at zero.  Most of a
velocity in 64 dimensions is linear, and a small network need not learn that part: after 1000
updates 66 % of the samples are recognised with a probability above 0.8, against 47 % without v_G
(93 % of held-out images are).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from applications.toy2d.digits.data import DIM, Digits, gaussian_of, noisy_sampler
from flows import Callback, MLPVelocity, Residual, TrainerConfig, fit_flow


def make_flow(images: Tensor, *, width: int = 256, depth: int = 3, seed: int = 0) -> Residual:
    """Make the flow before training: the Gaussian of ``images`` (N, 64), and an MLP at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = MLPVelocity(DIM, hidden=[width] * depth, zero_init=True)
        return Residual(gaussian_of(images), network)


def fit_mlp(
    data: Digits,
    *,
    iterations: int,
    batch_size: int = 256,
    width: int = 256,
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    checkpoint: Path | None = None,
    resume: bool = False,
) -> nn.Module:
    """Train the flow on the training images; arguments are as in `flows.fit_flow`."""
    return fit_flow(
        make_flow(data.train, width=width, seed=seed),
        noisy_sampler(data.train),
        config=TrainerConfig(iterations=iterations, lr=4e-3, ema_decay=0.995, seed=seed),
        batch_size=batch_size,
        callbacks=callbacks,
        checkpoint=checkpoint,
        resume=resume,
        identity={
            "flow": "digits",
            "iterations": iterations,
            "batch_size": batch_size,
            "width": width,
            "seed": seed,
        },
    )
