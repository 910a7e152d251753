"""Benchmark: how much memory an update takes, and what each option saves."""
