"""Handwritten digits: a flow of 8×8 images, tilted toward a digit."""
