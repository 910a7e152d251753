"""Peak memory of the adjoint pass and of an update, and how much each option saves.

    python -m benchmarks.memory

Rows {name, steps, device, peak_mb, ratio, seconds} in three groups:

adjoint pass
    `lean_adjoint` along K steps: the peak beyond its inputs and outputs, which are reported as the
    stored trajectory.  Ratios are to the fewest steps: the peak does not grow with K, only the
    trajectory does.
update
    Rollout, adjoint, loss and gradient of a convolutional field, whose memory is activations.
    Ratios are to the update without options.
training
    Two iterations of the trainer on a wide perceptron, whose memory is weights: those of base,
    model and average, the gradient and the optimiser's moments; and the checkpoint on the disk.
    Ratios are to the training of all weights.

On a CPU tensors are counted operation by operation, and the device of offloading is simulated
(`benchmarks.memory.ledger`); on a GPU the allocator reports the peak.  Seconds are the time of one
run without counting.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, autocast

from adjoint import (
    Reward,
    TiltConfig,
    TiltLoss,
    draw_noise,
    lean_adjoint,
    lora,
    make_kernel,
    rollout,
)
from benchmarks.common.conv_field import ConvField, square
from benchmarks.common.records import RESULTS
from benchmarks.memory.ledger import HOST, Ledger, simulated_device
from flows import MLPVelocity, Trainer, frozen, uniform
from flows.training import write_json

SHAPE = (1, 16, 16)
MB = 2**20
OPTIONS: dict[str, dict[str, Any]] = {
    "update": {},
    "late_fraction=0.25, early_fraction=0.25": {"late_fraction": 0.25, "early_fraction": 0.25},
    "batch_size=2, accumulate=4": {"batch_size": 2, "accumulate": 4},
    "micro_batch=8": {"micro_batch": 8},
    "batch_size=32, micro_batch=8": {"batch_size": 32, "micro_batch": 8},
    "batch_size=32, micro_batch=8, offload": {"batch_size": 32, "micro_batch": 8, "offload": True},
    "autocast": {"autocast": True},
    "micro_batch=8, autocast": {"micro_batch": 8, "autocast": True},
}


@dataclass(frozen=True)
class Args:
    """Measure peak memory of the adjoint pass, and what each option for large models saves."""

    steps: tuple[int, ...] = (10, 40, 160)
    """Steps K of the adjoint passes, the fewest first."""
    update_steps: int = 20
    """Steps of the updates."""
    batch_size: int = 8
    """Number of trajectories."""
    width: int = 32
    """Channels of the convolutional field, and a thirty-second of the perceptron's width."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device of the measurements: cpu or cuda."""
    output: Path = RESULTS / "memory.json"
    """File of the rows."""


def measure(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Return the peak memory of ``run`` in MB, and the seconds of a second run."""
    if device == "cpu":
        with Ledger() as ledger:
            run()
        peak = ledger.peak
    else:
        run()  # the first run allocates workspaces
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated() - before
    began = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return peak / MB, time.perf_counter() - began


def adjoint_rows(args: Args) -> list[dict[str, Any]]:
    """Measure the adjoint pass for each number of steps."""
    rows: list[dict[str, Any]] = []
    base = frozen(ConvField(args.width)).to(args.device)
    for steps in args.steps:
        kernel = make_kernel("ancestral", uniform(steps)).to(args.device)
        x0 = torch.randn(args.batch_size, *SHAPE, device=args.device)
        trajectory = rollout(base, base, kernel, x0, draw_noise(kernel, x0))
        xs = trajectory.xs

        def run(xs: Tensor = xs, kernel: Any = kernel) -> None:
            lean_adjoint(base, kernel, xs, xs[-1])

        peak, seconds = measure(run, args.device)
        results = (xs.nbytes + trajectory.v.nbytes) / MB  # adjoints, and v_β along the trajectory
        stored = results + (xs.nbytes + trajectory.noise.nbytes + trajectory.v.nbytes) / MB
        common = {"steps": steps, "device": args.device}
        rows.append({"name": "adjoint pass", **common, "peak_mb": peak - results})
        rows[-1] |= {"ratio": rows[-1]["peak_mb"] / rows[0]["peak_mb"], "seconds": seconds}
        stored_row = {"name": "stored trajectory", **common, "peak_mb": stored, "seconds": 0.0}
        rows.append(stored_row | {"ratio": stored / rows[0]["peak_mb"]})
    return rows


def update_row(args: Args, name: str, *, checkpointed: bool = False) -> dict[str, Any]:
    """Measure an update with the options ``name`` of `OPTIONS`; the row lacks the ratio."""
    options = {"steps": args.update_steps, "batch_size": args.batch_size} | OPTIONS[name]
    config = TiltConfig(kernel="ancestral", refine_fraction=0.0, **options)
    model = ConvField(args.width, checkpointed=checkpointed).to(args.device)
    kernel = make_kernel(config.kernel, uniform(config.steps)).to(args.device)
    simulated = config.offload and args.device == "cpu"
    generator = torch.Generator(args.device)

    def run(storage_device: torch.device | None = None) -> None:
        loss = TiltLoss(
            frozen(model),
            Reward(square),
            kernel,
            shape=SHAPE,
            config=config,
            storage_device=storage_device,
        )
        model.zero_grad()
        for _ in range(config.accumulate):
            with autocast(args.device, torch.bfloat16, config.autocast, cache_enabled=False):
                value, _ = loss(model, generator)
            value.backward()

    peak, seconds = measure(run, args.device)
    if simulated:
        with simulated_device() as ledger:
            run(HOST)
        peak = ledger.peak / MB
    device = "simulated" if simulated else args.device
    row = {"name": name, "steps": config.steps, "device": device, "peak_mb": peak}
    return row | {"seconds": seconds}


def training_rows(args: Args, *, adapted: bool) -> list[dict[str, Any]]:
    """Measure two iterations on all weights or on adapters, and their checkpoint."""
    config = TiltConfig(
        kernel="ancestral",
        steps=10,
        batch_size=args.batch_size,
        iterations=2,
        refine_fraction=0.0,
    )
    kernel = make_kernel(config.kernel, uniform(config.steps)).to(args.device)
    name = "adapters of rank 8 trained" if adapted else "all weights trained"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"

        def run() -> None:
            field = MLPVelocity(64, hidden=[32 * args.width] * 4).to(args.device)
            model, base = lora(field) if adapted else (field, frozen(field))
            loss = TiltLoss(base, Reward(square), kernel, shape=(64,), config=config)
            Trainer(model, loss, config, checkpoint=path, save_frozen=False).fit()

        peak, seconds = measure(run, args.device)
        size = path.stat().st_size / MB
    row = {"name": name, "steps": config.steps, "device": args.device, "peak_mb": peak}
    on_disk = row | {"name": f"checkpoint, {name}", "device": "disk", "peak_mb": size}
    return [row | {"seconds": seconds}, on_disk | {"seconds": 0.0}]


def main(args: Args) -> list[dict[str, Any]]:
    """Measure, print and write all rows."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = adjoint_rows(args)
    updates = [update_row(args, name) for name in OPTIONS]
    updates.append(update_row(args, "update", checkpointed=True))
    updates[-1]["name"] = "blocks of the model checkpointed"
    rows += [row | {"ratio": row["peak_mb"] / updates[0]["peak_mb"]} for row in updates]
    full = training_rows(args, adapted=False)
    try:
        low_rank = training_rows(args, adapted=True)
    except ImportError as error:
        print(f"no rows of low-rank adapters: {error}")
        low_rank = []
    for i, row in enumerate(full + low_rank):
        rows.append(row | {"ratio": row["peak_mb"] / full[i % 2]["peak_mb"]})
    print(f"{'':<40}{'K':>5}{'device':>11}{'MB':>10}{'ratio':>8}{'s':>8}")
    for row in rows:
        print(
            f"{row['name']:<40}{row['steps']:>5}{row['device']:>11}{row['peak_mb']:>10.2f}"
            f"{row['ratio']:>8.3f}{row['seconds']:>8.2f}"
        )
    write_json(args.output, rows)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m benchmarks.memory"))
