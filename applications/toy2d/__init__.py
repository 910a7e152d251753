"""Tilts of two-dimensional flows, to look at: targets, rewards, exact tilts, pictures, digits."""
