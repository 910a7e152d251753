"""Training of agents, offline and online."""
