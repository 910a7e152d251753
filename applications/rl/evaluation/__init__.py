"""Success rates of trained agents."""
