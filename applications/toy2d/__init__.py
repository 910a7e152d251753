"""Tilted two-dimensional laws, to look at: targets, rewards, exact tilts, pictures, digits."""
