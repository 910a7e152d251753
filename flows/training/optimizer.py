"""The trained weights of a module: Adam, clipping, and the running average of the weights.

One step i = 0, 1, ... of the weights theta along a gradient g is

    theta = Adam(theta, g, lr_i)            (AdamW with a weight decay)
    ema   = ema + (1 - d_i) (theta - ema),  d_i = min(ema_decay, (1 + i) / (10 + i))

where the warm-up of d_i keeps the random initialisation from lingering in the average.  The rate
lr_i is a function of i alone (``learning_rate``), so it needs no state.  Where a training restarts,
i counts from there.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flows.training import distributed
from flows.training.config import TrainerConfig, learning_rate, stage
from flows.training.ema import WeightAverage
from flows.training.sharding import is_sharded, shards


class AveragedAdam:
    """Adam on the parameters of a module that require gradients, with their running average.

    Arguments:
        module: the module whose weights are trained, in place.
        config: rates, decays and the norm at which gradients are clipped.
        restart: index of the iteration with which the schedules start anew; None for never.

    Attributes:
        parameters: the parameters that are trained.
        ema: the average of the weights as a module in evaluation mode, with buffers copied and
            parameters that require no gradient shared; ``module`` itself if averaging is off.

    Raises:
        ValueError: no parameter of the module requires a gradient, or some of those that do are
            sharded and others are not.
    """

    def __init__(
        self, module: nn.Module, config: TrainerConfig, *, restart: int | None = None
    ) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("module has no parameter that requires a gradient")
        if len({is_sharded(p) for _, p in named}) > 1:
            raise ValueError(
                "some parameters that require a gradient are sharded and others are not: call "
                "fully_shard on the whole module after its parts"
            )
        _warn_of_half_precision(named)
        self.module, self.config, self._restart = module, config, restart
        self.parameters: tuple[Tensor, ...] = tuple(p for _, p in named)
        kind = torch.optim.AdamW if config.weight_decay else torch.optim.Adam
        fused = self.device.type in ("cpu", "cuda")  # elsewhere PyTorch chooses the fastest
        self.adam = kind(
            self.parameters,
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=True if fused else None,
        )
        self._average = WeightAverage(module, named) if config.ema_decay else None
        self.ema = self._average.module if self._average else module

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return self.parameters[0].device

    def zero_grad(self) -> None:
        """Drop the gradients of the last step."""
        self.adam.zero_grad(set_to_none=True)

    def reduce_gradients(self) -> Tensor:
        """Average the gradients over the processes and clip them; return the norm before it."""
        distributed.average_gradients(self.parameters)
        largest = self.config.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters, largest).detach()
        return norm.full_tensor() if is_sharded(norm) else norm  # type: ignore

    def step(self, iteration: int) -> None:
        """Move weights and average along the gradients.

        Arguments:
            iteration: the index i of the step.
        """
        for group in self.adam.param_groups:
            group["lr"] = learning_rate(self.config, iteration, self._restart)
        self.adam.step()
        if self._average:
            done, _ = stage(iteration, self.config.iterations, self._restart)
            self._average.update(min(self.config.ema_decay, (1 + done) / (10 + done)))

    def take_average(self) -> None:
        """Make the average the weights, where averaging is on."""
        if self._average:
            self._average.take()

    def restart(self) -> None:
        """Continue from the average with the moments of Adam forgotten."""
        self.take_average()
        self.adam.state.clear()

    def finite(self) -> bool:
        """Tell whether the weights are finite in all processes; waits for the device."""
        weights = shards(self.parameters)
        finite = torch.stack([p.isfinite().all() for p in weights]).all()
        distributed.average_([found := finite.float()])
        return bool(found == 1)

    @contextmanager
    def capturable(self) -> Iterator[None]:
        """Let Adam be recorded in a CUDA graph; outside of a recording it would warn of that."""
        for group in self.adam.param_groups:
            group["capturable"] = True
        try:
            yield
        finally:
            for group in self.adam.param_groups:
                group["capturable"] = False

    def state_dict(self, *, without: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return weights, average and moments as whole tensors, which the first process gets.

        Arguments:
            without: parameters that are left out, under their names.
        """

        def kept(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return distributed.whole({n: w for n, w in weights.items() if n not in without})

        return {
            "module": kept(self.module.state_dict()),
            "ema": kept(self._average.state_dict()) if self._average else None,
            "optimizer": distributed.whole(self.adam.state_dict()["state"]),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, without: Mapping[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned; ``without`` are parameters as they are now."""
        distributed.load_whole(self.module, state["module"], without)
        if self._average:
            self._average.load_state_dict({**state["ema"], **without})
        groups = self.adam.state_dict()["param_groups"]
        moments = {
            index: {
                name: distributed.sharded_like(value, self.parameters[index])
                for name, value in copy.deepcopy(moment).items()  # Adam would share these tensors
            }
            for index, moment in state["optimizer"].items()
        }
        self.adam.load_state_dict({"state": moments, "param_groups": groups})


def _warn_of_half_precision(named: Sequence[tuple[str, Tensor]]) -> None:
    """Warn that weights in half precision do not keep what a small rate adds to them."""
    half = [name for name, p in named if p.is_floating_point() and p.element_size() < 4]
    if half:
        warnings.warn(
            f"{len(half)} of {len(named)} trained parameters are in half precision, {half[0]} for "
            "one: steps below a few thousandths of a weight are lost, and so is most of a training "
            "at a small rate. Train in float32 (module.float(), with autocast=True for speed), or "
            "train adapters beside them (adjoint.lora)",
            stacklevel=4,
        )
