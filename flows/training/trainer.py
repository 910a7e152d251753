"""The training loop: a loss, Adam, averaging of the weights, checkpoints and exact resume.

A loss is any callable (module, generator) -> (loss, metrics), and one iteration i = 0, 1, ... is

    g     = gradient of the mean of ``accumulate`` losses, clipped to the norm ``grad_clip``
    theta = Adam(theta, g, lr_i)            (AdamW with a weight decay)
    ema   = ema + (1 - d_i) (theta - ema),  d_i = min(ema_decay, (1 + i) / (10 + i))

where the warm-up of d_i keeps the random initialisation from lingering in the average.  The rate
lr_i is a function of i alone (``learning_rate``), so it needs no state.

Before the iteration ``restart``, where a configuration has one, the average becomes the weights,
Adam forgets its moments, and the schedules of lr_i and d_i start anew: a second training, say on
another loss, from the result of the first.

A loss that derives from `flows.training.loss.Loss` may have the hook ``before_update(module)``.  It
runs when g is known, clipped and (on a CPU) found finite, while the weights are still theta: the
moment to move networks that follow the weights, such as target networks.

Exact resume.  All randomness of a loss comes from the generator it is handed, and the checkpoint
holds everything else that the next iteration depends on: weights, average, moments of Adam,
generator, iteration, and the state of the loss (``Loss.state_dict``).
On a CPU a resumed run is therefore equal to an undisturbed one bit by bit.  Layers that draw from
PyTorch's global generator (dropout) are outside this promise.

Parameters that require no gradient are not averaged: module and average share them.  Checkpoints
hold them, since a loss may change them all the same; with ``save_frozen=False`` they are left out,
and a fingerprint tells on resume whether the module still has the same ones.

Divergence.  A loss or gradient norm that is not finite stops the training.  On a CPU it is seen
before the weights change; elsewhere numbers are read only once in ``CHECK_EVERY`` iterations, so as
not to wait for the device, and always before a checkpoint is written.

Several processes (``torchrun``, see ``flows.training.distributed``).  Each evaluates the loss with
random numbers of its own; g and the metrics are means over the processes, so that weights that are
equal at the start, those of the first process, stay equal, and that a NaN anywhere stops them all.
The first process alone writes.  Its checkpoint holds the generators, and the states of the losses,
of all, for an exact resume with as many processes; with another number of them, or on another kind
of device, the streams of random numbers start anew.  Every process must make the same trainers and
call the same methods of them.  Buffers that change in training (batch statistics) are not made
equal.

A module sharded by ``fully_shard`` is trained shard by shard.  As it cannot be copied, ``ema`` is
the module itself, which gets the average as its weights at the end of ``fit``.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flows.training import checkpoint as checkpoints
from flows.training import distributed
from flows.training.callbacks import Callback, check_callbacks
from flows.training.checkpoint import CheckpointError
from flows.training.config import TrainerConfig, learning_rate
from flows.training.ema import WeightAverage
from flows.training.loss import LossFunction, as_loss
from flows.weights import fingerprint, frozen_weights

Identity = Mapping[str, str | int | float | bool | list | None]

CHECK_EVERY = 10


class TrainingDiverged(RuntimeError):  # noqa: N818  (it names the event, as StopIteration does)
    """A loss, gradient norm or weight is not finite; the last good checkpoint is untouched."""


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
        identity: what the checkpoint belongs to; a resume from another run is refused.
        save_frozen: whether checkpoints hold the parameters that require no gradient.  If not, the
            caller must have them on resume, and nothing may change them.

    Attributes:
        iteration: optimiser steps done so far.
        ema: the average of the weights as a module in evaluation mode, with buffers copied and
            parameters that require no gradient shared (the module itself if averaging is off).
        generator: on the device of the module.
        parts: metrics, with the ``loss``, of each loss that adds up to the step being made.
        made: metrics of steps that were made ahead (`flows.training.cuda_graphs`) and are not yet
        counted.

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
        save_frozen: bool = True,
    ) -> None:
        distributed.start()
        self.module = module = distributed.unwrapped(module)
        self.loss = as_loss(loss)
        self.config = config
        check_callbacks(callbacks)
        first = distributed.rank() == 0
        self.callbacks = tuple(c for c in callbacks if first or not getattr(c, "writes", False))
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.identity = identity
        self.save_frozen = save_frozen
        self.iteration = 0
        self.parts: list[dict[str, Tensor]] = []
        self.made: deque[dict[str, Tensor]] = deque()
        self._saved_at: int | None = None
        self._unchecked: list[tuple[int, Tensor, Tensor]] = []

        distributed.reshard(module)
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("module has no parameter that requires a gradient")
        distributed.broadcast_([*module.parameters(), *module.buffers()])
        self._parameters: list[Tensor] = [p for _, p in named]
        self._sharded = distributed.is_sharded(module)
        if len({distributed.is_sharded(p) for p in self._parameters}) > 1:
            raise ValueError(
                "some parameters that require a gradient are sharded and others are not: call "
                "fully_shard on the whole module after its parts"
            )
        _warn_of_half_precision(named)
        self._device = self._parameters[0].device
        self.generator = torch.Generator(device=self._device)
        self.generator.manual_seed(distributed.seed_of(config.seed))
        adam = torch.optim.AdamW if config.weight_decay else torch.optim.Adam
        fused = self._device.type in ("cpu", "cuda")  # elsewhere PyTorch chooses the fastest
        self._optimizer = adam(
            self._parameters,
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=True if fused else None,
        )

        self._average = WeightAverage(module, named) if config.ema_decay else None
        self.ema = self._average.module if self._average else module
        module.train()

    def step(self) -> dict[str, Tensor]:
        """One optimiser step; returns the metrics, ``loss`` and ``grad_norm`` first.

        Metrics are means over the accumulated losses, detached, on the device; ``grad_norm`` is
        the norm before clipping.

        Raises:
            TrainingDiverged: the loss or the norm of the gradient is not finite.
            ValueError: the loss is not a scalar.
        """
        self.prepare()
        self.backward()
        return self.apply()

    def prepare(self) -> None:
        """The first part of a step: restart where it is due, and clear what is to be added up."""
        if self.iteration == self.config.restart:
            self._restart()
        self._optimizer.zero_grad(set_to_none=True)
        self.parts.clear()

    def backward(self, evaluate: LossFunction | None = None) -> None:
        """The second: losses, at the random numbers that come next, into ``parts`` and gradients.

        Arguments:
            evaluate: instead of the trainer's loss.

        Raises:
            ValueError: the loss is not a scalar.
        """
        for _ in range(self.config.accumulate):
            with self.autocast():
                loss, metrics = (evaluate or self.loss)(self.module, self.generator)
            if loss.ndim:
                raise ValueError(f"loss must be a scalar, got shape {tuple(loss.shape)}")
            (loss / self.config.accumulate).backward()
            self.parts.append({**metrics, "loss": loss.detach()})

    def apply(self) -> dict[str, Tensor]:
        """The last: the update by what was added up; returns and raises what ``step`` does."""
        result = self.collect()
        self._defer_finite_check(result)
        self.change()
        self.iteration += 1
        return result

    def collect(self) -> dict[str, Tensor]:
        """Of ``apply`` the first: the gradient clipped, and the metrics."""
        config, parts = self.config, self.parts
        distributed.average_gradients(self._parameters)
        norm = nn.utils.clip_grad_norm_(self._parameters, config.grad_clip or math.inf).detach()
        if distributed.is_sharded(norm):
            norm = norm.full_tensor()  # type: ignore[attr-defined]
        means = {name: _mean([part[name] for part in parts]) for name in parts[0]}
        means = _over_processes(means, self._device)
        result = {"loss": means["loss"], "grad_norm": norm}
        return result | {name: mean for name, mean in means.items() if name not in result}

    def _defer_finite_check(self, result: dict[str, Tensor]) -> None:
        """See, now or later, whether the numbers of the next iteration are finite."""
        self._unchecked.append((self.iteration + 1, result["loss"], result["grad_norm"]))
        if self._device.type == "cpu" or len(self._unchecked) >= CHECK_EVERY:
            self._check_finite()

    def change(self) -> None:
        """And of ``apply`` the second: target networks, weights and their average."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.iteration)
        self.loss.before_update(self.module)
        self._optimizer.step()
        if self._average:
            done, _ = self.config.stage(self.iteration)
            self._average.update(min(self.config.ema_decay, (1 + done) / (10 + done)))

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The parameters that are trained."""
        return tuple(self._parameters)

    def fit(self, *, resume: bool = False, backward: Callable[[], None] | None = None) -> nn.Module:
        """Train to the end, with callbacks and checkpoints; returns ``ema`` in evaluation mode.

        Arguments:
            resume: continue from the checkpoint if its file exists.
            backward: does what the method does, as `flows.training.cuda_graphs.GradientGraph`.

        Raises:
            ValueError: to be resumed without a checkpoint file.
            TrainingDiverged: see ``step``.
            CheckpointError: the checkpoint is damaged or does not fit.
            OSError: the checkpoint cannot be written; raised before training begins.
        """
        with closing(self.training(resume=resume)) as steps:
            for _ in steps:
                (backward or self.backward)()
        return self.ema.eval()

    def training(self, *, resume: bool = False) -> Generator[Trainer, None, None]:
        """``fit`` but for the losses: who iterates calls ``backward`` once for each item, or does
        what it does in another way, as `flows.training.stacked`.  Each item is this trainer.
        """
        if self.checkpoint is not None:
            self._begin(self.checkpoint, resume)
        elif resume:
            raise ValueError("resume must be False without a checkpoint file to continue from")
        self.module.train()
        try:
            for callback in self.callbacks:
                callback.on_start(self)
            while self.iteration < self.config.iterations:
                if not self.made:
                    self.prepare()
                yield self
                if self.made:
                    self._defer_finite_check(metrics := self.made.popleft())
                    self.iteration += 1
                else:
                    metrics = self.apply()
                for callback in self.callbacks:
                    callback.on_step(self, self.iteration, metrics)
                done = self.iteration == self.config.iterations
                if done or self.iteration % self.config.checkpoint_every == 0:
                    self._save()
        finally:
            for callback in self.callbacks:
                callback.on_end(self)
        if self._sharded:
            distributed.reshard(self.module)
            if self._average:
                self._average.take()

    def state_dict(self) -> dict[str, Any]:
        """What the next iteration depends on, as tensors and plain data; see ``save_frozen``.

        Of several processes all must call it, and the first gets the whole.
        """
        own = {"generator": self.generator.get_state(), "loss": self.loss.state_dict()}
        first, *others = distributed.to_first(own) or [own]
        left_out = self._left_out()

        def kept(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return distributed.whole({n: w for n, w in weights.items() if n not in left_out})

        return {
            "iteration": self.iteration,
            "module": kept(self.module.state_dict()),
            "ema": kept(self._average.state_dict()) if self._average else None,
            "optimizer": distributed.whole(self._optimizer.state_dict()["state"]),
            **first,
            "others": others,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``, the whole; the configuration stays that of this trainer.

        Warns where ``state`` was saved by another number of processes, or on another kind of
        device: random numbers then come from new streams.
        """
        left_out = self._left_out()
        distributed.load_whole(self.module, state["module"], left_out)
        if self._average:
            self._average.load_state_dict({**state["ema"], **left_out})
        groups = self._optimizer.state_dict()["param_groups"]
        moments = {
            index: {
                name: distributed.sharded_like(value, self._parameters[index])
                for name, value in copy.deepcopy(moment).items()  # it would share these tensors
            }
            for index, moment in state["optimizer"].items()
        }
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.iteration = state["iteration"]
        self._load_own([state, *state.get("others", [])])
        self._unchecked.clear()

    def _load_own(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take generator and loss from those of the processes that saved."""
        as_many = len(states) == distributed.size()
        own = states[distributed.rank() if as_many else 0]
        alike = own["generator"].shape == self.generator.get_state().shape
        if as_many and alike:
            self.generator.set_state(own["generator"])
        else:
            seed = distributed.seed_of(self.config.seed, distributed.size(), self.iteration)
            self.generator.manual_seed(seed)
            if distributed.rank() == 0:
                moved = "was saved on another kind of device"
                if not as_many:
                    moved = f"was saved by {len(states)} processes, not {distributed.size()}"
                warnings.warn(
                    f"the checkpoint {moved}: random numbers are drawn from new streams",
                    stacklevel=2,
                )
        self.loss.load_state_dict(own["loss"])

    def _left_out(self) -> dict[str, Tensor]:
        """The parameters that checkpoints leave out."""
        return {} if self.save_frozen else frozen_weights(self.module)

    @cached_property
    def _described(self) -> Identity | None:
        """The identity, with a fingerprint of the parameters that checkpoints leave out."""
        left_out = distributed.whole(self._left_out())
        if not left_out:
            return self.identity
        return {**(self.identity or {}), "frozen_weights": fingerprint(left_out)}

    def _restart(self) -> None:
        """Continue from the average with a fresh optimiser."""
        if self._average:
            self._average.take()
        self._optimizer.state.clear()

    def autocast(self) -> AbstractContextManager:
        """The precision in which losses are evaluated."""
        if not self.config.autocast:
            return nullcontext()
        # Before it was mended, PyTorch's cache of cast weights lost their gradients when a loss
        # evaluated the module first without gradients (a rollout) and then with them.
        return torch.autocast(self._device.type, torch.bfloat16, cache_enabled=False)

    def _check_finite(self) -> None:
        """Wait for the device and look at every loss and gradient norm not yet looked at."""
        if not self._unchecked:
            return
        iterations, losses, norms = zip(*self._unchecked, strict=True)
        self._unchecked.clear()
        values = zip(torch.stack(losses).tolist(), torch.stack(norms).tolist(), strict=True)
        for iteration, (loss, norm) in zip(iterations, values, strict=True):
            for name, value in (("loss", loss), ("gradient norm", norm)):
                if not math.isfinite(value):
                    raise self._diverged(f"{name} is {value} in iteration {iteration}")

    def _diverged(self, what: str) -> TrainingDiverged:
        if self._saved_at is None:
            kept = "this run has saved no checkpoint"
        else:
            kept = f"the last good checkpoint is {self.checkpoint} (iteration {self._saved_at})"
        return TrainingDiverged(f"training stopped: {what}; {kept}")

    def _save(self) -> None:
        self._check_finite()
        weights = distributed.shards(self._parameters)
        finite = torch.stack([p.isfinite().all() for p in weights]).all()
        distributed.average_([found := finite.float()])
        if found < 1:
            raise self._diverged(f"a weight is not finite after iteration {self.iteration}")
        if self.checkpoint is None:
            return
        path = self.checkpoint
        state: dict[str, Any] = {
            "identity": None if self._described is None else dict(self._described),
            "config": asdict(self.config),
            "versions": checkpoints.versions(),
        }
        state |= self.state_dict()
        distributed.from_first(lambda: checkpoints.save(path, state))
        self._saved_at = self.iteration

    def _begin(self, path: Path, resume: bool) -> None:
        """Prove that ``path`` can be written, and continue from it where that is asked for."""
        described = self._described

        def read() -> dict[str, Any] | None:
            checkpoints.ensure_writable(path, "checkpoint")
            return checkpoints.load(path, expect=described) if resume and path.exists() else None

        state = distributed.from_first(read)
        if state is None:
            return
        try:
            self.load_state_dict(state)
        except distributed.ProcessLost:
            raise
        except Exception as error:  # modules and losses refuse foreign state in their own ways
            raise CheckpointError(
                f"{path} does not fit this trainer: {type(error).__name__}: {error}"
            ) from error
        self._saved_at = self.iteration


def _warn_of_half_precision(named: Sequence[tuple[str, Tensor]]) -> None:
    """Warn that weights in half precision do not keep what a small rate adds to them."""
    half = [name for name, p in named if p.is_floating_point() and p.element_size() < 4]
    if half:
        warnings.warn(
            f"{len(half)} of {len(named)} trained parameters are in half precision, {half[0]} for "
            "one: steps below a few thousandths of a weight are lost, and so is most of a training "
            "at a small rate. Train in float32 (module.float(), with autocast=True for speed), or "
            "train adapters beside them (adjoint.lora)",
            stacklevel=3,
        )


@torch.no_grad()
def _over_processes(metrics: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Means over the processes, in one message."""
    if distributed.size() == 1:
        return metrics
    values = torch.stack([metric.to(device, torch.float64) for metric in metrics.values()])
    distributed.average_([values])
    return {name: v.to(metrics[name]) for name, v in zip(metrics, values, strict=True)}


def _mean(values: Sequence[Tensor | float]) -> Tensor:
    tensors = [torch.as_tensor(value).detach() for value in values]
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors).mean(0)
