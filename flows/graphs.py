"""Many updates a launch: the updates of trainers recorded once as a CUDA graph, then replayed.

A GPU finishes the products of a small network sooner than a process can ask for the next.  Here
N whole updates (inputs drawn, loss, gradient, slow copies, optimiser) are recorded as one graph,
and each launch replays them: the same functions in the same order on the same random streams, for
generators that a graph knows go on from launch to launch.  The host does what is left to it, which
is to count, to log, and to save.

What is recorded is fixed: shapes, the rate of the optimiser, every number of Python.  So an update
must not need the host.  Of a loss this asks for three parts (`RecordedLoss`), and of a trainer
(`check_recordable`) a constant rate and no average.

The first N updates that could be launched are made one by one, on the stream that is then recorded:
they compile what is compiled, and bring about the state of the optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from flows import distributed
from flows.together import Together, TwoPartLoss
from flows.trainer import Trainer

Metrics = dict[str, Tensor]
Block = Callable[[], list[list[Metrics]]]
Capture = Callable[[Block, Sequence[torch.Generator]], Block]


class RecordedLoss(TwoPartLoss, Protocol):
    """A loss whose ``draw`` is ``proceed``, for the host, and ``sample``, for the device."""

    def proceed(self, module: nn.Module, generator: torch.Generator) -> Metrics:
        """What is due on the host before the next update; metrics known already."""
        ...

    def sample(self, module: nn.Module, generator: torch.Generator) -> tuple[Any, ...]:
        """Inputs of the loss, drawn without waiting for the device."""
        ...

    def ahead(self) -> int:
        """How many updates from the next on need nothing of the host but to be counted."""
        ...


class Launcher:
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
        self._together: Together | None = None
        self._warm = False
        self._launch: Block | None = None

    def __call__(self, trainers: tuple[Trainer, ...], together: Together | None) -> None:
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
        if not self._warm:
            blocks = self._on_side_stream()
            self._warm = True
        else:
            if self._launch is None:
                generators = [trainer.generator for trainer in trainers]
                with _capturable(trainers):
                    self._launch = self._capture(self._block, generators)
            blocks = self._launch()
        for results in blocks:
            for trainer, result in zip(trainers, results, strict=True):
                loss = cast(RecordedLoss, trainer.loss)
                trainer.made.append(result | loss.proceed(trainer.module, trainer.generator))

    def _can_go_ahead(self, trainer: Trainer) -> bool:
        loss = cast(RecordedLoss, trainer.loss)
        left = min(loss.ahead(), trainer.config.iterations - trainer.iteration)
        return left >= self.updates and trainer.iteration % self.updates == 0

    def _block(self) -> list[list[Metrics]]:
        """N updates; their metrics by trainer."""
        return [self._update() for _ in range(self.updates)]

    def _update(self) -> list[Metrics]:
        inputs = []
        for trainer in self._trainers:
            trainer.prepare()
            loss = cast(RecordedLoss, trainer.loss)
            inputs.append(loss.sample(trainer.module, trainer.generator))
        if self._together is not None:
            self._together.backward([[(drawn, {})] for drawn in inputs])
        else:
            self._trainers[0].backward(lambda module, _: loss.evaluate(module, inputs[0]))
        results = [trainer.collect() for trainer in self._trainers]
        for trainer in self._trainers:
            trainer.change()
        return results

    def _on_side_stream(self) -> list[list[Metrics]]:
        """The block, for once not recorded, on a stream like that on which it will be."""
        if not self._on_cuda:
            return self._block()
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            result = self._block()
        current.wait_stream(side)
        return result


def check_recordable(trainer: Trainer, updates: int, *, cuda: bool = True) -> None:
    """Refuse a trainer whose updates need the host.

    Raises:
        TypeError: its loss is not a `RecordedLoss`.
        ValueError: it is not on a CUDA device, one of several processes, accumulates losses, has a
            schedule of rates, an average or a restart, or saves within N updates.
    """
    config, device = trainer.config, trainer.generator.device
    if cuda and device.type != "cuda":
        raise ValueError(f"updates can be recorded as a CUDA graph on cuda, got device {device}")
    missing = [part for part in ("proceed", "sample", "ahead") if not hasattr(trainer.loss, part)]
    if missing:
        raise TypeError(f"loss must have the parts of a RecordedLoss, lacks {', '.join(missing)}")
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
