"""The adjoint-matching loss of a tilt, with its replay buffer, cap and importance weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adjoint.batch_diagnostics import batch_diagnostics
from adjoint.chain.adjoints import Adjoint
from adjoint.chain.kernels import Kernel
from adjoint.loss import adjoint_matching_loss, importance_weights
from adjoint.models.lora import prepare_dropout
from adjoint.trajectory_batch import TrajectoryBatch
from adjoint.trajectory_buffer import TrajectoryBuffer
from adjoint.trajectory_source import TrajectorySource
from flows.training import distributed
from flows.training.loss import Evaluated, Loss


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
        steps = self.source.select_steps(self.kernel, generator)
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
