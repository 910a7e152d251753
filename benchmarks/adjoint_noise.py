"""Bias and noise of the lean adjoint at the optimum, and noise of both losses at the start.

    python -m benchmarks.adjoint_noise

At the optimum: on trajectories of the exact tilt (closed form), the regression target at (x, t) has
the mean c*(x, t) = -(v* - v_β)/(1-t) that the network should learn and, around it, noise.  Columns:

noise
    E‖c_k - c*‖² / E‖c*‖²: the variance that every trajectory adds, relative to the signal.
slope
    E⟨c_k, c*⟩ / E‖c*‖²: 1 where the scheme is unbiased.

Bias falls with the number of steps and noise rises: a training budget that suffices at K = 10 may
not suffice at K = 40.

At the start, where the model is the base: both gradients are means over trajectories of the
network's derivative times a vector, in units of the step's noise, u = mean_v (v_θ - v_β) / std: it
is the target u of the regression, or (log w - E log w) ε of the variance of log w.  Columns:

adjoint_mean, adjoint_median
    Mean and median over trajectories of Σ_k ‖u_k‖²: far apart where the target is heavy-tailed.
largest_share
    Share of the largest of these in their sum; where it is not small, the mean is not known.
log_variance
    Var(log w) · K · d, the mean of the squared norm of the other vector.
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
from benchmarks.common.problems import mixture_problem
from benchmarks.common.records import RESULTS
from benchmarks.fixed_points.problems import PROBLEMS
from flows import GaussianMixture, uniform
from flows.training import write_json

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class NoiseConfig:
    """Measure the noise of the lean adjoint at the optimum."""

    steps: tuple[int, ...] = (10, 20, 40, 80)
    """Numbers of steps K, multiples of 10."""
    samples: int = 20_000
    """Number of trajectories at the optimum."""
    start_samples: int = 4096
    """Number of trajectories at the start."""
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


def start_problems() -> dict[str, tuple[GaussianMixture, Reward]]:
    """Return base and reward of the problems whose noise at the start is measured."""
    narrow = PROBLEMS["D"]
    problems = {"two narrow modes": (narrow.base, Reward(lambda x, cond: narrow.reward(x[:, 0])))}
    for dim in (5, 16):
        mixture = mixture_problem(dim)
        problems[f"random mixture, d = {dim}"] = (mixture.base, Reward(mixture.reward))
    normal = GaussianMixture.isotropic(torch.zeros(1, 256), 1.0)
    problems["N(0, I), d = 256"] = (normal, Reward(lambda x, cond: -x.square().sum(1) / 20))
    return problems


def measure_start(
    name: str, base: GaussianMixture, reward: Reward, samples: int
) -> dict[str, str | float]:
    """Measure the gradient noise of both losses of the base, moment-matched chain in 20 steps."""
    steps, dim = 20, base.dim
    generator = torch.Generator().manual_seed(0)
    x1, grid = base.sample(4096, generator=generator), uniform(steps)
    mmse = measure_mmse(base, grid, x1, generator=generator)
    kernel = make_kernel("moment_matched", grid, mmse=mmse)
    x0 = torch.randn(samples, dim, generator=generator, dtype=x1.dtype)
    noise = draw_noise(kernel, x0, generator=generator)
    xs = rollout(base, base, kernel, x0, noise).xs
    log_w, gradient, _ = reward.value_and_gradient(xs[-1])
    values = lean_adjoint(base, kernel, xs, -gradient).values[:-1]
    scale = kernel.residual_a / kernel.residual_v * kernel.mean_v / kernel.std
    squares = (scale.to(values)[:, None, None] * values).square().sum((0, 2))
    return {
        "problem": name,
        "adjoint_mean": float(squares.mean()),
        "adjoint_median": float(squares.median()),
        "largest_share": float(squares.max() / squares.sum()),
        "log_variance": float(log_w.var()) * steps * dim,
    }


def main(config: NoiseConfig) -> None:
    """Measure, print both tables and write the rows."""
    rows = [row for steps in config.steps for row in measure(steps, config.samples)]
    print(f"{'K':>4}" + "".join(f"{f't = {t}: noise, slope':>26}" for t in TIMES))
    for steps in config.steps:
        cells = [f"{r['noise']:>18.2f} {r['slope']:>7.2f}" for r in rows if r["steps"] == steps]
        print(f"{steps:>4}" + "".join(cells))
    starts = [
        measure_start(name, *problem, config.start_samples)
        for name, problem in start_problems().items()
    ]
    columns = ("adjoint_mean", "adjoint_median", "largest_share", "log_variance")
    print(f"\n{'at the start, K = 20':<28}" + "".join(f"{name:>18}" for name in columns))
    for row in starts:
        print(f"{row['problem']:<28}" + "".join(f"{row[name]:>18.2f}" for name in columns))
    write_json(config.output, {"optimum": rows, "start": starts})


if __name__ == "__main__":
    main(tyro.cli(NoiseConfig, prog="python -m benchmarks.adjoint_noise"))
