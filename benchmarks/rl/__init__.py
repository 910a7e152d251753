"""Benchmark: do the RL agents learn, and which learns best?"""
