"""The arguments of a tilt, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from adjoint.config import TiltConfig
from adjoint.evaluator import Evaluator, RewardEvaluator
from adjoint.rewards.reward import AbstractReward, ValueFunction, as_reward
from adjoint.trajectory_source import CondSampler
from flows.field import VelocityField, frozen
from flows.training import distributed
from flows.training.callbacks import Callback, ProgressBar, check_callbacks
from flows.training.checkpoint import ensure_writable
from flows.training.sharding import is_sharded


@dataclass(frozen=True)
class Arguments:
    """Checked arguments of a tilt.

    Attributes:
        base: velocity field that is frozen and on ``device``.
        reward: scaled reward, r / temperature.
        shape: shape of one sample, without the batch.
        config: options of the tilt.
        cond_sampler: draws conditions for n samples; None for an unconditional flow.
        device, dtype: of the SDE state.
        progress: True where progress bars are shown.
    """

    base: VelocityField
    reward: AbstractReward
    shape: tuple[int, ...]
    config: TiltConfig
    cond_sampler: CondSampler | None
    device: torch.device
    dtype: torch.dtype
    progress: bool

    def evaluator(self, field: VelocityField) -> Evaluator:
        """Return the evaluator of a field in the micro-batches of the options."""
        return Evaluator(field, self.config.micro_batch)

    @property
    def reward_evaluator(self) -> RewardEvaluator:
        """Return the evaluator of the reward in the batches of the options."""
        return RewardEvaluator(self.reward, self.config.reward_batch)


def check_arguments(
    base: VelocityField,
    reward: ValueFunction,
    *,
    shape: tuple[int, ...],
    config: TiltConfig | None,
    model: nn.Module | None,
    cond_sampler: CondSampler | None,
    callbacks: Sequence[Callback],
    checkpoint: str | Path | None,
    resume: bool,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> Arguments:
    """Refuse arguments of `adjoint.tilt` that do not fit; freeze the base; join the processes.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and what was expected.
        OSError: the checkpoint cannot be written.
    """
    config = TiltConfig() if config is None else config
    if not isinstance(config, TiltConfig):
        raise TypeError(f"config must be a TiltConfig, got {type(config).__name__}")
    if not isinstance(shape, tuple | list) or not all(isinstance(n, int) for n in shape):
        raise ValueError(f"shape must be a tuple of sizes such as (2,), got {shape!r}")
    if not shape:
        raise ValueError("shape must have a dimension, got (): numbers are vectors of shape (1,)")
    if cond_sampler is not None and not callable(cond_sampler):
        raise TypeError(
            "cond_sampler must be a callable (n, generator) -> mapping of n conditions, got "
            f"{type(cond_sampler).__name__}"
        )
    check_callbacks(callbacks)
    if resume and checkpoint is None:
        raise ValueError("resume must be False without checkpoint, the file to continue from")
    device = device_of(base, model) if device is None else torch.device(device)
    if config.cuda_graphs and device.type != "cuda":
        raise ValueError(f"cuda_graphs must be False on device {device}: it needs cuda")
    distributed.start()
    if config.cuda_graphs and distributed.size() > 1:
        raise ValueError(
            f"cuda_graphs must be False with several processes, got {distributed.size()}"
        )
    if checkpoint is not None:
        distributed.from_first(lambda: ensure_writable(checkpoint, "checkpoint"))
    scaled = as_reward(reward).scaled(1 / config.temperature)
    if isinstance(base, nn.Module):
        base = _shareable(base, model).to(device)
        distributed.broadcast_([*base.parameters(), *base.buffers()])
    progress = distributed.rank() == 0 and any(isinstance(c, ProgressBar) for c in callbacks)
    return Arguments(
        base, scaled, tuple(shape), config, cond_sampler, device, dtype, progress=progress
    )


def device_of(base: VelocityField, model: nn.Module | None) -> torch.device:
    """Return the device of the weights of the base, or of the model; the CPU if they have none."""
    for field in (base, model):
        if isinstance(field, nn.Module):
            for tensor in (*field.parameters(), *field.buffers()):
                return tensor.device
    return torch.device("cpu")


def _shareable(base: nn.Module, model: nn.Module | None) -> nn.Module:
    """Return a frozen copy of ``base``; itself, if it is sharded and so cannot be copied.

    Raises:
        ValueError: a sharded base without a model, or with itself as the model.
    """
    if not is_sharded(base):
        return frozen(base)
    if model is None or any(part is base for part in model.modules()):
        raise ValueError(
            "a base sharded by fully_shard cannot be copied: give model= a module of its own, made "
            "in the same way and sharded too"
        )
    return base.eval().requires_grad_(False)
