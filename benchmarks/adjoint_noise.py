"""Bias and noise of the lean adjoint at the optimum, by the number of steps.

    python -m benchmarks.adjoint_noise

On trajectories of the exact tilt (closed form), the regression target at (x, t) has the mean
c*(x, t) = -(v* - v_β)/(1-t) that the network should learn and, around it, noise.  Columns:

noise
    E‖c_k - c*‖² / E‖c*‖²: the variance that every trajectory adds, relative to the signal.
slope
    E⟨c_k, c*⟩ / E‖c*‖²: 1 where the scheme is unbiased.

Bias falls with the number of steps and noise rises: a training budget that suffices at K = 10 may
not suffice at K = 40.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from adjoint import Reward, draw_noise, lean_adjoint, make_kernel, measure_mmse, rollout
from applications.toy2d.rewards import make_reward
from applications.toy2d.targets import find_target
from benchmarks.common.records import RESULTS
from flows import uniform
from flows.training import write_json

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class NoiseConfig:
    """Measure the noise of the lean adjoint at the optimum."""

    steps: tuple[int, ...] = (10, 20, 40, 80)
    """Numbers of steps K, multiples of 10."""
    samples: int = 20_000
    """Number of trajectories."""
    output: Path = RESULTS / "adjoint_noise.json"
    """File of the rows."""


def measure(steps: int, samples: int) -> list[dict[str, float]]:
    """Measure noise and slope of the moment-matched chain on two Gaussians with a linear reward."""
    target = find_target("two_gaussians")
    reward = make_reward("linear", target)
    assert target.mixture is not None
    assert reward.quadratic_form is not None
    base = copy.deepcopy(target.mixture)
    tilted, _ = base.tilt(*reward.quadratic_form)
    generator = torch.Generator().manual_seed(0)
    grid = uniform(steps)
    x1 = base.sample(samples, generator=generator)
    kernel = make_kernel(
        "moment_matched", grid, mmse=measure_mmse(base, grid, x1, generator=generator)
    )
    x0 = torch.randn(samples, 2, generator=generator, dtype=torch.float64)
    noise = draw_noise(kernel, x0, generator=generator)
    xs = rollout(tilted, base, kernel, x0, noise).xs
    _, gradient, _ = Reward(reward).value_and_gradient(xs[-1])
    values = lean_adjoint(base, kernel, xs, -gradient).values
    rows = []
    for t in TIMES:
        k = round(t * steps)
        c = -(tilted(xs[k], t) - base(xs[k], t)) / (1 - t)
        power = c.square().sum()
        rows.append(
            {
                "steps": steps,
                "t": t,
                "noise": float((values[k] - c).square().sum() / power),
                "slope": float((values[k] * c).sum() / power),
            }
        )
    return rows


def main(config: NoiseConfig) -> None:
    """Measure, print the table and write the rows."""
    rows = [row for steps in config.steps for row in measure(steps, config.samples)]
    print(f"{'K':>4}" + "".join(f"{f't = {t}: noise, slope':>26}" for t in TIMES))
    for steps in config.steps:
        cells = [f"{r['noise']:>18.2f} {r['slope']:>7.2f}" for r in rows if r["steps"] == steps]
        print(f"{steps:>4}" + "".join(cells))
    write_json(config.output, rows)


if __name__ == "__main__":
    main(tyro.cli(NoiseConfig, prog="python -m benchmarks.adjoint_noise"))
