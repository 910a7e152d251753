"""Batches of the frontier whose reward and diversity are given."""

import torch


def batches(reward, value, spread=0.0, metric="classes"):
    offsets = torch.linspace(-1, 1, 8, dtype=torch.float64)
    return {
        "reward": torch.full((8,), float(reward), dtype=torch.float64),
        metric: value + spread * offsets,
    }
