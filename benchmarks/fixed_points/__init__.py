"""Benchmark: what does each scheme converge to, without training noise?"""
