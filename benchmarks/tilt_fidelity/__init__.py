"""Benchmark: how exact is a trained tilt?"""
