"""Benchmark: reward against diversity and closeness, the tilt beside its alternatives."""
