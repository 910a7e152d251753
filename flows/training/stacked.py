"""Several trainings at once, which share the evaluation of the loss and nothing else.

Modules of one architecture are stacked: each parameter and buffer of S modules becomes one tensor
of shape (S, *), and what the modules hold becomes its slices.  So every module, its optimiser, its
average, its checkpoint and its callbacks stay its own, while the loss

    sum_s loss(theta_s, inputs_s),     d/d theta_s = gradient of run s alone,

is evaluated once, with a leading axis over weights and inputs (``torch.vmap``).  A device makes
many small products in the time of one, so S runs cost little more than one; and each run gets the
numbers that it has alone, up to the rounding of products of another shape.

Such a loss is a `flows.training.loss.SplitLoss`: it draws its inputs run by run, from each one's
own generator, and is a function of weights and inputs that has neither state nor randomness of its
own.  It may change buffers in place.

Runs need not stand at one iteration, as each has its own schedules.  A run that ends or fails
leaves the group, and the last run goes on as if alone, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from flows.training.loss import Evaluated, Metrics, SplitLoss
from flows.training.trainer import Trainer

Result = TypeVar("Result")
Drawn = tuple[tuple[Any, ...], Metrics]
MakeUpdates = Callable[[tuple[Trainer, ...], "StackedTrainers | None"], None]
"""A function that makes several updates of trainers at once (`update_graph.UpdateGraph`)."""


class StackedTrainers:
    """A group of trainers whose losses are evaluated together.

    Arguments:
        trainers: trainers of modules of one architecture, with a `SplitLoss` each, and one
            configuration except for the seed.  The modules share storage until `release`.

    Raises:
        TypeError: a loss is no `SplitLoss`.
        ValueError: the modules, or how their losses are evaluated, differ.
    """

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self.trainers = tuple(trainers)
        for trainer in self.trainers:
            if not isinstance(trainer.loss, SplitLoss):
                raise TypeError(
                    "loss must be a flows.training.SplitLoss where several runs are trained "
                    f"together, got {trainer.loss!r}"
                )
        ways = {(t.config.accumulate, t.config.autocast) for t in self.trainers}
        if len(ways) > 1:
            raise ValueError(f"accumulate and autocast must be the same in all, got {ways}")
        held = [_tensors(trainer.module) for trainer in self.trainers]
        described = [
            {name: (t.shape, t.dtype, t.device, t.requires_grad) for name, t in tensors.items()}
            for tensors in held
        ]
        if any(other != described[0] for other in described):
            raise ValueError("modules must have the same parameters and buffers to train together")
        self._members = {name: [tensors[name] for tensors in held] for name in held[0]}
        self._stacked = {
            name: torch.stack([t.detach() for t in members]).requires_grad_(
                members[0].requires_grad
            )
            for name, members in self._members.items()
        }
        for name, members in self._members.items():
            for member, part in zip(members, self._stacked[name].detach().unbind(), strict=True):
                member.data = part
        # `functional_call` puts the weights of one run in the place of those of the first module.
        self._template = _Evaluation(self.trainers[0])
        self._evaluate = torch.vmap(self._one)
        if cast(SplitLoss, self.trainers[0].loss).compiled:
            self._evaluate = torch.compile(self._evaluate, dynamic=False)

    def step(self) -> list[dict[str, Tensor]]:
        """Make one optimiser step of each trainer; return the metrics of each.

        Raises:
            TrainingDiverged, ValueError: as in `Trainer.step`.
        """
        for trainer in self.trainers:
            trainer.zero_grad()
        self.backward([draw(trainer) for trainer in self.trainers])
        return [trainer.apply() for trainer in self.trainers]

    def backward(self, drawn: Sequence[Sequence[Drawn]]) -> None:
        """Evaluate the losses and gradients of all trainers, as `Trainer.backward` does for one.

        Arguments:
            drawn: the result of `draw` for each trainer.

        Raises:
            ValueError: the loss is not a scalar.
        """
        for of_all in zip(*drawn, strict=True):
            inputs, host_metrics = zip(*of_all, strict=True)
            stacked = pytree.tree_map(lambda *tensors: torch.stack(tensors), *inputs)
            with self.trainers[0].autocast():
                losses, metrics = self._evaluate(self._stacked, stacked)
            if losses.ndim != 1:
                raise ValueError(f"loss must be a scalar, got shape {tuple(losses.shape[1:])}")
            (losses.sum() / len(drawn[0])).backward()
            metrics = {**metrics, "loss": losses.detach()}
            columns = {name: values.unbind() for name, values in metrics.items()}
            for s, (trainer, numbers) in enumerate(zip(self.trainers, host_metrics, strict=True)):
                own = {name: values[s] for name, values in columns.items()}
                trainer.loss_metrics.append({**own, **numbers})
        for name, stack in self._stacked.items():
            if stack.grad is not None:
                for member, gradient in zip(self._members[name], stack.grad.unbind(), strict=True):
                    member.grad = gradient
                stack.grad = None

    def release(self) -> None:
        """Give each module storage of its own again; the group cannot be used afterwards."""
        for members in self._members.values():
            for member in members:
                member.data = member.data.clone()

    def _one(self, tensors: dict[str, Tensor], inputs: tuple[Any, ...]) -> Any:
        return functional_call(self._template, tensors, inputs)


def draw(trainer: Trainer) -> list[Drawn]:
    """Draw the inputs of the losses of the next step, one for each accumulated loss."""
    loss, module, generator = cast(SplitLoss, trainer.loss), trainer.module, trainer.generator
    drawn = []
    for _ in range(trainer.config.accumulate):
        host_metrics = loss.host_step(module, generator)
        drawn.append((loss.sample(module, generator), host_metrics))
    return drawn


def train_stacked(
    runs: Sequence[Generator[Trainer, None, Result]], *, update_graph: MakeUpdates | None = None
) -> list[Result | Exception]:
    """Train several runs to their ends; return the result of each, or the error that ended it.

    An error of one run, such as its divergence, ends that run only; an error of the common
    evaluation is raised.

    Arguments:
        runs: generators such as `Trainer.training`, not begun, perhaps with more around it.  Each
            yields its trainer, always one and the same, when it needs its gradients.  All are
            closed at the end.
        update_graph: makes the updates of several iterations at once where it can.

    Raises:
        TypeError, ValueError: as in `StackedTrainers`.
    """
    going = dict(enumerate(runs))
    ended: dict[int, Result | Exception] = {}

    @contextmanager
    def ending(i: int) -> Iterator[None]:
        try:
            yield
        except StopIteration as stop:
            ended[i] = stop.value
        except Exception as error:
            ended[i] = error
        if i in ended:
            del going[i]

    group: StackedTrainers | None = None
    with ExitStack() as closing:
        for run in runs:
            closing.callback(run.close)
        while going:
            trainers: dict[int, Trainer] = {}
            for i, run in [*going.items()]:
                with ending(i):
                    trainers[i] = next(run)
            due = tuple(trainers.values())
            if update_graph is not None and due and not any(t.unreported for t in due):
                if group is not None and group.trainers != due:
                    group.release()
                    group = None
                if len(due) > 1:
                    group = group or StackedTrainers(due)
                update_graph(due, group)
            if any(trainer.unreported for trainer in due):
                continue
            drawn = {}
            for i, trainer in trainers.items():
                with ending(i), _told(going[i]):
                    if len(trainers) > 1:
                        drawn[i] = draw(trainer)
                    else:
                        trainer.backward()
            members = tuple(trainers[i] for i in drawn)
            if group is not None and group.trainers != members:
                group.release()
                group = None
            if members:
                group = group or StackedTrainers(members)
                group.backward([*drawn.values()])
    return [ended[i] for i in range(len(runs))]


@contextmanager
def _told(run: Generator[Trainer, None, Any]) -> Iterator[None]:
    """Raise an error of the body inside the run, at the place where it waits."""
    try:
        yield
    except Exception as error:
        run.throw(error)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers under their names in `_Evaluation`."""
    held = [*module.named_parameters(), *module.named_buffers()]
    return {f"module.{name}": tensor for name, tensor in held}


class _Evaluation(nn.Module):
    """The function ``evaluate`` of a trainer's loss as a module."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.module = trainer.module
        self._loss = cast(SplitLoss, trainer.loss)

    def forward(self, *inputs: Any) -> Evaluated:
        """Return loss and metrics."""
        return self._loss.evaluate(self.module, inputs)
