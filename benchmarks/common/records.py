"""The folder of the benchmarks' records."""

from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
"""Folder of the recorded rows and figures, ``benchmarks/results``."""
