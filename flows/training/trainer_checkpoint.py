"""The checkpoint of a trainer: what it holds, and how a training continues from it exactly.

Exact resume.  All randomness of a loss comes from the generator it is handed, and the checkpoint
holds everything else that the next iteration depends on: weights, average, moments of Adam,
generator, iteration, and the state of the loss (``Loss.state_dict``).  On a CPU a resumed run is
therefore equal to an undisturbed one bit by bit.  Layers that draw from PyTorch's global generator
(dropout) are outside this promise.

Frozen weights.  Parameters that require no gradient are in the checkpoint, since a loss may change
them all the same.  With ``save_frozen=False`` they are left out, and a fingerprint tells on resume
whether the module still has the same ones.

Several processes.  The first one writes.  The file holds the generators, and the states of the
losses, of all of them, for an exact resume with as many processes.  With another number of them, or
on another kind of device, random numbers come from new streams.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flows.training import checkpoint as checkpoints
from flows.training import distributed
from flows.training.checkpoint import CheckpointError
from flows.training.config import TrainerConfig, plain_options
from flows.training.loss import Loss
from flows.training.optimizer import AveragedAdam
from flows.weights import fingerprint, frozen_weights

Identity = Mapping[str, str | int | float | bool | list | None]


class Resumable(Protocol):
    """The parts of a `flows.training.Trainer` that its checkpoint holds."""

    config: TrainerConfig
    iteration: int
    generator: torch.Generator
    loss: Loss
    optimizer: AveragedAdam

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that ``TrainerCheckpoint.content`` returned."""


class TrainerCheckpoint:
    """The checkpoint file of a trainer, and what it holds.

    Arguments:
        module: the module in training.
        path: the file; None for a trainer that keeps none.
        identity: what the checkpoint belongs to; a resume from another identity is refused.
        save_frozen: whether parameters that require no gradient are saved.
        defaults: values of facts of the identity that an earlier checkpoint may lack.

    Attributes:
        saved_at: the iteration of the last checkpoint of this run; None before the first.
    """

    def __init__(
        self,
        module: nn.Module,
        path: Path | None,
        identity: Identity | None,
        *,
        save_frozen: bool,
        defaults: Identity | None = None,
    ) -> None:
        self.module, self.path, self.given_identity = module, path, identity
        self.save_frozen, self.defaults = save_frozen, defaults
        self.saved_at: int | None = None

    @cached_property
    def identity(self) -> Identity | None:
        """The identity, with a fingerprint of the parameters that are left out."""
        left_out = distributed.whole(self._left_out())
        if not left_out:
            return self.given_identity
        return {**(self.given_identity or {}), "frozen_weights": fingerprint(left_out)}

    def begin(self, trainer: Resumable, *, resume: bool) -> None:
        """Prove that the file can be written; continue ``trainer`` from it if ``resume`` says so.

        Raises:
            CheckpointError: the file is damaged, belongs to another run, or does not fit.
            OSError: the file cannot be written.
            ValueError: ``resume`` without a file.
        """
        path, identity = self.path, self.identity
        if path is None:
            if resume:
                raise ValueError("resume must be False without a checkpoint file to continue from")
            return

        def read() -> dict[str, Any] | None:
            checkpoints.ensure_writable(path, "checkpoint")
            if not (resume and path.exists()):
                return None
            return checkpoints.load(path, expect=identity, defaults=self.defaults)

        state = distributed.from_first(read)
        if state is None:
            return
        try:
            trainer.load_state_dict(state)
        except distributed.ProcessLost:
            raise
        except Exception as error:  # modules and losses refuse foreign state in their own ways
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{path} does not fit this trainer: {type(error).__name__}: {reason}; it was "
                f"written by {checkpoints.writer(state)}"
            ) from error
        self.saved_at = trainer.iteration

    def save(self, trainer: Resumable) -> None:
        """Write the file, where the trainer keeps one."""
        if self.path is None:
            return
        path, identity = self.path, self.identity
        state: dict[str, Any] = {
            "identity": None if identity is None else dict(identity),
            "config": plain_options(trainer.config),
            "versions": checkpoints.versions(),
        }
        state |= self.content(trainer)
        distributed.from_first(lambda: checkpoints.save(path, state))
        self.saved_at = trainer.iteration

    def last_good(self) -> str:
        """Say in a message which checkpoint is there to go on from."""
        if self.saved_at is None:
            return "this run has saved no checkpoint"
        return f"the last good checkpoint is {self.path} (iteration {self.saved_at})"

    def content(self, trainer: Resumable) -> dict[str, Any]:
        """Return what the next iteration depends on, whole in the first process."""
        own = {"generator": trainer.generator.get_state(), "loss": trainer.loss.state_dict()}
        first, *others = distributed.to_first(own) or [own]
        weights = trainer.optimizer.state_dict(without=self._left_out())
        return {"iteration": trainer.iteration, **weights, **first, "others": others}

    def restore(self, trainer: Resumable, state: Mapping[str, Any]) -> None:
        """Put a trainer where ``content`` was taken."""
        trainer.optimizer.load_state_dict(state, without=self._left_out())
        trainer.iteration = state["iteration"]
        own = self._own_stream(trainer, [state, *state.get("others", [])])
        trainer.loss.load_state_dict(own["loss"])

    def _own_stream(
        self, trainer: Resumable, states: Sequence[Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        """Restore the generator of this process; return the state that it was found in."""
        as_many = len(states) == distributed.size()
        own = states[distributed.rank() if as_many else 0]
        alike = own["generator"].shape == trainer.generator.get_state().shape
        if as_many and alike:
            trainer.generator.set_state(own["generator"])
            return own
        seed = distributed.seed_of(trainer.config.seed, distributed.size(), trainer.iteration)
        trainer.generator.manual_seed(seed)
        if distributed.rank() == 0:
            moved = "was saved on another kind of device"
            if not as_many:
                moved = f"was saved by {len(states)} processes, not {distributed.size()}"
            warnings.warn(
                f"the checkpoint {moved}: random numbers are drawn from new streams",
                stacklevel=2,
            )
        return own

    def _left_out(self) -> dict[str, Tensor]:
        """Return the parameters that the file does not hold."""
        return {} if self.save_frozen else frozen_weights(self.module)
