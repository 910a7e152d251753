"""Benchmarks, one file or package for each question; README.md lists them."""
