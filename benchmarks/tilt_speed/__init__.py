"""Benchmark: how long an update of `tilt()` takes against a plain loop."""
