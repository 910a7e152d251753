r"""How long an update of `tilt()` takes against a plain loop of adjoint matching.

    python -m benchmarks.tilt_speed [--device cuda --clock wall] [--no-compile]

The plain loop is the published algorithm in PyTorch alone: the Euler-Maruyama chain step by step,
the lean adjoint step by step with ``torch.autograd.grad``, the loss summed over the steps, one step
of Adam (`examples/adjoint_matching.py` writes the chain of the default kernel down likewise).  Both
sides have the same networks, the same kernel
(the published pair), K, batch, precision and optimiser.  Before the clock starts they make six
updates on the same noise, and their losses must agree.  `tilt()` does more than the loop in an
update: it averages the weights and reports log-weights and their effective sample size.

``compiled`` evaluates base and model through ``torch.compile`` on both sides; ``graph``, on a GPU,
also launches loss and gradient of `tilt()` as one CUDA graph.  ``compile_s`` is the wall-clock time
of the first two updates beyond that of two later ones.  Contestants take turns in
blocks; times are medians over the blocks, and ``ratio_to_plain`` is the median over the rounds of
the ratio to the eager plain loop.  On a CPU the processor time of one thread is
measured.
"""

from __future__ import annotations

import copy
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from adjoint import TiltConfig, TiltLoss, ValueFunction, as_reward, draw_noise, make_kernel
from adjoint.models.trainable import trainable
from applications.toy2d.digits.classifier import Classifier, DigitReward
from applications.toy2d.digits.data import DIM, load
from applications.toy2d.digits.mlp_flow import make_flow
from applications.toy2d.rewards import make_reward
from applications.toy2d.targets import find_target
from benchmarks.common.clock import Clock, check_clock, seconds
from benchmarks.common.conv_field import ConvField, square
from benchmarks.common.records import RESULTS
from benchmarks.tilt_speed import figure
from benchmarks.tilt_speed.plain import CLIP, LR, Plain
from flows import MLPVelocity, Trainer, frozen, uniform
from flows.training import GradientGraph, prepare_process, write_json

Row = dict[str, Any]


@dataclass(frozen=True)
class Args:
    """Time an update of tilt() against a plain loop of adjoint matching."""

    device: str = "cpu"
    """Device of the updates: cpu or cuda."""
    threads: int = 1
    """Number of threads on a CPU."""
    clock: Clock = "cpu"
    """Wall-clock time or processor time, see `benchmarks.common.clock`."""
    models: tuple[str, ...] = ("toy, closed form", "toy, network", "digits", "convolutions")
    """Names of models."""
    steps: int = 20
    """Steps K of the chain."""
    batch_size: int = 256
    """Trajectories in each update; the convolutions take an eighth."""
    rounds: int = 7
    """Number of blocks of updates of each contestant."""
    iterations: int = 3
    """Updates in a block."""
    compile: bool = True
    """Also time compiled fields."""
    output: Path = RESULTS / "tilt_speed.json"
    """File of the rows; the figure is written beside it."""

    def __post_init__(self) -> None:
        for name in ("threads", "rounds", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_clock(self.clock, self.device)
        unknown = set(self.models) - PROBLEMS.keys()
        if unknown:
            raise ValueError(f"models must be of {sorted(PROBLEMS)}, got {sorted(unknown)}")


def _toy(base: nn.Module) -> tuple[nn.Module, ValueFunction, tuple[int, ...]]:
    return base, make_reward("linear", find_target("ring")), (2,)


def _closed_form() -> tuple[nn.Module, ValueFunction, tuple[int, ...]]:
    mixture = find_target("ring").mixture
    assert mixture is not None
    return _toy(copy.deepcopy(mixture).float())


def _digits() -> tuple[nn.Module, ValueFunction, tuple[int, ...]]:
    classifier = Classifier().requires_grad_(False)
    return make_flow(load().train), DigitReward(classifier, 3), (DIM,)


PROBLEMS: dict[str, Callable[[], tuple[nn.Module, ValueFunction, tuple[int, ...]]]] = {
    "toy, closed form": _closed_form,
    "toy, network": lambda: _toy(MLPVelocity(2)),
    "digits": _digits,
    "convolutions": lambda: (ConvField(16), square, (1, 16, 16)),
}
"""Makers of base, reward and sample shape; untrained, since no time depends on the weights."""


def contestants(args: Args, name: str) -> dict[tuple[str, str], Callable[[], Tensor]]:
    """Return functions that make an update and return its loss, by (side, mode), from one model."""
    torch.manual_seed(0)
    base, reward, shape = PROBLEMS[name]()
    batch = max(1, args.batch_size // 8) if name == "convolutions" else args.batch_size
    base = frozen(base).to(args.device)
    if isinstance(getattr(reward, "classifier", None), nn.Module):
        reward.classifier.to(args.device)  # type: ignore[attr-defined]
    model = trainable(base, shape, 0).to(args.device)
    with torch.no_grad():  # away from the base, where the control would be zero
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    kernel = make_kernel("euler_published", uniform(args.steps)).to(args.device)

    def plain(*, compile: bool) -> Callable[[], Tensor]:
        generator = torch.Generator(args.device).manual_seed(0)

        def noise() -> tuple[Tensor, Tensor]:
            x0 = torch.randn((batch, *shape), generator=generator, device=args.device)
            return x0, draw_noise(kernel, x0, generator=generator)

        return Plain(base, copy.deepcopy(model), reward, noise, compile=compile).update

    def ours(*, compile: bool, graph: bool = False) -> Callable[[], Tensor]:
        config = TiltConfig(
            kernel=kernel.name,
            steps=args.steps,
            batch_size=batch,
            lr=LR,
            lr_schedule="constant",
            grad_clip=CLIP,
            warmup=0,
            ema_decay=0.999,
            refine_fraction=0.0,
            compile=compile,
        )
        loss = TiltLoss(base, as_reward(reward), kernel, shape=shape, config=config)
        trainer = Trainer(copy.deepcopy(model), loss, config)
        trainer.generator.manual_seed(0)
        if not graph:
            return lambda: trainer.step()["loss"]
        backward = GradientGraph(trainer)

        def update() -> Tensor:
            trainer.zero_grad()
            backward()
            return trainer.apply()["loss"]

        return update

    sides = {"plain loop": plain, "tilt()": ours}
    modes = {"eager": False, "compiled": True} if args.compile else {"eager": False}
    updates = {
        (side, mode): make(compile=compile)
        for mode, compile in modes.items()
        for side, make in sides.items()
    }
    if args.device.startswith("cuda"):
        updates["tilt()", "graph"] = ours(compile=args.compile, graph=True)
    return updates


def measure(args: Args, name: str) -> list[Row]:
    """Time all contestants on one model and return their rows.

    Raises:
        RuntimeError: the losses of two contestants differ on the same noise.
    """
    updates = contestants(args, name)
    losses: dict[tuple[str, str], list[float]] = {}
    first: dict[tuple[str, str], float] = {}
    for who, update in updates.items():
        start = time.perf_counter()
        with (
            tempfile.TemporaryDirectory() as empty
        ):  # an empty cache: nothing compiled by an earlier run
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
            losses[who] = [float(update()), float(update())]
        middle = time.perf_counter()
        losses[who].append(float(update()))
        first[who] = middle - start - 2 * (time.perf_counter() - middle)
    for _ in range(GradientGraph.WARM):  # after which the graph is recorded
        for who, update in updates.items():
            losses[who].append(float(update()))
    reference = losses["plain loop", "eager"]
    for who, found in losses.items():  # a loss is a sum of few large terms, which amplify rounding
        if not all(math.isclose(a, b, rel_tol=1e-2) for a, b in zip(found, reference, strict=True)):
            raise RuntimeError(
                f"{name}: losses of {who} are {found}, of the plain loop {reference}"
            )
    blocks: dict[tuple[str, str], list[float]] = {who: [] for who in updates}
    for i in range(args.rounds):
        for who in list(updates) if i % 2 else reversed(list(updates)):
            blocks[who].append(
                seconds(updates[who], args.iterations, device=args.device, clock=args.clock)
            )
    plain = blocks["plain loop", "eager"]
    return [
        {
            "name": side,
            "model": name,
            "device": args.device,
            "threads": args.threads,
            "mode": mode,
            "ms_per_iteration": 1e3 * statistics.median(found),
            "ratio_to_plain": statistics.median(a / b for a, b in zip(found, plain, strict=True)),
            "compile_s": None if mode == "eager" else first[side, mode],
        }
        for (side, mode), found in blocks.items()
    ]


def main(args: Args) -> list[Row]:
    """Measure, print the table, and write rows and figure."""
    torch.set_num_threads(args.threads)
    rows: list[Row] = []
    for name in args.models:
        rows += (found := measure(args, name))
        for row in found:
            spent = "" if row["compile_s"] is None else f"  compiled in {row['compile_s']:.0f} s"
            print(
                f"{row['model']:<18}{row['name']:<12}{row['mode']:<10}"
                f"{row['ms_per_iteration']:>9.2f} ms{row['ratio_to_plain']:>7.2f}{spent}",
                flush=True,
            )
    write_json(args.output, rows)
    figure.plot(args.output.with_suffix(".png"), rows)
    return rows


if __name__ == "__main__":
    prepare_process()
    main(tyro.cli(Args, prog="python -m benchmarks.tilt_speed"))
