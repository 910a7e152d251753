"""The state of trust regions at the end of runs, from the metrics of their updates."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from applications.rl.report.results import Result
from applications.rl.run_folder import METRICS

COLUMNS = ("actor/path_kl", "actor/path_kl_average", "actor/kl_budget", "actor/multiplier")
"""Metrics of `applications.rl.agents.trust_region.TrustRegion`, in nats per action but the last."""


def trust_region_remarks(results: Sequence[Result]) -> list[str]:
    """Say path KL, budget and multiplier of the last logged update of each run that has them.

    Raises:
        OSError: a file cannot be read.
    """
    remarks = []
    for result in results:
        row = _last_row(Path(result.source) / METRICS)
        if row is None:
            continue
        kl, average, budget, multiplier = (f"{float(row[name]):.3g}" for name in COLUMNS)
        settings = result.settings
        run = f"{settings['agent']} on {settings['task']}, seed {settings['seed']}"
        remarks.append(
            f"{run}: path KL {average} nats per action (last {kl}) "
            f"of a budget of {budget}, multiplier {multiplier}"
        )
    return remarks


def _last_row(path: Path) -> dict[str, str] | None:
    """Return the last complete line of a file with all `COLUMNS`; None if there is none."""
    if not path.is_file():
        return None
    with path.open(newline="") as file:
        complete = [line for line in file if line.endswith("\n")]
    rows = [row for row in csv.DictReader(complete) if all(row.get(name) for name in COLUMNS)]
    return rows[-1] if rows else None
