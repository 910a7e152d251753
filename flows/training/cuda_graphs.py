"""Updates of trainers recorded once as a CUDA graph, then replayed: whole ones, or their gradient.

A GPU finishes the products of a small network sooner than a process can ask for the next.

Many updates a launch (`UpdateGraph`).  N whole updates (inputs drawn, loss, gradient, target
networks, optimiser) are recorded as one graph, and each launch replays them: the same functions in
the same order on the same random streams, for generators that a graph knows go on from launch
to launch.
The host does what is left to it, which is to count, to log, and to save.

What is recorded is fixed: shapes, the rate of the optimiser, every number of Python.  So an update
must not need the host.  This asks for a loss in parts (`flows.training.loss.SplitLoss`), and for a
trainer with a constant rate and no average (`check_recordable`).

The first N updates that could be launched are made one by one, on the stream that is then recorded:
they compile what is compiled, and bring about the state of the optimiser.

A launch an update (`GradientGraph`).  Loss and gradient are recorded, and the host does the
rest: schedules of rates and averages may be as they like.  A loss must do the same at each call of
one phase (`flows.training.loss.Loss.phase`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from flows.training import distributed
from flows.training.loss import Loss, Metrics, SplitLoss
from flows.training.stacked import StackedTrainers
from flows.training.trainer import Trainer

Result = TypeVar("Result")
Block = Callable[[], list[list[Metrics]]]
Capture = Callable[[Block, Sequence[torch.Generator]], Block]


class UpdateGraph:
    """Makes N updates of trainers at a time, where they can be made ahead of callbacks.

    Arguments:
        updates: N.
        capture: makes of a function without arguments, and the generators it draws from, one that
            replays what it does.

    Raises:
        ValueError: ``updates`` below 1.
    """

    def __init__(self, updates: int, *, capture: Capture | None = None) -> None:
        if updates < 1:
            raise ValueError(f"updates of a launch must be at least 1, got {updates}")
        self.updates = updates
        self._on_cuda = capture is None
        self._capture = capture or cuda_graph
        self._trainers: tuple[Trainer, ...] = ()
        self._together: StackedTrainers | None = None
        self._warm = False
        self._launch: Block | None = None

    def __call__(self, trainers: tuple[Trainer, ...], together: StackedTrainers | None) -> None:
        """Make the next N updates of each, whose ``made`` then holds what they are to report.

        Does nothing where fewer are left, where they need the host, or between multiples of N.

        Arguments:
            trainers: on one CUDA device.
            together: what evaluates their losses as one, if they are several.

        Raises:
            TypeError, ValueError: what cannot be recorded, see `check_recordable`.
        """
        if (trainers, together) != (self._trainers, self._together):
            for trainer in trainers:
                check_recordable(trainer, self.updates, cuda=self._on_cuda)
            self._trainers, self._together = trainers, together
            self._warm, self._launch = False, None
        if not all(self._can_go_ahead(trainer) for trainer in trainers):
            return
        with _using(trainers[0].generator.device):
            self._go_ahead()

    def _go_ahead(self) -> None:
        trainers = self._trainers
        if not self._warm:
            blocks = _on_side_stream(self._block, on_cuda=self._on_cuda)
            self._warm = True
        else:
            if self._launch is None:
                generators = [trainer.generator for trainer in trainers]
                with _capturable(trainers):
                    self._launch = self._capture(self._block, generators)
            blocks = self._launch()
        for results in blocks:
            for trainer, result in zip(trainers, results, strict=True):
                loss = cast(SplitLoss, trainer.loss)
                trainer.made.append(result | loss.host_step(trainer.module, trainer.generator))

    def _can_go_ahead(self, trainer: Trainer) -> bool:
        loss = cast(SplitLoss, trainer.loss)
        left = min(loss.updates_without_host(), trainer.config.iterations - trainer.iteration)
        return left >= self.updates and trainer.iteration % self.updates == 0

    def _block(self) -> list[list[Metrics]]:
        """N updates; their metrics by trainer.

        What the next update draws does not depend on this one: a second stream draws it meanwhile.
        That stream waits for each update before, so that it never takes memory still in use.
        """
        beside = _Beside() if self._on_cuda else nullcontext()
        results, following = [], self._draw()
        for left in reversed(range(self.updates)):
            inputs = following
            if left:
                with beside:
                    following = self._draw()
            results.append(self._update(inputs))
            if left and isinstance(beside, _Beside):
                beside.join()
        return results

    def _draw(self) -> list[tuple[Any, ...]]:
        """The inputs of an update of each trainer."""
        return [
            cast(SplitLoss, trainer.loss).sample(trainer.module, trainer.generator)
            for trainer in self._trainers
        ]

    def _update(self, inputs: Sequence[tuple[Any, ...]]) -> list[Metrics]:
        for trainer in self._trainers:
            trainer.prepare()
        if self._together is not None:
            self._together.backward([[(drawn, {})] for drawn in inputs])
        else:
            loss = cast(SplitLoss, self._trainers[0].loss)
            self._trainers[0].backward(lambda module, _: loss.evaluation(module, inputs[0]))
        results = [trainer.collect() for trainer in self._trainers]
        for trainer in self._trainers:
            trainer.change()
        return results


class GradientGraph:
    """Losses and gradients of the updates of a trainer, recorded once, then replayed.

    What ``trainer.backward()`` does becomes one launch, and all else of an update stays with the
    host: its schedule of rates, clipping, the optimiser, the average.  That is for updates of so
    many kernels that the rest does not count, such as those of a tilt.  The first `WARM` of a
    phase of the loss are made one by one.

    Arguments:
        trainer: on a CUDA device, whose loss says its phase.
        capture: as in `UpdateGraph`.

    Raises:
        TypeError: the loss has no phase.
        ValueError: another device, or one of several processes.
    """

    WARM = 3

    def __init__(self, trainer: Trainer, *, capture: Capture | None = None) -> None:
        device = trainer.generator.device
        if capture is None and device.type != "cuda":
            raise ValueError(
                f"updates can be recorded as a CUDA graph on cuda, got device {device}"
            )
        if distributed.size() > 1:
            raise ValueError(f"updates are recorded in one process, got {distributed.size()}")
        if trainer.loss.phase is None:
            raise TypeError(
                "loss must say in its property phase which calls repeat each other "
                f"(flows.training.Loss.phase) to be recorded, got None from {trainer.loss!r}"
            )
        self._trainer, self._device, self._on_cuda = trainer, device, capture is None
        self._capture = capture or cuda_graph
        self._phase: Hashable = None
        self._made = 0
        self._launch: Block | None = None
        self._gradients: list[Tensor | None] = []

    def __call__(self) -> None:
        """What ``trainer.backward()`` does.

        Raises:
            ValueError: what it does cannot be recorded, such as a reward that reads numbers of it.
        """
        with _using(self._device):
            self._make()

    def _make(self) -> None:
        trainer = self._trainer
        loss = trainer.loss
        if self._made == 0 or self._phase != loss.phase:
            self._phase, self._made, self._launch = loss.phase, 0, None
        self._made += 1
        if self._made <= self.WARM:
            _on_side_stream(trainer.backward, on_cuda=self._on_cuda)
            return
        if self._launch is None:
            self._launch = self._record(loss)
        (trainer.parts[:],) = self._launch()
        loss.calls += trainer.config.accumulate
        for parameter, gradient in zip(trainer.parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _record(self, loss: Loss) -> Block:
        trainer = self._trainer

        def block() -> list[list[Metrics]]:
            calls = loss.calls
            trainer.backward()
            loss.calls = calls
            self._gradients = [parameter.grad for parameter in trainer.parameters]
            return [list(trainer.parts)]

        try:
            return self._capture(block, [trainer.generator])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a broken recording fails too
            raise ValueError(
                "the update cannot be recorded as a CUDA graph; a loss that waits for the GPU or "
                "draws on the CPU (its reward, base or sampler of conditions) needs graph=False, "
                f"in a new process: {cause}"
            ) from error


def _using(device: torch.device) -> AbstractContextManager[object]:
    """Where streams and graphs are of ``device``, if it is a GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Beside(AbstractContextManager[None]):
    """A second stream, for what can be done beside what the current one is given next."""

    def __init__(self) -> None:
        self._current, self._second = torch.cuda.current_stream(), torch.cuda.Stream()

    def __enter__(self) -> None:
        """Use it, after all that the first has been given."""
        self._second.wait_stream(self._current)
        torch.cuda.set_stream(self._second)

    def __exit__(self, *_: object) -> None:
        """Use the first again."""
        torch.cuda.set_stream(self._current)

    def join(self) -> None:
        """Let the first wait for the second."""
        self._current.wait_stream(self._second)


def _on_side_stream(block: Callable[[], Result], *, on_cuda: bool) -> Result:
    """The block, for once not recorded, on a stream like that on which it will be."""
    if not on_cuda:
        return block()
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        result = block()
    current.wait_stream(side)
    return result


def check_recordable(trainer: Trainer, updates: int, *, cuda: bool = True) -> None:
    """Refuse a trainer whose updates need the host.

    Raises:
        TypeError: its loss is not a `SplitLoss`.
        ValueError: it is not on a CUDA device, one of several processes, accumulates losses, has a
            schedule of rates, an average or a restart, or saves within N updates.
    """
    config, device = trainer.config, trainer.generator.device
    if cuda and device.type != "cuda":
        raise ValueError(f"updates can be recorded as a CUDA graph on cuda, got device {device}")
    if not isinstance(trainer.loss, SplitLoss):
        raise TypeError(
            "loss must be a flows.training.SplitLoss where updates are recorded, "
            f"got {trainer.loss!r}"
        )
    if distributed.size() > 1:
        raise ValueError(f"updates are recorded in one process, got {distributed.size()}")
    expected = {"lr_schedule": "constant", "warmup": 0, "ema_decay": 0, "accumulate": 1}
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} must be {value!r} where updates are recorded, got {getattr(config, name)}"
            )
    if config.checkpoint_every % updates:
        raise ValueError(
            f"checkpoint_every must be a multiple of {updates}, the updates of a launch, got "
            f"{config.checkpoint_every}"
        )
    if config.restart is not None:
        raise ValueError(f"a recorded training cannot restart, got restart {config.restart}")


@contextmanager
def _capturable(trainers: Sequence[Trainer]) -> Iterator[None]:
    """Let optimisers be recorded; they warn of being able to when they are not."""
    groups = [group for trainer in trainers for group in trainer._optimizer.param_groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False


def cuda_graph(block: Block, generators: Sequence[torch.Generator]) -> Block:
    """A CUDA graph of ``block``; each call of the result replays it and copies what it gave."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        fixed = block()
        names = [[list(result) for result in results] for results in fixed]
        numbers = [m.float() for results in fixed for result in results for m in result.values()]
        stacked = torch.stack(numbers)

    def launch() -> list[list[Metrics]]:
        graph.replay()
        values = iter(stacked.clone().unbind())
        return [[{n: next(values) for n in of_one} for of_one in of_all] for of_all in names]

    return launch
