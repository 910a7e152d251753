"""The arguments of a tilt, checked before any work."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from adjoint.chain.kernels import gaussian_kernel
from adjoint.config import TiltConfig
from adjoint.evaluator import Evaluator, RewardEvaluator
from adjoint.rewards.reward import AbstractReward, ValueFunction, as_reward
from adjoint.trajectory_source import CondSampler
from flows import grid as grids
from flows.field import VelocityField, frozen
from flows.training import distributed
from flows.training.callbacks import Callback, ProgressBar, check_callbacks
from flows.training.checkpoint import ensure_writable
from flows.training.sharding import is_sharded

Identity = Mapping[str, str | int | float | bool | None]
"""What identifies a run beside its options: plain values by name."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that the state of a chain may have."""


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
    config: TiltConfig | None = None,
    model: nn.Module | None = None,
    cond_sampler: CondSampler | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    resume: bool = False,
    identity: Identity | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Arguments:
    """Refuse arguments of `adjoint.tilt` that do not fit; freeze the base; join the processes.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and what was expected.
        OSError: the checkpoint cannot be written.
    """
    config = TiltConfig() if config is None else config
    if not isinstance(config, TiltConfig):
        raise TypeError(f"config must be a TiltConfig, got {type(config).__name__}")
    shape = _checked_shape(shape)
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module or None, got {type(model).__name__}")
    if cond_sampler is not None and not callable(cond_sampler):
        raise TypeError(
            "cond_sampler must be a callable (n, generator) -> mapping of n conditions, got "
            f"{type(cond_sampler).__name__}"
        )
    check_callbacks(callbacks)
    if resume and checkpoint is None:
        raise ValueError("resume must be False without checkpoint, the file to continue from")
    chains = [(config.kernel, config.steps), (config.chain_kernel, config.chain_steps)]
    for kernel, steps in dict.fromkeys(chains):
        gaussian_kernel(kernel, grids.shifted(steps, config.shift), dim=torch.Size(shape).numel())
    _check_identity(identity)
    if dtype not in DTYPES:
        names = ", ".join(map(str, DTYPES))
        raise ValueError(f"dtype must be one of {names}, got {dtype!r}")
    device = device_of(base, model) if device is None else _checked_device(device)
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
    return Arguments(base, scaled, shape, config, cond_sampler, device, dtype, progress=progress)


def _checked_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a sample as plain integers.

    Raises:
        ValueError: it is no tuple of sizes of at least 1, or empty.
    """
    sizes = shape if isinstance(shape, tuple | list) else (None,)
    if not all(
        isinstance(n, numbers.Integral) and not isinstance(n, bool) and n > 0 for n in sizes
    ):
        raise ValueError(f"shape must be a tuple of sizes such as (2,), got {shape!r}")
    if not sizes:
        raise ValueError("shape must have a dimension, got (): numbers are vectors of shape (1,)")
    return tuple(int(n) for n in shape)


def _check_identity(identity: Identity | None) -> None:
    """Refuse what a checkpoint cannot hold as the identity of a run.

    Raises:
        TypeError: it is no mapping of names to plain values.
    """
    if identity is None:
        return
    if not isinstance(identity, Mapping):
        raise TypeError(
            f"identity must be a mapping of names to plain values, got {type(identity).__name__}"
        )
    for name, value in identity.items():
        if not isinstance(name, str):
            raise TypeError(f"identity must have names of type str, got {name!r}")
        if value is not None and not isinstance(value, str | int | float | bool):
            raise TypeError(
                f"identity[{name!r}] must be a str, int, float, bool or None, got "
                f"{type(value).__name__}"
            )


def _checked_device(device: torch.device | str) -> torch.device:
    """Return a device on which tensors can be made.

    Raises:
        ValueError: there is no such device.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that is there, got {device!r}: {reason}") from error
    if found.type == "meta":
        raise ValueError("device must be one that holds numbers, got 'meta'")
    return found


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
