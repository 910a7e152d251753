"""Evaluation of agents: episodes, success rates and their intervals."""
