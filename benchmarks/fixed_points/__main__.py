"""Every scheme is solved in one dimension, without training noise.

    python -m benchmarks.fixed_points

The problems have two modes (`problems.py`).  A scheme's solution is the fixed point of adjoint
matching (`regression.py`) or, with the suffix ``_log_variance``, the optimum of the variance of
log w (`log_variance.py`), both by quadrature.  Columns (`evaluation.py`):

velocity_error
    E[(v_θ - v*)²] / E[(v* - v_β)²] under the exact marginals, the mean over five times.
mode_weight
    The probability of the right mode by the ODE of v_θ; ``exact_mode_weight`` is that of the tilt.
chain_log_z_error, chain_mode_weight
    log Z of the base's chain minus that of the base, and its right mode under the tilt: what a
    perfect certificate and ``sample_exact`` give with this kernel and K, whatever the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

from benchmarks.common.records import RESULTS
from benchmarks.fixed_points.evaluation import base_chain, mode_weight, velocity_error
from benchmarks.fixed_points.log_variance import log_variance_optimum
from benchmarks.fixed_points.problems import PROBLEMS, Array, Problem, kernel_for
from benchmarks.fixed_points.regression import fixed_point
from flows.training import write_json

SCHEMES = (
    "euler_published",
    "euler_consistent",
    "ancestral_pair",
    "ancestral",
    "moment_matched",
    "covariance_matched",
    "ancestral_weighted",
    "moment_matched_weighted",
    "covariance_matched_weighted",
    "moment_matched_log_variance",
    "covariance_matched_log_variance",
)
"""Names of kernels; ``_weighted`` adds importance weights, ``_log_variance`` changes the loss."""

Row = dict[str, str | int | float]


def kernel_name(scheme: str) -> str:
    """Return the name of a scheme's kernel."""
    return scheme.removesuffix("_weighted").removesuffix("_log_variance")


def solve(problem: Problem, scheme: str, steps: int) -> tuple[Array, Array]:
    """Return v_θ and v_β of a scheme in ``steps`` steps, each (K, N)."""
    kernel = kernel_for(problem.base, kernel_name(scheme), steps)
    if scheme.endswith("_log_variance"):
        return log_variance_optimum(problem, kernel)
    return fixed_point(problem, kernel, weighted=scheme.endswith("_weighted"))


def scheme_error(problem: Problem, scheme: str, steps: int) -> float:
    """Return the velocity error of a scheme in ``steps`` steps."""
    kernel = kernel_for(problem.base, kernel_name(scheme), steps)
    return velocity_error(problem, kernel, *solve(problem, scheme, steps))


@cache
def chain_of(problem: Problem, kernel: str, steps: int) -> tuple[float, float]:
    """Return the error of log Z and the right mode's weight of the base chain."""
    log_z, weight = base_chain(problem, kernel_for(problem.base, kernel, steps))
    return log_z - problem.log_z, weight


def measure(name: str, scheme: str, steps: int) -> Row:
    """Return the row of one problem, scheme and number of steps."""
    problem = PROBLEMS[name]
    kernel = kernel_for(problem.base, kernel_name(scheme), steps)
    solution = solve(problem, scheme, steps)
    log_z_error, chain_weight = chain_of(problem, kernel_name(scheme), steps)
    return {
        "problem": name,
        "scheme": scheme,
        "steps": steps,
        "velocity_error": velocity_error(problem, kernel, *solution),
        "mode_weight": mode_weight(problem, kernel, *solution),
        "exact_mode_weight": problem.exact_mode_weight(),
        "chain_log_z_error": log_z_error,
        "chain_mode_weight": chain_weight,
    }


def print_tables(rows: Iterable[Row]) -> None:
    """Print one table a problem: velocity error, mode weight, and the chain's, by steps."""
    for name, group in itertools.groupby(rows, lambda row: row["problem"]):
        own = list(group)
        print(
            f"\n{name}: velocity error, mode weight, the base chain's log Z error and mode weight"
        )
        print(f"right mode of the exact tilt: {own[0]['exact_mode_weight']:.3f}")
        columns = ("velocity_error", "mode_weight", "chain_log_z_error", "chain_mode_weight")
        steps = dict.fromkeys(row["steps"] for row in own)
        print(f"{'':<32}" + "".join(f"{f'K = {k}':>30}" for k in steps))
        for scheme, line in itertools.groupby(own, lambda row: row["scheme"]):
            cells = ("".join(f"{row[c]:7.3f}" for c in columns) for row in line)
            print(f"{scheme:<32}" + "".join(f"{cell:>30}" for cell in cells))


@dataclass(frozen=True)
class Args:
    """Compute the fixed points of every scheme in one dimension (about 20 minutes)."""

    problems: tuple[str, ...] = tuple(PROBLEMS)
    """Problems: A, B and C with broad modes, D with narrow modes apart, R with a rare mode."""
    steps: tuple[int, ...] = ()
    """Numbers of steps K; by default those of each problem."""
    schemes: tuple[str, ...] = SCHEMES
    """Schemes, kernel names with or without a suffix _weighted or _log_variance."""
    output: Path = RESULTS / "fixed_points.json"
    """File of the rows."""


def main(args: Args) -> list[Row]:
    """Compute, print and write all rows."""
    torch.set_num_threads(1)
    cases = [
        (name, scheme, steps)
        for name in args.problems
        for scheme in args.schemes
        for steps in args.steps or PROBLEMS[name].steps
    ]
    rows = [measure(*case) for case in tqdm(cases, desc="fixed points")]
    print_tables(rows)
    write_json(args.output, rows)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m benchmarks.fixed_points"))
