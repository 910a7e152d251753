"""A flow of the handwritten digits by a small UNet, with or without class labels.

As in `mlp_flow` the velocity is the closed-form Gaussian of the images plus a network that starts
at zero.  States stay vectors of 64 pixels, the form that classifier, rewards and metrics take;
`OnImages` shows them to the network as images of 4×4 patches, with the four pixels of a patch as
channels, which costs half as much as pixels and one resolution more.  With labels, every tenth is
replaced in training by the label that stands for none, so that the flow can be guided.

A tilt toward a class moves whole images.  A perceptron added to the flow learns this sooner than
the convolutions do, and at less cost, since the flow then needs no gradient: `with_correction`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from applications.toy2d.digits.data import CLASSES, SIZE, Digits, add_noise, gaussian_of
from flows import (
    Callback,
    Cond,
    Guided,
    MLPVelocity,
    Residual,
    TrainerConfig,
    UNetVelocity,
    fit_flow,
)

PATCH = 2
"""Side of the patches, in pixels."""

UNLABELLED = 0.1
"""Fraction of the labels that are dropped in training."""


class OnImages(nn.Module):
    """A velocity field on vectors (B, 64) calls a network on their 2×2 patches (B, 4, 4, 4)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the velocity (B, 64)."""
        patches = functional.pixel_unshuffle(x.reshape(-1, 1, SIZE, SIZE), PATCH)
        return functional.pixel_shuffle(self.network(patches, t, cond), PATCH).flatten(1)


def make_flow(
    images: Tensor, *, widths: Sequence[int], labelled: bool = False, seed: int = 0
) -> Residual:
    """Make the flow before training: the Gaussian of ``images`` (N, 64), and a UNet at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = UNetVelocity(
            PATCH**2, widths=widths, classes=CLASSES if labelled else 0, zero_init=True
        )
    return Residual(gaussian_of(images), OnImages(network))


def fit_unet(
    data: Digits,
    *,
    widths: Sequence[int],
    labelled: bool,
    iterations: int,
    batch_size: int = 256,
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    checkpoint: Path | None = None,
    resume: bool = False,
) -> nn.Module:
    """Train the flow on the training images; arguments are as in `flows.fit_flow`."""

    def sampler(n: int, generator: torch.Generator) -> Tensor | tuple[Tensor, Cond]:
        rows = torch.randint(len(data.train), (n,), generator=generator)
        x = add_noise(data.train[rows], generator=generator)
        if not labelled:
            return x
        dropped = torch.rand(n, generator=generator) < UNLABELLED
        return x, {"label": data.train_labels[rows].masked_fill(dropped, CLASSES)}

    return fit_flow(
        make_flow(data.train, widths=widths, labelled=labelled, seed=seed),
        sampler,
        config=TrainerConfig(
            iterations=iterations, lr=2e-3, warmup=100, ema_decay=0.995, seed=seed
        ),
        batch_size=batch_size,
        callbacks=callbacks,
        checkpoint=checkpoint,
        resume=resume,
        identity={
            "flow": "digits, UNet",
            "widths": list(widths),
            "labelled": labelled,
            "iterations": iterations,
            "batch_size": batch_size,
            "seed": seed,
        },
    )


class Correction(nn.Module):
    """A perceptron (B, 64) starts at zero and sees the label, where there is one."""

    def __init__(self, *, labelled: bool, width: int = 256) -> None:
        super().__init__()
        dims = {"label": CLASSES} if labelled else None
        self.network = MLPVelocity(SIZE**2, hidden=[width] * 3, cond_dims=dims, zero_init=True)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the correction (B, 64)."""
        if cond is not None:
            cond = {"label": functional.one_hot(cond["label"], CLASSES).to(x.dtype)}
        return self.network(x, t, cond)


def with_correction(base: nn.Module, *, labelled: bool, seed: int = 0) -> Residual:
    """Add to a frozen copy of ``base`` a `Correction` to be trained."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Residual(base, Correction(labelled=labelled))


def guided(field: nn.Module, weight: float) -> Guided:
    """Apply classifier-free guidance of strength ``weight`` to a labelled flow."""
    return Guided(field, weight, {"label": torch.tensor([CLASSES])})


def draw_labels(n: int, generator: torch.Generator) -> Cond:
    """Draw ``n`` labels, every digit with the same probability."""
    return {"label": torch.randint(CLASSES, (n,), generator=generator)}
