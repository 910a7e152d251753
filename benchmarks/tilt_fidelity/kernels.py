"""Every kernel is trained on every moderate problem, at equal training budgets.

For each row one network is trained, from the same seed and with the same number of updates and
trajectories, and compared with the exact tilt (`benchmarks.tilt_fidelity.metrics`).  The columns
log_weight_std and ess are the certificate, on the kernel's own chain.
"""

from __future__ import annotations

import json
import statistics
import time
from functools import cache
from pathlib import Path

import torch
from torch import nn

from adjoint import TiltConfig, tilt
from adjoint.chain.conditional_covariance import MAX_DIM
from benchmarks.common.figures import kernel_comparison
from benchmarks.common.jobs import completed
from benchmarks.common.problems import Problem, make_problem, names
from benchmarks.tilt_fidelity.config import SCHEMES, FidelityConfig
from benchmarks.tilt_fidelity.metrics import (
    Row,
    flow_samples,
    mode_tv,
    velocity_error,
    w2_ratio,
)
from flows import MLPVelocity, Residual
from flows.training import write_json

MODE_SAMPLES = 100_000
"""Samples of mode_tv; rows at 700 updates without the suffix _refined were recorded with
20,000."""
REFINED = 0.7
"""Fraction of the updates on the log-variance loss in a kernel with the suffix _refined."""


def make_model(problem: Problem, width: int = 64) -> nn.Module:
    """Make the network of every run: a zero-initialised residual on the base."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Residual(problem.base, MLPVelocity(problem.dim, hidden=[width] * 3, zero_init=True))


def measure(name: str, kernel: str, steps: int, config: FidelityConfig) -> Row:
    """Train one tilt and compare it with the exact one."""
    problem = make_problem(name)
    options = TiltConfig(
        kernel=kernel.removesuffix("_weighted").removesuffix("_refined"),
        importance=kernel.endswith("_weighted"),
        refine_fraction=REFINED if kernel.endswith("_refined") else 0.0,
        refine_loss="log_variance",
        steps=steps,
        iterations=config.iterations,
        batch_size=config.batch_size,
        lr=2e-3,
        warmup=0,
        ema_decay=0.999,
    )
    started = time.perf_counter()
    result = tilt(
        problem.base,
        problem.reward,
        shape=(problem.dim,),
        config=options,
        model=make_model(problem),
    )
    seconds = time.perf_counter() - started
    assert result.certificate is not None
    x = flow_samples(result.field, problem.dim, MODE_SAMPLES)
    return {
        "problem": name,
        "dim": problem.dim,
        "kernel": kernel,
        "steps": steps,
        "velocity_error": velocity_error(problem, result.field),
        "mode_tv": mode_tv(problem, x),
        "w2_ratio": w2_ratio(problem, x),
        "log_weight_std": result.certificate.log_weight_std,
        "ess": result.certificate.ess,
        "seconds": seconds,
        "iterations": config.iterations,
        "batch_size": config.batch_size,
    }


def pending(config: FidelityConfig, rows: list[Row]) -> list[tuple[str, str, int]]:
    """Return the (problem, kernel, steps) that have no row at this budget yet."""
    budget = (config.iterations, config.batch_size)
    done = {
        (row["problem"], row["kernel"], row["steps"]) for row in rows if budget_of(row) == budget
    }
    asked = [
        (name, kernel, steps)
        for steps in config.steps
        for kernel in config.kernels
        for name in config.problems or names()
    ]
    return [job for job in asked if job not in done and serves(*job[:2])]


def serves(name: str, kernel: str) -> bool:
    """Return whether the kernel serves the dimension of the problem."""
    return not kernel.startswith("covariance_matched") or dimension(name) <= MAX_DIM


@cache
def dimension(name: str) -> int:
    """Return the dimension of a problem."""
    return make_problem(name).dim


def compare_kernels(config: FidelityConfig, output: Path) -> None:
    """Run the missing jobs, add their rows to ``output``, print the table and draw the figure."""
    rows: list[Row] = json.loads(output.read_text()) if output.exists() else []
    jobs = [(*job, config) for job in pending(config, rows)]
    for row in completed(measure, jobs, workers=config.workers, name="tilts"):
        rows.append(row)
        write_json(output, rows)
    print(summary(rows))
    compared = [row for row in rows if budget_of(row) == FidelityConfig.budget()]
    figure = output.with_suffix(".png")
    print(f"wrote {kernel_comparison(figure, compared or rows, kernels=SCHEMES)}")


def summary(rows: list[Row]) -> str:
    """Return a table of median and worst over the problems, by budget, K and kernel."""
    metrics = ("velocity_error", "mode_tv", "w2_ratio", "log_weight_std", "ess")
    lines = []
    for budget in sorted({budget_of(row) for row in rows}):
        own = [row for row in rows if budget_of(row) == budget]
        heading = f"{budget[0]} updates of {budget[1]}"
        lines.append(f"{heading:<26}{'K':>4}" + "".join(f"{m + ' med/max':>24}" for m in metrics))
        for steps in sorted({int(row["steps"]) for row in own}):
            for kernel in dict.fromkeys(row["kernel"] for row in own):
                chosen = [r for r in own if r["kernel"] == kernel and r["steps"] == steps]
                if not chosen:
                    continue
                cells = []
                for m in metrics:
                    values = [float("nan") if r[m] is None else float(r[m]) for r in chosen]
                    worst = min(values) if m == "ess" else max(values)
                    cells.append(f"{statistics.median(values):>15.3f} /{worst:>7.3f}")
                lines.append(f"{kernel:<26}{steps:>4}" + "".join(cells))
    return "\n".join(lines)


def budget_of(row: Row) -> tuple[int, int]:
    """Return the updates and the batch size of a row."""
    return int(row["iterations"]), int(row["batch_size"])
