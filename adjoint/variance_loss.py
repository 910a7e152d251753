"""The loss of the refinement: half the variance of the log-weights of a batch."""

from __future__ import annotations

import torch
from torch import nn

from adjoint.batch_diagnostics import batch_diagnostics
from adjoint.certificate import path_log_ratio
from adjoint.chain.kernels import Kernel
from adjoint.loss import log_variance_loss
from adjoint.models.lora import prepare_dropout
from adjoint.trajectory_source import TrajectorySource
from flows.training import distributed
from flows.training.loss import Evaluated, Loss

GROUP = 8
"""Trajectories that share a condition where the spread of their log-weights is the loss."""


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
        self.source, self.kernel = source, kernel
        self.n, self.groups, self.processes = distributed.share(config.batch_size), 1, 1
        if source.cond_sampler is not None:
            if self.n < 2:
                raise ValueError(
                    "refine_loss='log_variance' compares trajectories under one condition: "
                    f"batch_size must be at least {2 * distributed.size()} for "
                    f"{distributed.size()} processes, got {config.batch_size}"
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
        steps = source.select_steps(kernel, generator)
        prepare_dropout(module)
        v = source.velocities(source.model(module), kernel, xs, steps, cond)
        if steps is not None:
            v = trajectory.v.index_copy(0, steps.to(v.device), v)
        log_ratio, kl = path_log_ratio(trajectory, v_base, kernel, v)
        log_w = value + log_ratio
        loss = log_variance_loss(distributed.gather(log_w), self.groups * self.processes)
        return loss, batch_diagnostics(value, log_w.detach(), kl.detach(), terms)
