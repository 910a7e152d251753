"""Fit a flow to samples: the flow-matching loss in the training loop of ``flows.training.trainer``.

Each iteration draws data x_1 from a sampler and noise x_0 ~ N(0, I), couples the two, and takes one
step on E || v(x_t, t) - (x_1 - x_0) ||^2 with x_t = t x_1 + (1 - t) x_0 (see ``flows.matching``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from flows.field import Cond, check_cond
from flows.matching import flow_matching_loss, independent, optimal_transport
from flows.training import distributed
from flows.training.callbacks import Callback, default_callbacks
from flows.training.config import TrainerConfig, learning_rate
from flows.training.divergence import TrainingDiverged
from flows.training.loss import Loss, LossFunction
from flows.training.trainer import Trainer
from flows.training.trainer_checkpoint import Identity

__all__ = [
    "COUPLINGS",
    "Identity",
    "Loss",
    "LossFunction",
    "Sampler",
    "Trainer",
    "TrainerConfig",
    "TrainingDiverged",
    "data_sampler",
    "fit_flow",
    "learning_rate",
]

Sampler = Callable[[int, torch.Generator], Tensor | tuple[Tensor, Cond]]

COUPLINGS = {"independent": independent, "optimal_transport": optimal_transport}


def data_sampler(data: Tensor, cond: Cond | None = None) -> Sampler:
    """Return a sampler that draws rows of ``data`` (N, *) with replacement.


    Arguments:
        data: samples, shape (N, *).
        cond: conditions of leading size N, drawn with their rows.

    Raises:
        ValueError: ``data`` is empty, has no batch dimension, or is not finite; or a condition has
            another leading size.
    """
    if data.ndim < 2 or not len(data):
        raise ValueError(f"data must have shape (N, *) with N >= 1, got {tuple(data.shape)}")
    if not data.isfinite().all():
        raise ValueError("data must be finite, got NaN or infinite entries")

    check_cond(cond, data)

    def sampler(n: int, generator: torch.Generator) -> Tensor | tuple[Tensor, Cond]:
        rows = torch.randint(len(data), (n,), generator=generator, device=generator.device)
        x = data[rows.to(data.device)]
        if cond is None:
            return x
        return x, {name: c[rows.to(c.device)] for name, c in cond.items()}

    return sampler


def fit_flow(
    field: nn.Module,
    sampler: Sampler,
    *,
    config: TrainerConfig = TrainerConfig(),  # noqa: B008  (frozen)
    batch_size: int = 512,
    coupling: Literal["independent", "optimal_transport"] = "independent",
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    identity: Identity | None = None,
) -> nn.Module:
    """Fit a flow: train ``field`` to transport N(0, I) to the samples; return the averaged field.

    Arguments:
        field: velocity network, trained in place.
        sampler: callable (n, generator) -> x1 (n, *), or (x1, cond) with cond of leading size n.
        config: see ``TrainerConfig``.
        batch_size: pairs per loss, of all processes together.
        coupling: how noise and data are paired, see ``flows.matching``; optimal transport within
            the minibatch (Tong et al. 2302.00482) straightens the flow, and spoils it as the base
            of a tilt.
        callbacks: see ``flows.training.callbacks``.
        progress: whether to show a bar; None shows one on a terminal, unless ``callbacks`` holds
            a `ProgressBar`.
        checkpoint: file, see ``Trainer``.
        resume: continue from the checkpoint if its file exists.
        identity: what the checkpoint belongs to.

    Raises:
        ValueError: unknown coupling or batch size below 1; otherwise as ``Trainer.fit``.
    """
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling must be one of {sorted(COUPLINGS)}, got {coupling!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")

    def loss(module: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        drawn = sampler(distributed.share(batch_size), generator)
        x1, cond = drawn if isinstance(drawn, tuple) else (drawn, None)
        x1 = x1.to(generator.device)
        x0 = torch.randn(x1.shape, dtype=x1.dtype, device=x1.device, generator=generator)
        x0, x1, permutation = COUPLINGS[coupling](x0, x1)
        if cond is not None:
            cond = {name: value.to(x1.device)[permutation] for name, value in cond.items()}
        return flow_matching_loss(module, x1, x0=x0, cond=cond, generator=generator)

    trainer = Trainer(
        field,
        loss,
        config,
        callbacks=default_callbacks(callbacks, progress=progress, description="fit_flow"),
        checkpoint=checkpoint,
        identity=identity,
    )
    return trainer.fit(resume=resume)
