"""The memoryless chain: kernels, trajectories, adjoints, control variates."""
