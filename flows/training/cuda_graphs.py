"""CUDA graphs and streams: a block of work is recorded once, and then launched again and again.

A GPU finishes the products of a small network sooner than a process can ask for the next.  A CUDA
graph asks for all of them with one launch.  It repeats the recorded operations on the tensors that
they were recorded on; only random numbers go on from launch to launch, for generators that the
graph knows.  So what is recorded is fixed: shapes, and every number of Python.

`flows.training.update_graph` records whole updates, `flows.training.gradient_graph` losses and
their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch

from flows.training.loss import Metrics

Result = TypeVar("Result")
Block = Callable[[], list[list[Metrics]]]
"""A function without arguments that does the work of several steps; metrics by step and trainer."""
Capture = Callable[[Block, Sequence[torch.Generator]], Block]
"""A function that records a block, and the generators it draws from, and returns its replay."""


def cuda_graph(block: Block, generators: Sequence[torch.Generator]) -> Block:
    """Record ``block`` as a CUDA graph; return a function that replays it and copies its result."""
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


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which streams and graphs belong to ``device``, if it is a GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class SecondStream(AbstractContextManager[None]):
    """A second CUDA stream, for work that can run beside the next work of the current stream."""

    def __init__(self) -> None:
        self._current, self._second = torch.cuda.current_stream(), torch.cuda.Stream()

    def __enter__(self) -> None:
        """Switch to the second stream, after all work that the first one has been given."""
        self._second.wait_stream(self._current)
        torch.cuda.set_stream(self._second)

    def __exit__(self, *_: object) -> None:
        """Switch back to the first stream."""
        torch.cuda.set_stream(self._current)

    def join(self) -> None:
        """Let the first stream wait for the second one."""
        self._current.wait_stream(self._second)


def on_side_stream(block: Callable[[], Result], *, on_cuda: bool) -> Result:
    """Run a block on a side stream without recording it, to warm it up for a recording."""
    if not on_cuda:
        return block()
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        result = block()
    current.wait_stream(side)
    return result
