"""Benchmark: how long an update of QAM takes, and where the time goes."""
