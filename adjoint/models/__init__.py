"""Models to train: low-rank adapters, and models that see the reward."""
