"""Benchmark: is the tilt right on real data?"""
