r"""Adjoint matching on stochastic optimal control problems with a known control.

    python -m benchmarks.soc

The problems of `benchmarks.soc.problems` in the coordinates with standard noise, by the functions
that tilt a flow: an Euler-Maruyama chain of dX = v dt + dB with v_β = b and v_θ = b + u is one more
kernel, whose adjoint is that of its own mean plus the gradient of the running cost,

    a_k = (I + h ∂b/∂x)ᵀ a_{k+1} + h ∇f(x_k),   a_K = ∇g(x_K),   residual √h (u(x_k) + a_{k+1}).

Its unique solution is the optimal control of the chain, which differs from that of the diffusion by
O(h).  The grid is finer toward t = 1, 1 - t ∝ (1 - k/K)^1.5: there the control of the double well
changes as fast as its drift contracts, in a fortieth of the horizon (the chain's own optimum has
relative error .0011 at K = 100 by dynamic programming, and .009 on the uniform grid).  The metric
of the source is taken on trajectories of the optimal control,

    control error = E Σ_k h ‖u - u*‖²(x_k, t_k),   relative: divided by E Σ_k h ‖u*‖²,

so that the uncontrolled start has relative error 1.

Source: Domingo-Enrich et al. 2312.02027; training here is far shorter than there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from adjoint import (
    Kernel,
    Reward,
    adjoint_matching_loss,
    draw_noise,
    lean_adjoint,
    rollout,
    select_steps,
    velocity_along,
)
from benchmarks.common.records import RESULTS
from benchmarks.soc.problems import PROBLEMS, ControlProblem
from flows import (
    Cond,
    MLPVelocity,
    ProgressBar,
    Residual,
    Trainer,
    TrainerConfig,
    VelocityField,
    uniform,
)
from flows.training import write_json


def euler_maruyama(grid: Tensor) -> Kernel:
    """Make the kernel of dX = v dt + dB on a grid (K+1,), with the adjoint of its own mean."""
    h = grid.double().diff()
    ones = torch.ones_like(h)
    return Kernel(
        name="euler_maruyama",
        t=grid.double(),
        mean_x=ones,
        mean_v=h,
        std=h.sqrt(),
        adjoint_t=grid[:-1].double(),
        adjoint_x=ones,
        adjoint_v=h,
        residual_v=h.sqrt(),
        residual_a=h.sqrt(),
        adjoint_scale=torch.ones_like(grid, dtype=torch.float64),
        residual_at_next=True,
        noiseless_last=False,
        own_time=(True,) * len(h),
    )


class LateTime(nn.Module):
    """A network of 1 - (1-t)^(1/3) for t: the last fortieth of the horizon becomes a third."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the network's value, (B, dim)."""
        return self.network(x, 1 - (1 - t).clamp_min(0.0) ** (1 / 3), cond)


class ControlLoss:
    """The adjoint-matching loss of a control problem, as a trainer calls it.

    Arguments:
        problem: the control problem.
        kernel: kernel of the chain.
        batch_size: number of trajectories.
        fraction: fraction of the steps, drawn at random, on which the loss is taken.
    """

    def __init__(
        self, problem: ControlProblem, kernel: Kernel, *, batch_size: int, fraction: float
    ) -> None:
        self.problem, self.kernel = problem, kernel
        self.batch_size, self.fraction = batch_size, fraction
        self.h = kernel.mean_v

    def __call__(
        self, module: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of ``module``, the controlled drift, on new trajectories, and metrics."""
        problem, kernel = self.problem, self.kernel
        x0 = problem.start.expand(self.batch_size, -1)
        noise = draw_noise(kernel, x0, generator=generator)
        xs = rollout(module, problem.drift, kernel, x0, noise).xs
        cost, gradient, _ = Reward(problem.terminal).value_and_gradient(xs[-1])
        running = None
        if problem.running is not None:
            _, slope, _ = Reward(problem.running).value_and_gradient(xs[:-1].flatten(0, 1))
            running = self.h.to(xs).reshape(-1, 1, 1) * slope.reshape(xs[:-1].shape)
        adjoint = lean_adjoint(problem.drift, kernel, xs, gradient, running=running)
        steps = select_steps(
            kernel.steps, late_fraction=0, early_fraction=self.fraction, generator=generator
        )
        v = velocity_along(module, xs[steps], kernel.t[steps])
        loss, metrics = adjoint_matching_loss(v, adjoint, kernel, steps=steps)
        return loss, {"terminal_cost": cost.mean(), **metrics}


@torch.no_grad()
def control_error(
    problem: ControlProblem,
    kernel: Kernel,
    field: VelocityField,
    *,
    n: int = 2048,
    generator: torch.Generator | None = None,
) -> tuple[float, float]:
    """Return E∫‖u-u*‖² and E∫‖u*‖² on ``n`` trajectories of the optimal control, u = field - b."""

    def optimal(x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        return problem.drift(x, t, cond) + problem.control(x, float(t))

    x0 = problem.start.expand(n, -1)
    noise = draw_noise(kernel, x0, generator=generator)
    trajectory = rollout(optimal, problem.drift, kernel, x0, noise)
    error = size = 0.0
    for k in range(kernel.steps):
        x, t, h = trajectory.xs[k], kernel.t[k], float(kernel.mean_v[k])
        right = problem.control(x, float(t))
        found = field(x, t) - problem.drift(x, t)
        error += h * float((found - right).square().sum(1).mean())
        size += h * float(right.square().sum(1).mean())
    return error, size


@dataclass(frozen=True)
class Args:
    """Solve four control problems with a known solution by adjoint matching (some minutes)."""

    problems: tuple[str, ...] = tuple(PROBLEMS)
    """Names of problems: ou_quadratic_easy, ou_quadratic_hard, ou_linear, double_well."""
    steps: int = 50
    """Steps of the chain; the double well, which is stiff, takes twice as many."""
    iterations: int = 1000
    """Optimiser steps."""
    batch_size: int = 256
    """Trajectories per optimiser step."""
    fraction: float = 0.25
    """Fraction of a trajectory's steps, drawn at random, on which the loss is taken."""
    lr: float = 1e-2
    """Learning rate at the start of a cosine schedule."""
    seed: int = 0
    """Seed of the network and the training noise."""
    output: Path = RESULTS / "soc.json"
    """File of the rows."""


def solve(name: str, args: Args) -> dict[str, Any]:
    """Train on one problem and return its row.

    Raises:
        ValueError: the problem is unknown.
    """
    if name not in PROBLEMS:
        raise ValueError(f"problem must be one of {', '.join(PROBLEMS)}, got {name!r}")
    problem = PROBLEMS[name]()
    steps = args.steps * (2 if name == "double_well" else 1)
    kernel = euler_maruyama(1 - (1 - uniform(steps)) ** 1.5)
    torch.manual_seed(args.seed)
    control = LateTime(MLPVelocity(problem.dim, hidden=(128, 128), zero_init=True))
    field = Residual(problem.drift, control)

    def measured(module: nn.Module) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(1)
        return control_error(problem, kernel, module, generator=generator)

    before, _ = measured(field)
    loss = ControlLoss(problem, kernel, batch_size=args.batch_size, fraction=args.fraction)
    config = TrainerConfig(
        iterations=args.iterations, lr=args.lr, ema_decay=0.99, grad_clip=0.0, seed=args.seed
    )
    began = time.perf_counter()
    trained = Trainer(field, loss, config, callbacks=[ProgressBar(name)]).fit()
    seconds = time.perf_counter() - began
    after, size = measured(trained)
    return {
        "problem": name,
        "dim": problem.dim,
        "steps": kernel.steps,
        "iterations": args.iterations,
        "control_error": after,
        "control_error_relative": after / size,
        "control_error_start": before,
        "seconds": seconds,
    }


def main(args: Args) -> list[dict[str, Any]]:
    """Solve all problems, and print and write their rows."""
    torch.set_num_threads(1)
    rows = [solve(name, args) for name in args.problems]
    print(f"{'':<20}{'dim':>5}{'steps':>7}{'start':>10}{'error':>10}{'relative':>10}{'s':>7}")
    for row in rows:
        print(
            f"{row['problem']:<20}{row['dim']:>5}{row['steps']:>7}"
            f"{row['control_error_start']:>10.4f}{row['control_error']:>10.5f}"
            f"{row['control_error_relative']:>10.5f}{row['seconds']:>7.0f}"
        )
    write_json(args.output, rows)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m benchmarks.soc"))
