"""Short trainings in the corridor, and comparisons of their run folders."""

import csv
import math

import torch

from applications.rl import train
from flows.training import checkpoint as checkpoints
from helpers.killed_rl import configuration
from helpers.tiny import Corridor, corridor_data

SHORT = {"offline_steps": 9, "online_steps": 0}
BOTH = {"offline_steps": 5, "online_steps": 36, "start_training": 30}
FILES = ("metrics.csv", "evaluation.csv")


def fit(folder, phases=SHORT, *, callbacks=(), **changes):
    config = configuration(folder, phases, **{"eval_every": 4, "checkpoint_every": 4} | changes)
    return train(config, environment=Corridor, dataset=corridor_data(), callbacks=callbacks)


def equal(a, b):
    """Compare nested data bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return a == b


def numbers(path):
    with path.open(newline="") as file:
        header, *rows = [*csv.reader(file)]
    return header, [
        [math.nan if c in ("", "online", "offline") else float(c) for c in r] for r in rows
    ]


def assert_same_run(found, expected):
    """Assert that two folders hold the same run up to rounding."""
    a, b = (checkpoints.load(folder / "checkpoint.pt") for folder in (found, expected))
    assert a["iteration"] == b["iteration"]
    assert a["identity"] == b["identity"]
    assert torch.equal(a["generator"], b["generator"])  # so the same random numbers were drawn
    for part in ("module", "optimizer"):
        torch.testing.assert_close(a[part], b[part], rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(a["loss"]["replay"], b["loss"]["replay"], rtol=1e-3, atol=1e-4)
    for name in FILES:
        (header, rows), (expected_header, expected_rows) = (
            numbers(f / name) for f in (found, expected)
        )
        assert header == expected_header
        torch.testing.assert_close(
            torch.tensor(rows), torch.tensor(expected_rows), rtol=1e-3, atol=1e-4, equal_nan=True
        )
    assert {p.name for p in found.iterdir()} == {p.name for p in expected.iterdir()}
