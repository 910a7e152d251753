"""Benchmark: adjoint matching on control problems whose optimal control is known."""
