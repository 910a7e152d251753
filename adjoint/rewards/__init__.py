"""Rewards: scaling, sums, and rewards of decoded samples."""
