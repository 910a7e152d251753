"""The training loop: a loss, Adam, averaging of the weights, checkpoints and exact resume.

A loss is any callable (module, generator) -> (loss, metrics), and one iteration i = 0, 1, ... is

    g          = gradient of the mean of ``accumulate`` losses, clipped to the norm ``grad_clip``
    theta, ema = one step of Adam along g, and the running average (`flows.training.optimizer`).

Before the iteration ``restart``, where the trainer is given one, the average becomes the weights,
Adam forgets its moments, and the schedules of the learning rate and the average start anew: a
second training, say on another loss, from the result of the first.

A loss that derives from `flows.training.loss.Loss` may have the hooks ``follow(module, metrics)``
and ``before_update(module)``.  They run when g is known, clipped and (on a CPU) found finite, while
the weights are still theta: the moment to change buffers that follow from the metrics, and to move
networks that follow the weights, such as target networks.

Divergence.  A loss or gradient norm that is not finite stops the training.  On a CPU it is seen
before the weights change; elsewhere numbers are read only once in several iterations, so as not to
wait for the device (``flows.training.divergence``), and always before a checkpoint is written.
`flows.training.trainer_checkpoint` says what a checkpoint holds.

Several processes (``torchrun``, see ``flows.training.distributed``).  Each evaluates the loss with
random numbers of its own; g and the metrics are means over the processes, so that weights that are
equal at the start, those of the first process, stay equal, and that a NaN anywhere stops them all.
Every process must make the same trainers and call the same methods of them.  Buffers that change in
training (batch statistics) are not made equal.

A module sharded by ``fully_shard`` is trained shard by shard.  As it cannot be copied, ``ema`` is
the module itself, which gets the average as its weights at the end of ``fit``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flows.training import distributed
from flows.training.callbacks import Callback, StopTraining, check_callbacks
from flows.training.config import TrainerConfig
from flows.training.divergence import FiniteNumbers, TrainingDiverged
from flows.training.loss import LossFunction, Metrics, as_loss, mean_metrics
from flows.training.optimizer import AveragedAdam
from flows.training.sharding import is_sharded, reshard
from flows.training.trainer_checkpoint import Identity, TrainerCheckpoint


class Trainer:
    """Minimise a loss over the parameters of a module that require gradients.

    Arguments:
        module: trained in place.
        loss: a function (module, generator) -> (scalar loss, scalar metrics), or a
            `flows.training.loss.Loss`, which may have a state and hooks.
        config: see ``TrainerConfig``.
        callbacks: see ``flows.training.callbacks``; those that write are kept in the first process
            only.
        checkpoint: file written every ``checkpoint_every`` iterations and at the end; one of an
            earlier run stays there until this run's first save.
        identity: what the checkpoint belongs to; a resume from another identity is refused.
        identity_defaults: values of facts of the identity that a checkpoint may lack, because an
            earlier version wrote it.
        save_frozen: whether checkpoints hold the parameters that require no gradient.  If not, the
            caller must have them on resume, and nothing may change them.
        restart: index of the iteration before which training restarts from the average; None for
            never.

    Attributes:
        iteration: optimiser steps done so far.
        optimizer: Adam and the running average, see `flows.training.optimizer.AveragedAdam`.
        ema: the average of the weights as a module (the module itself if averaging is off).
        generator: source of all random numbers of the loss, on the device of the module.
        stopped: the message of the callback that stopped the training; None if none did.
        loss_metrics: metrics, with the ``loss``, of each loss of the step that is being made.
        unreported: metrics of steps that have been made already (`UpdateGraph`), but
            that callbacks have not seen and ``iteration`` does not count.

    Raises:
        TypeError: ``loss`` is neither a function nor a `flows.training.loss.Loss`.
        ValueError: no parameter of the module requires a gradient, or some of those that do are
            sharded and others are not.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: LossFunction,
        config: TrainerConfig,
        *,
        callbacks: Sequence[Callback] = (),
        checkpoint: str | Path | None = None,
        identity: Identity | None = None,
        identity_defaults: Identity | None = None,
        save_frozen: bool = True,
        restart: int | None = None,
    ) -> None:
        distributed.start()
        self.module = module = distributed.unwrapped(module)
        self.loss = as_loss(loss)
        self.config, self.restart = config, restart
        check_callbacks(callbacks)
        first = distributed.rank() == 0
        self.callbacks = tuple(c for c in callbacks if first or not getattr(c, "writes", False))
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.iteration = 0
        self.stopped: str | None = None
        self.loss_metrics: list[Metrics] = []
        self.unreported: deque[Metrics] = deque()
        self._file = TrainerCheckpoint(
            module,
            self.checkpoint,
            identity,
            save_frozen=save_frozen,
            defaults=identity_defaults,
        )
        self._finite = FiniteNumbers()

        reshard(module)
        distributed.broadcast_([*module.parameters(), *module.buffers()])
        self.optimizer = AveragedAdam(module, config, restart=restart)
        self.ema = self.optimizer.ema
        self._device = self.optimizer.device
        self.generator = torch.Generator(device=self._device)
        self.generator.manual_seed(distributed.seed_of(config.seed))
        module.train()

    def fit(self, *, resume: bool = False, backward: Callable[[], None] | None = None) -> nn.Module:
        """Train to the end, with callbacks and checkpoints; return ``ema`` in evaluation mode.

        Arguments:
            resume: continue from the checkpoint if its file exists.
            backward: replaces the method `backward`, as a `flows.training.GradientGraph` does.

        Raises:
            ValueError: to be resumed without a checkpoint file.
            TrainingDiverged: see ``step``.
            CheckpointError: the checkpoint is damaged or does not fit.
            OSError: the checkpoint cannot be written; raised before training begins.
        """
        with self._run(resume):
            while not self._ended():
                self.zero_grad()
                (backward or self.backward)()
                self._report(self.apply())
        return self.ema.eval()

    def training(self, *, resume: bool = False) -> Generator[Trainer, None, None]:
        """Train to the end, with losses that the caller evaluates: `fit` as a generator.

        The generator yields this trainer once for each iteration.  The caller then calls
        `backward`, or adds gradients and ``loss_metrics`` in another way, or makes several whole
        steps and puts their metrics into ``unreported`` (see `flows.training.stacked`).

        Arguments and errors are those of `fit`.
        """
        with self._run(resume):
            while not self._ended():
                if not self.unreported:
                    self.zero_grad()
                yield self
                if self.unreported:
                    metrics = self.unreported.popleft()
                    self._check_finite_later(metrics)
                    self.iteration += 1
                else:
                    metrics = self.apply()
                self._report(metrics)

    @contextmanager
    def _run(self, resume: bool) -> Iterator[None]:
        """Do what comes before the first iteration and after the last one."""
        self._file.begin(self, resume=resume)
        self.stopped = None
        self.module.train()
        try:
            self.stopped = distributed.first_of(self._tell(lambda c: c.on_start(self)))
            if self.stopped is not None and self.iteration < self.config.iterations:
                self._save()
            yield
        finally:
            message = self._tell(lambda c: c.on_end(self))
            self.stopped = self.stopped or message
        if is_sharded(self.module):
            reshard(self.module)
            self.optimizer.take_average()

    def _ended(self) -> bool:
        """Tell whether no iteration is left, or a callback has stopped the training."""
        if self.unreported:  # the weights are ahead of what callbacks have seen
            return False
        return self.stopped is not None or self.iteration >= self.config.iterations

    def _report(self, metrics: Metrics) -> None:
        """Call the callbacks after an iteration, and write the checkpoint where it is due."""
        message = self._tell(lambda c: c.on_step(self, self.iteration, metrics))
        message = distributed.first_of(message)
        self.stopped = self.stopped or message
        if self._ended() or self.iteration % self.config.checkpoint_every == 0:
            self._save()

    def _tell(self, hook: Callable[[Callback], None]) -> str | None:
        """Call a hook of all callbacks; return the message of the first that stops the training."""
        message = None
        for callback in self.callbacks:
            try:
                hook(callback)
            except StopTraining as stop:
                message = message or str(stop) or f"{type(callback).__name__} raised StopTraining"
        return message

    def step(self) -> Metrics:
        """Make one optimiser step; return the metrics, ``loss`` and ``grad_norm`` first.

        Metrics are means over the accumulated losses, detached, on the device; ``grad_norm`` is
        the norm before clipping.

        Raises:
            TrainingDiverged: the loss or the norm of the gradient is not finite.
            ValueError: the loss is not a scalar.
        """
        self.zero_grad()
        self.backward()
        return self.apply()

    def zero_grad(self) -> None:
        """Begin a step: restart where it is due, and drop gradients and metrics of the last one."""
        if self.iteration == self.restart:
            self.optimizer.restart()
        self.optimizer.zero_grad()
        self.loss_metrics.clear()

    def backward(self, evaluate: LossFunction | None = None) -> None:
        """Evaluate the losses of a step and add up their gradients and ``loss_metrics``.

        Arguments:
            evaluate: a loss instead of the trainer's.

        Raises:
            ValueError: the loss is not a scalar.
        """
        for _ in range(self.config.accumulate):
            with self.autocast():
                loss, metrics = (evaluate or self.loss)(self.module, self.generator)
            if loss.ndim:
                raise ValueError(f"loss must be a scalar, got shape {tuple(loss.shape)}")
            (loss / self.config.accumulate).backward()
            self.loss_metrics.append({**metrics, "loss": loss.detach()})

    def apply(self) -> Metrics:
        """End a step: update the weights by the gradients; return and raise as ``step`` does."""
        metrics = self.reduce_gradients()
        self._check_finite_later(metrics)
        self.update_weights(metrics)
        self.iteration += 1
        return metrics

    def reduce_gradients(self) -> Metrics:
        """Average gradients and metrics over the processes, and clip; return the metrics."""
        norm = self.optimizer.reduce_gradients()
        means = mean_metrics(self.loss_metrics, self._device)
        first = {"loss": means["loss"], "grad_norm": norm}
        return first | {name: mean for name, mean in means.items() if name not in first}

    def update_weights(self, metrics: Metrics) -> None:
        """Call the hooks of the loss, then move weights and average along the gradients."""
        self.loss.follow(self.module, metrics)
        self.loss.before_update(self.module)
        self.optimizer.step(self.iteration)

    def autocast(self) -> AbstractContextManager:
        """Return the context that sets the precision in which losses are evaluated."""
        if not self.config.autocast:
            return nullcontext()
        # Before it was mended, PyTorch's cache of cast weights lost their gradients when a loss
        # evaluated the module first without gradients (a rollout) and then with them.
        return torch.autocast(self._device.type, torch.bfloat16, cache_enabled=False)

    def _check_finite_later(self, metrics: Metrics) -> None:
        """Check the numbers of the next iteration, at once on a CPU and later on a GPU."""
        self._finite.add(self.iteration + 1, metrics["loss"], metrics["grad_norm"])
        if self._finite.due(self._device):
            self._check_finite()

    def _check_finite(self) -> None:
        """Raise `TrainingDiverged` if a number noted so far is not finite."""
        if (found := self._finite.first_not_finite()) is not None:
            raise self._diverged(found)

    def _diverged(self, reason: str) -> TrainingDiverged:
        return TrainingDiverged(f"training stopped: {reason}; {self._file.last_good()}")

    def state_dict(self) -> dict[str, Any]:
        """Return what the next iteration depends on, as tensors and plain data.

        Parameters that require no gradient are left out unless ``save_frozen``.  Of several
        processes all must call it, and the first gets the whole.
        """
        return self._file.content(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``, the whole; the configuration stays that of this trainer.

        Warns where ``state`` was saved by another number of processes, or on another kind of
        device: random numbers then come from new streams.
        """
        self._file.restore(self, state)
        self._finite.clear()

    def _save(self) -> None:
        """Write the checkpoint, if all numbers up to here are finite."""
        self._check_finite()
        if not self.optimizer.finite():
            raise self._diverged(f"a weight is not finite after iteration {self.iteration}")
        self._file.save(self)
