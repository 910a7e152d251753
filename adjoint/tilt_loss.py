"""The loss of a tilt as a trainer calls it: adjoint matching, then, if asked for, refinement.

`MatchingLoss` rolls the current model out (or replays trajectories), runs the lean adjoint back,
and evaluates `adjoint.loss.adjoint_matching_loss` on the selected steps.  `VarianceLoss` evaluates
`adjoint.loss.log_variance_loss` on fresh trajectories: it needs no adjoint, and its noise vanishes
at the optimum.  `TiltLoss` takes the first, and in the last part of a training the second.  Your
own trainer takes it as it is.

The module is left in the mode in which its loss was evaluated, since a backward pass may evaluate
it again: evaluation mode, but for the dropout of trained adapters (`adjoint.lora`).

Several processes (`flows.training.distributed`).  Options count trajectories of all processes
together; each takes its share, with noise of its own, and R processes minimise the loss that one
would.  Importance weights, the variance of the refinement, and the metrics ``ess`` and
``log_weight_std`` are computed from the joined batch.  The running cap follows the mean of the
processes' quantiles, each process keeps its share of the replay buffer, and each draws its own
subset of the early steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from adjoint.certificate import path_log_ratio
from adjoint.chain.adjoints import Adjoint
from adjoint.chain.kernels import Kernel
from adjoint.config import TiltConfig
from adjoint.loss import (
    adjoint_matching_loss,
    importance_weights,
    log_variance_loss,
    select_steps,
)
from adjoint.models.lora import prepare_dropout
from adjoint.rewards.reward import AbstractReward
from adjoint.trajectory_batch import TrajectoryBatch
from adjoint.trajectory_buffer import TrajectoryBuffer
from adjoint.trajectory_source import CondSampler, TrajectorySource
from flows.field import VelocityField
from flows.training import distributed
from flows.training.loss import Loss

Evaluated = tuple[Tensor, dict[str, Tensor]]

GROUP = 8
"""Trajectories that share a condition where the spread of their log-weights is the loss."""


class Stateful(Protocol):
    """An object whose state a checkpoint keeps."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state as tensors and plain data."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""


class MatchingLoss(Loss):
    """The adjoint-matching loss on fresh or replayed trajectories.

    Arguments:
        source: where trajectories come from.
        kernel: table of the chain, on the device where trajectories are kept.
    """

    def __init__(self, source: TrajectorySource, kernel: Kernel) -> None:
        config = source.config
        self.source, self.kernel, self.config = source, kernel, config
        self.batch_size = distributed.share(config.batch_size)
        self.cap: Tensor | None = None
        self.buffer: TrajectoryBuffer | None = None
        if config.replay_size:
            capacity = distributed.share(config.replay_size)
            self.buffer = TrajectoryBuffer(capacity, device=source.storage_device)

    def collect(self, module: nn.Module, generator: torch.Generator) -> TrajectoryBatch:
        """Return a batch of fresh trajectories."""
        return self.source.collect(module, self.kernel, self.batch_size, generator)

    def next_batch(self, module: nn.Module, generator: torch.Generator) -> TrajectoryBatch:
        """Return fresh trajectories, or replayed ones where there is a buffer."""
        if self.buffer is None:
            return self.collect(module, generator)
        if self.calls % self.config.losses_per_rollout == 0 or not self.buffer.size:
            self.buffer.add(self.collect(module, generator))
        return self.buffer.draw(self.batch_size, generator=generator)

    def __call__(self, module: nn.Module, generator: torch.Generator) -> Evaluated:
        """Return the loss of ``module`` on one batch, and metrics."""
        config = self.config
        batch = self.next_batch(module, generator)
        steps = selected_steps(config, self.kernel, generator)
        prepare_dropout(module)
        source = self.source
        v = source.velocities(source.model(module), self.kernel, batch.xs, steps, batch.cond)
        weights = None
        if config.importance:
            log_w = distributed.gather(batch.log_w)
            weights = distributed.own(importance_weights(log_w, min_ess=config.min_ess))
        loss, metrics = adjoint_matching_loss(
            v,
            Adjoint(batch.adjoint, batch.v_base),
            self.kernel,
            steps=steps,
            weights=weights,
            clip=self.cap if config.clip_quantile else config.clip or None,
            control_variate=batch.control_variate,
        )
        if config.clip_quantile:
            seen = metrics["term_quantile"]
            distributed.average_([seen])
            self.cap = seen if self.cap is None else 0.99 * self.cap + 0.01 * seen
        self.calls += 1
        diagnostics = batch_diagnostics(batch.reward, batch.log_w, batch.kl, batch.terms)
        return loss, metrics | diagnostics

    def state_dict(self) -> dict[str, Any]:
        """Return the number of calls, cap, and the replay buffer of this process."""
        buffer = None if self.buffer is None else self.buffer.state_dict()
        return {"calls": self.calls, "cap": self.cap, "buffer": buffer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned; without its buffer if that is None."""
        self.calls = int(state["calls"])
        cap = state["cap"]
        self.cap = None if cap is None else cap.to(self.source.storage_device)
        if self.buffer is not None and state["buffer"] is not None:
            self.buffer.load_state_dict(state["buffer"])


class VarianceLoss(Loss):
    """Half the variance of log w, within conditions, on fresh trajectories.

    Where the loss is taken on some of the steps, the other steps enter log w as numbers: the
    gradient in each step's control vanishes at the optimum by itself.

    Arguments:
        source: where trajectories come from.
        kernel: table of the chain, on the device where trajectories are kept.

    Raises:
        ValueError: there are conditions, and less than two trajectories in each process.
    """

    def __init__(self, source: TrajectorySource, kernel: Kernel) -> None:
        config = source.config
        self.source, self.kernel, self.config = source, kernel, config
        self.n, self.groups, self.processes = distributed.share(config.batch_size), 1, 1
        if source.cond_sampler is not None:
            if self.n < 2:
                raise ValueError(
                    "refine_fraction compares trajectories under one condition: batch_size must "
                    f"be at least {2 * distributed.size()} for {distributed.size()} processes, "
                    f"got {config.batch_size}"
                )
            self.groups = max(1, self.n // GROUP)
            self.n = self.groups * (self.n // self.groups)
            self.processes = distributed.size()

    def __call__(self, module: nn.Module, generator: torch.Generator) -> Evaluated:
        """Return the loss of ``module`` on one batch, and metrics."""
        source, kernel = self.source, self.kernel
        trajectory, cond = source.roll_out(module, kernel, self.n, self.groups, generator)
        xs, end = trajectory.xs[:-1], trajectory.xs[-1]
        with torch.no_grad():
            v_base = source.velocities(source.base, kernel, xs, None, cond)
            value, terms = source.reward.value_and_info(end, cond)
            value = value.to(source.dtype)
        steps = selected_steps(self.config, kernel, generator)
        prepare_dropout(module)
        v = source.velocities(source.model(module), kernel, xs, steps, cond)
        if steps is not None:
            v = trajectory.v.index_copy(0, steps.to(v.device), v)
        log_ratio, kl = path_log_ratio(trajectory, v_base, kernel, v)
        log_w = value + log_ratio
        loss = log_variance_loss(distributed.gather(log_w), self.groups * self.processes)
        return loss, batch_diagnostics(value, log_w.detach(), kl.detach(), terms)


class TiltLoss(Loss):
    """The loss of a tilt: adjoint matching, and in the last part of a training the refinement.

    A trainer of your own restarts where the refinement begins: ``restart=config.refine_from``.

    Arguments:
        base: frozen velocity field.
        reward: scaled reward (temperature included).
        kernel: table of the chain.
        shape: shape of one sample, without the batch.
        config: options of the tilt.
        refine_kernel: table of the chain in the refinement; ``kernel`` if None.
        cond_sampler: draws conditions for n samples; None for an unconditional flow.
        dtype: of states and adjoints.
        storage_device: device where trajectories are kept; by default the CPU if
            ``config.offload``, else that of the kernel.
        companions: further objects, by name, whose state the checkpoint is to keep.

    Attributes:
        matching: the adjoint-matching loss.
        refining: the loss of the refinement; None without one.

    Raises:
        ValueError: several processes refine under conditions with less than two trajectories each,
            or a sharded base is to be compiled (a sharded model: when the loss is first called).
    """

    def __init__(
        self,
        base: VelocityField,
        reward: AbstractReward,
        kernel: Kernel,
        *,
        shape: tuple[int, ...],
        config: TiltConfig,
        refine_kernel: Kernel | None = None,
        cond_sampler: CondSampler | None = None,
        dtype: torch.dtype = torch.float32,
        storage_device: torch.device | None = None,
        companions: Mapping[str, Stateful] | None = None,
    ) -> None:
        device = kernel.t.device
        storage_device = storage_device or (torch.device("cpu") if config.offload else device)
        self.source = TrajectorySource(
            base,
            reward,
            shape=shape,
            config=config,
            device=device,
            cond_sampler=cond_sampler,
            dtype=dtype,
            storage_device=storage_device,
        )
        self.matching = MatchingLoss(self.source, kernel.to(storage_device))
        self.refining: VarianceLoss | None = None
        if config.refine_fraction:
            self.refining = VarianceLoss(self.source, (refine_kernel or kernel).to(storage_device))
        self.companions = dict(companions or {})
        first = config.refine_from
        self._matching_calls = None if first is None else first * config.accumulate

    @property
    def phase(self) -> Literal["match", "refine"]:
        """Return the loss that the next call takes: "match" or "refine"."""
        refining = self._matching_calls is not None and self.calls >= self._matching_calls
        return "refine" if refining else "match"

    def __call__(self, module: nn.Module, generator: torch.Generator) -> Evaluated:
        """Return the loss of ``module`` on one batch, and metrics."""
        refining = self.refining if self.phase == "refine" else None
        loss, metrics = (refining or self.matching)(module, generator)
        self.calls += 1
        return loss, metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both losses and of the companions, for a checkpoint."""
        return {
            "processes": distributed.size(),
            "calls": self.calls,
            "matching": self.matching.state_dict(),
            "companions": {name: one.state_dict() for name, one in self.companions.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned.

        Trajectories that another number of processes kept for replay are left out.
        """
        self.calls = int(state["calls"])
        as_many = state["processes"] == distributed.size()
        self.matching.load_state_dict(
            state["matching"] if as_many else {**state["matching"], "buffer": None}
        )
        for name, companion in self.companions.items():
            companion.load_state_dict(state["companions"][name])


def selected_steps(config: TiltConfig, kernel: Kernel, generator: torch.Generator) -> Tensor | None:
    """Return indices (S,) of the steps whose velocities get a gradient; None for all."""
    late, early = config.late_fraction, config.early_fraction
    if late == 1 or early == 1:
        return None
    return select_steps(kernel.steps, late_fraction=late, early_fraction=early, generator=generator)


def batch_diagnostics(
    reward: Tensor, log_w: Tensor, kl: Tensor, terms: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return metrics that say how good the tilt is, by the same formulas as the certificate.

    Arguments:
        reward, log_w, kl: (B,) rewards, log-weights and path KL of trajectories.
        terms: (B,) values of the terms of the reward, which become ``reward.NAME``.
    """
    log_w = distributed.gather(log_w)
    relative = torch.softmax(log_w, 0)
    return {
        "reward": reward.mean(),
        "path_kl": kl.mean(),
        "log_weight_std": log_w.std(correction=0),
        "ess": 1 / (len(relative) * relative.square().sum()),
        **{f"reward.{name}": term.mean() for name, term in terms.items()},
    }
