"""Metrics of a batch of trajectories that say how good the tilt is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flows.training import distributed


def batch_diagnostics(
    reward: Tensor, log_w: Tensor, kl: Tensor, terms: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return metrics that say how good the tilt is, by the same formulas as the certificate.

    Arguments:
        reward, log_w, kl: (B,) rewards, log-weights and path KL of trajectories.
        terms: (B,) values of the terms of the reward, which become ``reward.NAME``.
    """
    log_w = distributed.gather(log_w)
    relative = torch.softmax(log_w, 0)
    return {
        "reward": reward.mean(),
        "path_kl": kl.mean(),
        "log_weight_std": log_w.std(correction=0),
        "ess": 1 / (len(relative) * relative.square().sum()),
        **{f"reward.{name}": term.mean() for name, term in terms.items()},
    }
