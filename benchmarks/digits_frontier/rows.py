"""Points of the frontier as flat rows, with the margins of every tilt over the alternatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks.digits_frontier.margins import margin
from benchmarks.digits_frontier.metrics import (
    CLOSENESS,
    DECISIVE,
    DIVERSITY,
    Metrics,
    mean,
    stderr,
)

Row = dict[str, str | int | float]

ALTERNATIVES = ("best_of_n", "guidance", "backprop_last", "backprop_all")
TILTS = ("tilt", "tilt_lora")


@dataclass(frozen=True, eq=False)
class Point:
    """One method at one strength on one problem.

    Attributes:
        problem, method, strength: names of problem and method, and the strength of the method.
        metrics: by name, a value for each batch of samples, with ``reward``.
        images: some samples (N, 64).
        more: further columns of the point's row.
    """

    problem: str
    method: str
    strength: float
    metrics: Metrics
    images: Tensor
    more: Row


def curve_of(points: Sequence[Point], method: str) -> list[Point]:
    """Return the frontier of a method: the base, then its points from weakest to strongest."""
    own = [p for p in points if p.method == method]
    if method in ("tilt", "tilt_lora", "exact"):
        own.sort(key=lambda p: -p.strength)
    return [p for p in points if p.method == "base"] + own


def margins(point: Point, points: Sequence[Point]) -> Row:
    """Return the columns on each alternative: margins, standard errors, and which is ahead."""
    row: Row = {}
    for method in ALTERNATIVES:
        curve = [p.metrics for p in curve_of(points, method)]
        at_least = 1
        for metric in DIVERSITY:
            found = margin(point.metrics, curve, metric)
            if found is None:
                at_least = -1
                break
            row[f"{metric}_over_{method}"] = found.difference
            row[f"{metric}_over_{method}_stderr"] = found.stderr
            if metric in DECISIVE:
                at_least = min(at_least, int(found.at_least))
        row[f"at_least_{method}"] = at_least
        found = margin(point.metrics, curve, CLOSENESS)
        row[f"as_close_{method}"] = -1 if found is None else int(found.at_least)
        if found is not None:
            row[f"closeness_over_{method}"] = found.difference
            row[f"closeness_over_{method}_stderr"] = found.stderr
    return row


def make_rows(points: Sequence[Point]) -> list[Row]:
    """Return the rows of one problem."""
    rows = []
    for point in points:
        row: Row = {
            "problem": point.problem,
            "method": point.method,
            "strength": point.strength,
            "batches": len(point.metrics["reward"]),
        }
        for name, values in point.metrics.items():
            if name == CLOSENESS and not math.isfinite(mean(values)):
                continue
            row |= {name: mean(values), f"{name}_stderr": stderr(values)}
        row |= point.more
        if point.method in (*TILTS, "exact"):
            row |= margins(point, points)
        rows.append(row)
    return rows


def line(row: Row) -> str:
    """Return a row of the printed table; lines below a tilt compare it with the alternatives."""
    text = (
        "{problem:<11} {method:<14} {strength:<5g} reward {reward:7.3f} ± {reward_stderr:.3f}  "
        "classes {classes:5.2f} ± {classes_stderr:.2f}  distance {distance:5.2f} ± "
        "{distance_stderr:.2f}  coverage {coverage:.3f}  nearest {nearest:.2f}  "
        "certain {certain:.2f}"
    ).format_map(row)
    if CLOSENESS in row:
        text += "  KL {kl:.3f} ± {kl_stderr:.3f}".format_map(row)
    if "at_least_best_of_n" not in row:
        return text
    if row["method"] in TILTS:
        text += certificate(row)
    said = {1: "at least as diverse", 0: "less diverse", -1: "reward not reached"}
    for method in ALTERNATIVES:
        text += f"\n    {method:<14} {said[int(row[f'at_least_{method}'])]:<20}"
        for metric in (*DIVERSITY, "closeness"):
            name = f"{metric}_over_{method}"
            if name in row:
                text += f" {metric} {row[name]:+.3f} ± {row[f'{name}_stderr']:.3f} "
    return text


def certificate(row: Row) -> str:
    """Return the line of a tilt's certificate and class frequencies."""
    return (
        "\n    std log w {log_weight_std:.2f} (base {log_weight_std_base:.2f})  ESS {ess:.2f}  "
        "log Z {log_z:.3f} ± {log_z_stderr:.3f}, exact {log_z_exact:.3f} ± "
        "{log_z_exact_stderr:.3f}, by ODE {log_z_ode:.3f}  classes within 2 s.e.: "
        "ODE {within_ode}, chain {within_chain}, weighted {within_weighted}"
    ).format_map(row)
