"""How exact is a trained tilt?  Every kernel on every problem, at equal training budgets.

    python -m benchmarks.tilt_fidelity                 # everything: over an hour on two cores
    python -m benchmarks.tilt_fidelity --kernels moment_matched_refined --steps 40 \\
        --iterations 1500 --batch-size 256             # with more training
    python -m benchmarks.tilt_fidelity --problems ring/linear --steps 10 --iterations 200

For each row one network is trained, from the same seed and with the same number of updates and
trajectories, and compared with the exact tilt (`benchmarks.common.problems`):

velocity_error
    E‖v_θ - v*‖² / E‖v* - v_β‖² under p*_t, averaged over t = .1, .3, .5, .7, .9: 1 is the
    untilted base, 0 the optimum.  A ratio of squares, as in `benchmarks.fixed_points`.
mode_tv
    total variation between mode frequencies of ODE samples and the exact ones.
w2_ratio
    sliced Wasserstein distance to exact samples over that between two exact sets: the floor is 1.
log_weight_std, ess
    the certificate, on the kernel's own chain.

Rows are written as they are measured; a second call runs only the missing ones.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from adjoint import TiltConfig, tilt
from adjoint.chain.conditional_covariance import MAX_DIM
from applications.toy2d.distances import mode_frequencies, w2_ratio
from benchmarks.common import problems
from benchmarks.common.figures import kernel_comparison
from benchmarks.common.jobs import completed
from benchmarks.common.problems import Problem
from benchmarks.common.records import RESULTS
from flows import MLPVelocity, Residual, VelocityField, sample
from flows.training import write_json

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
SAMPLES = 20_000
MODE_SAMPLES = 100_000
"""Samples of mode_tv; rows at 700 updates without the suffix _refined were recorded with
``SAMPLES``."""
REFINED = 0.7
"""Fraction of the updates on the log-variance loss in a kernel with the suffix _refined."""
SCHEMES = (
    "covariance_matched_refined",
    "moment_matched_refined",
    "moment_matched",
    "euler_published",
    "ancestral",
    "euler_consistent",
)
Row = dict[str, str | int | float]


@dataclass(frozen=True)
class FidelityConfig:
    """Measure trained tilts against exact ones."""

    problems: tuple[str, ...] = field(default_factory=lambda: tuple(problems.names()))
    """Problems to run."""
    kernels: tuple[str, ...] = SCHEMES
    """Kernels to compare; the suffix _refined ends with updates on the log-variance loss, _weighted
    adds importance weights, and without a suffix all updates are on the adjoint-matching loss."""
    steps: tuple[int, ...] = (10, 40, 20)
    """Numbers of steps K."""
    iterations: int = 700
    """Updates of every run."""
    batch_size: int = 128
    """Trajectories in each update."""
    workers: int = 2
    """Number of processes, one thread each."""
    output: Path = RESULTS / "tilt_fidelity.json"
    """File of the rows; missing rows are added to it."""

    @classmethod
    def budget(cls) -> tuple[int, int]:
        """Return the default updates and batch size: the budget that the figure compares."""
        return cls.iterations, cls.batch_size


def velocity_error(problem: Problem, v: VelocityField, n: int = 2048) -> float:
    """Return the relative velocity error E‖v_θ - v*‖² / E‖v* - v_β‖², averaged over `TIMES`."""
    generator = torch.Generator().manual_seed(7)
    errors = []
    for time_ in TIMES:
        t = torch.tensor(time_)
        x1 = problem.sample(n, generator)
        x = t * x1 + (1 - t) * torch.randn(x1.shape, generator=generator)
        with torch.no_grad():
            best = problem.velocity(x, t)
            wrong = (v(x, t) - best).square().sum()
            whole = (problem.base(x, t) - best).square().sum()
        errors.append(float(wrong / whole))
    return sum(errors) / len(errors)


def flow_samples(v: VelocityField, dim: int, n: int) -> Tensor:
    """Draw ODE samples (n, dim) from fixed noise."""
    x0 = torch.randn(n, dim, generator=torch.Generator().manual_seed(8))
    return torch.cat([sample(v, part, grid=40, method="ab2") for part in x0.split(8192)])


def make_model(problem: Problem, width: int = 64) -> nn.Module:
    """Make the network of every run: a zero-initialised residual on the base."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Residual(problem.base, MLPVelocity(problem.dim, hidden=[width] * 3, zero_init=True))


def measure(name: str, kernel: str, steps: int, config: FidelityConfig) -> Row:
    """Train one tilt and compare it with the exact one."""
    problem = problems.make_problem(name)
    options = TiltConfig(
        kernel=kernel.removesuffix("_weighted").removesuffix("_refined"),
        importance=kernel.endswith("_weighted"),
        refine_fraction=REFINED if kernel.endswith("_refined") else 0.0,
        steps=steps,
        iterations=config.iterations,
        batch_size=config.batch_size,
        lr=2e-3,
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
    generator = torch.Generator().manual_seed(9)
    exact = [problem.sample(SAMPLES // 2, generator) for _ in range(2)]
    difference = mode_frequencies(x, problem.modes) - problem.frequencies
    return {
        "problem": name,
        "dim": problem.dim,
        "kernel": kernel,
        "steps": steps,
        "velocity_error": velocity_error(problem, result.field),
        "mode_tv": 0.5 * float(difference.abs().sum()),
        "w2_ratio": w2_ratio(x[: SAMPLES // 2], *exact, size=SAMPLES // 16, generator=generator),
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
        for name in config.problems
    ]
    return [job for job in asked if job not in done and serves(*job[:2])]


def serves(name: str, kernel: str) -> bool:
    """Return whether the kernel serves the dimension of the problem."""
    dim = int(name.removeprefix("mixture-").removesuffix("d")) if "mixture" in name else 2
    return dim <= MAX_DIM or not kernel.startswith("covariance_matched")


def main(config: FidelityConfig) -> None:
    """Run the missing jobs, print the table and draw the figure."""
    rows: list[Row] = json.loads(config.output.read_text()) if config.output.exists() else []
    jobs = [(*job, config) for job in pending(config, rows)]
    for row in completed(measure, jobs, workers=config.workers, name="tilts"):
        rows.append(row)
        write_json(config.output, rows)
    print(summary(rows))
    compared = [row for row in rows if budget_of(row) == FidelityConfig.budget()]
    figure = config.output.with_suffix(".png")
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


if __name__ == "__main__":
    main(tyro.cli(FidelityConfig, prog="python -m benchmarks.tilt_fidelity"))
