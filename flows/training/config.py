"""Options of the training loop of ``flows.training.trainer``, and its learning rate."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, fields
from typing import Any, Literal, get_type_hints

from flows.training.renamed import RefusesOldNames


@dataclass(frozen=True)
class TrainerConfig(RefusesOldNames):
    """The options of a training; module and loss are arguments of the trainer."""

    iterations: int = 2000
    """Optimiser steps."""
    lr: float = 1e-3
    """Learning rate, the highest of the schedule."""
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """After the warm-up: constant, or half a cosine down to zero."""
    warmup: int = 0
    """Iterations over which the rate rises linearly."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW, Loshchilov and Hutter 1711.05101).  The published tilt of
    images has 0.01 (Domingo-Enrich et al. 2409.08861, appendix G)."""
    ema_decay: float = 0.999
    """Decay of the average of the weights; 0 turns averaging off."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    accumulate: int = 1
    """Losses whose mean is one step."""
    autocast: bool = False
    """Evaluate the loss with automatic mixed precision in bfloat16."""
    seed: int = 0
    """Seed of the generator handed to the loss."""
    checkpoint_every: int = 500
    """Iterations between two checkpoints."""

    def __post_init__(self) -> None:
        """Check the types and ranges of the options.

        Raises:
            TypeError, ValueError: naming the option, its value and what was expected.
        """
        check_types(self)
        at_least = {"iterations": 0, "warmup": 0, "weight_decay": 0, "grad_clip": 0}
        at_least |= {"accumulate": 1, "checkpoint_every": 1}
        for name, least in at_least.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in [0, 2**63), got {self.seed}")
        if self.weight_decay == math.inf:
            raise ValueError("weight_decay must be finite, got inf")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if self.lr_schedule not in ("constant", "cosine"):
            raise ValueError(
                f"lr_schedule must be 'constant' or 'cosine', got {self.lr_schedule!r}"
            )


def check_types(config: Any) -> None:
    """Convert numbers of other libraries in a configuration to plain ones, for checkpoints.

    Arguments:
        config: a dataclass, of which the options of type int, float, bool and str are checked.

    Raises:
        TypeError: a value of another type than the option's.
    """
    kinds = {int: numbers.Integral, float: numbers.Real, bool: bool, str: str}
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if hint in kinds and (
            not isinstance(value, kinds[hint]) or (isinstance(value, bool) and hint is not bool)
        ):
            raise TypeError(f"{name} must be of type {hint.__name__}, got {value!r}")
        if hint in kinds:
            object.__setattr__(config, name, hint(value))


def plain_options(config: TrainerConfig) -> dict[str, Any]:
    """Return the options by name, for a checkpoint: an option that is an object as its ``str``."""
    kept = (str, int, float, bool, list, tuple, dict)
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {n: v if v is None or isinstance(v, kept) else str(v) for n, v in values.items()}


def stage(iteration: int, iterations: int, restart: int | None) -> tuple[int, int]:
    """Return the iterations since the last (re)start, and those from it to the next one.

    Arguments:
        iteration: index of an iteration, from 0.
        iterations: number of iterations of the training.
        restart: index of the iteration before which the training restarts; None for never.
    """
    if restart is None or restart >= iterations:
        return iteration, iterations
    if iteration < restart:
        return iteration, restart
    return iteration - restart, iterations - restart


def learning_rate(config: TrainerConfig, iteration: int, restart: int | None = None) -> float:
    """Return the learning rate of the iteration with index ``iteration`` = 0, 1, ...

    Arguments:
        config: options of the training.
        iteration: index of the iteration.
        restart: index of the iteration with which the schedule starts anew; None for never.
    """
    done, length = stage(iteration, config.iterations, restart)
    if done < config.warmup:
        return config.lr * (done + 1) / config.warmup
    if config.lr_schedule == "constant":
        return config.lr
    progress = (done - config.warmup) / max(1, length - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
