"""Reward against diversity: tilts beside the plain alternatives."""
