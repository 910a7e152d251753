"""The call ``tilt(base, reward, shape=...)`` is measured, and peers at equal evaluations.

Nothing but the seed is given to the call.  A row holds, beside the distances of `metrics` by the
ODE in 100 steps:

log_z_error, log_z_ode_error
    |log Z - exact| in standard errors, of the certificate (the base's chain) and of ODE samples of
    the base; infinite, or null in the record, where the standard error is.  One estimate in twenty
    lies beyond 2 by chance.
log_weight_std, ess
    the certificate's other numbers.
seconds
    processor seconds of the call, on one thread.
evaluations
    states at which the base was evaluated, alone or inside the model: the measure by which peers
    are given as much work.
warnings
    number of warnings that the call raised.
failure
    message of the error that stopped the call; empty if none did.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable

from torch import Tensor, nn

from adjoint import TiltConfig, Tilted, tilt
from benchmarks.common.jobs import completed
from benchmarks.common.problems import (
    Problem,
    hard_names,
    make_problem,
    names,
    random_name,
)
from benchmarks.tilt_fidelity.config import FidelityConfig
from benchmarks.tilt_fidelity.metrics import (
    SAMPLES,
    Row,
    flow_samples,
    mode_tv,
    velocity_error,
    w2_ratio,
)
from benchmarks.tilt_fidelity.peers import PEERS
from benchmarks.tilt_fidelity.table import table
from flows.training import write_json

DEFAULT = "default"
"""Name of the call without options among the methods."""
ODE_STEPS = 100
ENTRIES = 1_600_000
"""Entries of the samples of mode_tv, between `SAMPLES` and `MOST_SAMPLES` of them."""
MOST_SAMPLES = 100_000
ERROR_SAMPLES = 8192
"""Samples of velocity_error at each time."""

Job = tuple[str, str, int]
"""Problem, method and seed of a row."""


def measure_default(config: FidelityConfig) -> list[Row]:
    """Run the missing jobs, write their rows where the options say, and print the tables."""
    path = config.record
    rows: list[Row] = json.loads(path.read_text()) if path is not None and path.exists() else []
    wanted = jobs(config)
    for round_of in ([DEFAULT], list(PEERS)):  # a peer is given the evaluations of the call
        todo = [job for job in wanted if job[1] in round_of and job not in map(job_of, rows)]
        given = [(*job, evaluations_of(rows, job)) for job in todo]
        if not given:
            continue
        for row in completed(measure, given, workers=config.workers, name="tilts"):
            rows.append(row)
            if path is not None:
                write_json(path, rows)
    print(table([row for row in rows if job_of(row) in wanted]))
    return rows


def jobs(config: FidelityConfig) -> list[Job]:
    """Return the jobs that the options ask for."""
    methods = [DEFAULT, *(PEERS if config.peers else ())]
    if config.random is not None:
        drawn = [random_name(config.random, i) for i in range(config.count)]
        return [(name, method, 0) for method in methods for name in drawn]
    chosen = config.problems or (*names(), *hard_names())
    return [(name, method, seed) for method in methods for seed in config.seeds for name in chosen]


def job_of(row: Row) -> Job:
    """Return the job whose row this is."""
    return str(row["problem"]), str(row["method"]), int(row["seed"])


def evaluations_of(rows: list[Row], job: Job) -> int:
    """Return the evaluations that the call without options took on a problem with a seed.

    It is 0 if there is no such row yet.
    """
    name, _, seed = job
    found = [int(row["evaluations"]) for row in rows if job_of(row) == (name, DEFAULT, seed)]
    return found[0] if found else 0


def measure(name: str, method: str, seed: int, evaluations: int = 0) -> Row:
    """Tilt one problem by one method and compare the result with the exact tilt.

    Arguments:
        name: name of the problem.
        method: ``default`` or a name of `PEERS`.
        seed: seed of the tilt.
        evaluations: evaluations that a peer is given.
    """
    problem = make_problem(name)
    count = count_evaluations(problem.base)
    row: Row = {"problem": name, "dim": problem.dim, "method": method, "seed": seed}
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        started = time.process_time()
        try:
            result = run(problem, method, seed, evaluations)
            failure = ""
        except (ValueError, RuntimeError) as error:
            result, failure = None, f"{type(error).__name__}: {error}"
        seconds = time.process_time() - started
    row |= {
        "seconds": seconds,
        "evaluations": count(),
        "warnings": sum(issubclass(w.category, UserWarning) for w in raised),
        "failure": failure,
    }
    return row if result is None else row | comparison(problem, result)


def run(problem: Problem, method: str, seed: int, evaluations: int) -> Tilted:
    """Return the tilt of a problem by one method."""
    if method in PEERS:
        return PEERS[method](problem, seed, evaluations)
    return tilt(problem.base, problem.reward, shape=(problem.dim,), config=TiltConfig(seed=seed))


def comparison(problem: Problem, result: Tilted) -> Row:
    """Return the columns that compare a tilted flow and its certificate with the exact tilt."""
    assert result.certificate is not None
    report = result.certificate
    n = max(SAMPLES, min(MOST_SAMPLES, ENTRIES // problem.dim))
    x = flow_samples(result.field, problem.dim, n, ODE_STEPS)
    return {
        "iterations": result.config.iterations,
        "velocity_error": velocity_error(problem, result.field, ERROR_SAMPLES),
        "mode_tv": mode_tv(problem, x),
        "w2_ratio": w2_ratio(problem, x),
        "log_z_exact": problem.log_z,
        "log_z": report.log_z,
        "log_z_error": in_errors(report.log_z - problem.log_z, report.log_z_stderr),
        "log_z_ode": result.log_z_ode,
        "log_z_ode_error": in_errors(result.log_z_ode - problem.log_z, result.log_z_ode_stderr),
        "log_weight_std": report.log_weight_std,
        "ess": report.ess,
    }


def in_errors(difference: float, error: float) -> float:
    """Return |difference| in standard errors; infinite where the error is not known."""
    return abs(difference) / error if 0 < error < math.inf else math.inf


def count_evaluations(base: nn.Module) -> Callable[[], int]:
    """Count the states at which ``base`` and its copies are evaluated from now on.

    Returns:
        A function that returns the number so far.
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += math.prod(output.shape[:-1])

    base.register_forward_hook(count)  # copies of the base share this function
    return lambda: total
