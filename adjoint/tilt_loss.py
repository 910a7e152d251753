"""The loss of a tilt as a trainer calls it: adjoint matching, then, if asked for, refinement.

`MatchingLoss` (`adjoint.matching_loss`) rolls the current model out or replays trajectories, runs
the lean adjoint back, and evaluates `adjoint.loss.adjoint_matching_loss` on the selected steps.
In the last part of a training `TiltLoss` takes another loss, by default `FlowMatchingLoss`
(`adjoint.flow_matching_loss`): flow matching on samples that are drawn by their weights,
where these know the tilt better than the model.  `VarianceLoss` (`adjoint.variance_loss`) evaluates
`adjoint.loss.log_variance_loss` on fresh trajectories: it needs no adjoint, and its noise vanishes
at the optimum.  Your own trainer takes `TiltLoss` as it is.

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
from typing import Any, Protocol

import torch
from torch import nn

from adjoint.chain.kernels import Kernel
from adjoint.config import TiltConfig
from adjoint.flow_matching_loss import FlowMatchingLoss
from adjoint.matching_loss import MatchingLoss
from adjoint.rewards.reward import AbstractReward
from adjoint.trajectory_source import CondSampler, TrajectorySource
from adjoint.variance_loss import VarianceLoss
from flows.field import VelocityField
from flows.training import distributed
from flows.training.loss import Evaluated, Loss


class Stateful(Protocol):
    """An object whose state a checkpoint keeps."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state as tensors and plain data."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""


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
        progress: show a bar while samples are drawn for the refinement.

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
        progress: bool = False,
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
        self.refining: VarianceLoss | FlowMatchingLoss | None = None
        final = (refine_kernel or kernel).to(storage_device)
        if config.refine_updates and config.refine_loss == "log_variance":
            self.refining = VarianceLoss(self.source, final)
        elif config.refine_updates:
            self.refining = FlowMatchingLoss(
                self.source,
                final,
                self.matching,
                renewal=config.refine_updates // 2 * config.accumulate,
                always=config.refine_loss == "flow_matching",
                progress=progress,
            )
        self.companions = dict(companions or {})
        first = config.refine_from
        self._matching_calls = None if first is None else first * config.accumulate

    @property
    def phase(self) -> str:
        """Return the loss that the next call takes: "match", or "refine" with its own phase."""
        loss = self._next_loss()
        return "match" if loss is self.matching else f"refine {loss.phase}"

    def __call__(self, module: nn.Module, generator: torch.Generator) -> Evaluated:
        """Return the loss of ``module`` on one batch, and metrics."""
        loss, metrics = self._next_loss()(module, generator)
        self.calls += 1
        return loss, metrics

    def _next_loss(self) -> Loss:
        """Return the loss that the next call takes, with the number of its calls so far.

        Replayed calls of a recording are counted in ``calls`` of this loss only.
        """
        before = self._matching_calls
        if self.refining is None or before is None or self.calls < before:
            return self.matching
        self.refining.calls = self.calls - before
        return self.refining

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both losses and of the companions, for a checkpoint."""
        return {
            "processes": distributed.size(),
            "calls": self.calls,
            "matching": self.matching.state_dict(),
            "refining": {} if self.refining is None else self.refining.state_dict(),
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
        if self.refining is not None:
            self.refining.load_state_dict(state["refining"])
        for name, companion in self.companions.items():
            companion.load_state_dict(state["companions"][name])
