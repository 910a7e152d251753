"""The losses that a trainer minimises: a base class with the hooks that the training loop calls.

A plain function (module, generator) -> (loss, metrics) is a loss.  One that keeps state, follows
the weights, or is to be evaluated for several runs at once derives from a class of this file:

- `Loss` is called once per update, and may have a state, which checkpoints hold, and a hook that
  runs just before the weights change.
- `SplitLoss` says in separate methods what an update needs from the host, which random inputs it
  draws, and which function of weights and inputs is minimised.  The last two wait for nothing, so
  that they can be evaluated for several runs at once (`flows.training.stacked`) and recorded as a
  CUDA graph (`flows.training.cuda_graphs`).

Every hook has a default that does nothing, so a loss writes only the ones it needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from flows.training import distributed

Metrics = dict[str, Tensor]
Evaluated = tuple[Tensor, Metrics]
LossFunction = Callable[[nn.Module, torch.Generator], Evaluated]
"""A function (module, generator) -> (scalar loss, scalar metrics); every `Loss` is one too."""

HOOKS = ("follow", "before_update", "state_dict", "load_state_dict")


class Loss(ABC):
    """A loss with the hooks of the training loop, all of which do nothing by default.

    Attributes:
        calls: counts the calls made so far where a subclass adds to it.  A program that replays
            recorded calls (`flows.training.GradientGraph`) adds the replayed ones.
    """

    calls: int = 0

    @abstractmethod
    def __call__(self, module: nn.Module, generator: torch.Generator) -> Evaluated:
        """Return the scalar loss of ``module`` and scalar metrics.

        Arguments:
            module: the module in training.
            generator: source of all random numbers of the loss.
        """

    def follow(self, module: nn.Module, metrics: Metrics) -> None:  # noqa: B027  (a hook, not a duty)
        """Run when the metrics of an update are known, before ``before_update``.

        This is the moment to change, in place, buffers that follow from them, such as a dual
        variable.  The loss itself must not change what its gradient depends on.

        Arguments:
            module: the module in training.
            metrics: means over the losses of the update and over all processes, detached.
        """

    def before_update(self, module: nn.Module) -> None:  # noqa: B027  (a hook, not a duty)
        """Run when the gradient is known and clipped, and the weights are still the old ones.

        This is the moment to move networks that follow the weights, such as target networks.  On a
        CPU the gradient has been found finite by then.
        """

    def state_dict(self) -> Mapping[str, Any]:
        """Return what the next call depends on, as tensors and plain data for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore the state that ``state_dict`` returned."""

    @property
    def phase(self) -> Hashable:
        """A value that tells which computation the next call performs; None if it may be any.

        Calls of one phase must perform the same operations on the device, on tensors of the same
        shapes, each at the random numbers that come next, and must take nothing else from the host.
        Then they can be recorded as a CUDA graph; a new phase is recorded anew.
        """
        return None


class SplitLoss(Loss):
    """A loss in three parts: work on the host, random inputs, and a function of the two.

    Attributes:
        compiled: whether ``evaluate`` is compiled (`torch.compile`).
    """

    compiled: bool = False

    def __call__(self, module: nn.Module, generator: torch.Generator) -> Evaluated:
        """Return the loss of one update and the metrics of its parts."""
        host_metrics = self.host_step(module, generator)
        inputs = self.sample(module, generator)
        loss, metrics = self.evaluation(module, inputs)
        return loss, metrics | host_metrics

    def host_step(self, module: nn.Module, generator: torch.Generator) -> Metrics:
        """Do what is due on the host before the next update; return metrics known already."""
        return {}

    @abstractmethod
    def sample(self, module: nn.Module, generator: torch.Generator) -> tuple[Any, ...]:
        """Draw the inputs of the loss, nested tuples and mappings of tensors.

        The inputs must not depend on weights or buffers of ``module``: in a CUDA graph they are
        drawn while an update changes these.  Drawing them must not wait for the device.
        """

    @abstractmethod
    def evaluate(self, module: nn.Module, inputs: tuple[Any, ...]) -> Evaluated:
        """Return the scalar loss at these inputs, and metrics.

        This is a function of weights, buffers and inputs only.  It may change buffers in place.
        """

    @cached_property
    def evaluation(self) -> Callable[[nn.Module, tuple[Any, ...]], Evaluated]:
        """The function ``evaluate``, compiled if ``compiled`` says so."""
        return torch.compile(self.evaluate, dynamic=False) if self.compiled else self.evaluate

    def updates_without_host(self) -> int:
        """Return how many updates from the next on need ``host_step`` only for its metrics.

        Such updates can be recorded and launched together (`flows.training.UpdateGraph`).
        """
        return 0


class FunctionLoss(Loss):
    """A loss that calls a plain function and has no state.

    Arguments:
        function: callable (module, generator) -> (scalar loss, scalar metrics).
    """

    def __init__(self, function: LossFunction) -> None:
        self.function = function

    def __call__(self, module: nn.Module, generator: torch.Generator) -> Evaluated:
        """Call the function."""
        return self.function(module, generator)


def as_loss(loss: LossFunction) -> Loss:
    """Return ``loss`` if it is a `Loss`, and a plain function wrapped as one.

    Raises:
        TypeError: ``loss`` cannot be called, or it has hooks of the training loop but does not
            derive from `Loss`, so that they would not be called.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, type) or not callable(loss):
        raise TypeError(
            f"loss must be a function (module, generator) -> (loss, metrics) or a "
            f"flows.training.Loss, got {loss!r}"
        )
    found = [name for name in (*HOOKS, "before_step") if hasattr(loss, name)]
    if found:
        raise TypeError(
            f"loss must derive from flows.training.Loss for its {', '.join(found)} to be called, "
            f"got {type(loss).__name__}"
        )
    return FunctionLoss(loss)


def mean_metrics(losses: Sequence[Metrics], device: torch.device) -> Metrics:
    """Return the mean of each metric over several losses and over all processes, detached.

    Arguments:
        losses: metrics of each loss, of the same names.
        device: where the means over processes are computed.
    """
    metrics = {name: _mean([metrics[name] for metrics in losses]) for name in losses[0]}
    if distributed.size() == 1:
        return metrics
    values = torch.stack([metric.to(device, torch.float64) for metric in metrics.values()])
    distributed.average_([values])
    return {name: v.to(metrics[name]) for name, v in zip(metrics, values, strict=True)}


def _mean(values: Sequence[Tensor | float]) -> Tensor:
    tensors = [torch.as_tensor(value).detach() for value in values]
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors).mean(0)
