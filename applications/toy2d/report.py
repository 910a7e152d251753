"""The report of a run in the plane: numbers by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adjoint import Tilted
from applications.toy2d.exact_tilt import (
    GridTilt,
    ResampledTilt,
    mask_unreliable,
    mode_tv,
    w2_ratio,
)
from applications.toy2d.setup import RunSetup

Report = dict[str, str | int | float]

COMPARED = ("reward_exact", "log_z_exact", "log_z_exact_stderr", "w2_ratio", "mode_tv")
"""Numbers of a report that are made with the exact tilt."""


def make_report(
    setup: RunSetup,
    tilted: Tilted,
    samples: Tensor,
    base: Tensor,
    exact: GridTilt | ResampledTilt,
) -> Report:
    """Collect the numbers of a run; rewards are means over ODE samples, unscaled.

    Comparisons with an exact tilt of too few effective samples are NaN
    (`exact_tilt.mask_unreliable`); ``mode_tv`` is left out where the target has no modes.

    Arguments:
        setup: options, target and reward.
        tilted: the tilt with both certificates.
        samples: of the tilted flow, (N, 2).
        base: samples of the base flow, (N, 2).
        exact: the exact tilt of the base.
    """
    assert tilted.certificate is not None
    assert tilted.certificate_base is not None
    config, target, reward = setup.config, setup.target, setup.reward
    generator = torch.Generator().manual_seed(config.seed)
    size = min(2500, config.samples // 4)
    sets = [exact.sample(4 * size, generator) for _ in range(2)]
    after = tilted.certificate
    report: Report = {
        "target": target.name,
        "reward": reward.name,
        "temperature": config.temperature,
        "kernel": config.scheme.name,
        "steps": config.steps,
        "reward_base": float(reward(base).mean()),
        "reward_tilted": float(reward(samples).mean()),
        "reward_exact": exact.reward_tilted * config.temperature,
        "log_z": after.log_z,
        "log_z_stderr": after.log_z_stderr,
        "log_z_exact": exact.log_z,
        "log_z_exact_stderr": exact.log_z_stderr,
        "log_weight_std_base": tilted.certificate_base.log_weight_std,
        "log_weight_std": after.log_weight_std,
        "ess": after.ess,
        "path_kl": after.path_kl,
        "w2_ratio": w2_ratio(samples, *sets, size=size, generator=generator),
    }
    if target.modes is not None:
        report["mode_tv"] = mode_tv(samples, exact, target.modes)
    compared = [name for name in COMPARED if name in report]
    return mask_unreliable(report, compared, exact, "the base")


def table(report: Mapping[str, str | int | float]) -> str:
    """Align names and values of a report."""
    width = max(map(len, report))
    rows = [
        f"{name:<{width}}  {value:>12.4f}"
        if isinstance(value, float)
        else f"{name:<{width}}  {value:>12}"
        for name, value in report.items()
    ]
    return "\n".join(rows)
