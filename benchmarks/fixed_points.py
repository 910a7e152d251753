r"""Fixed points of each scheme in one dimension: the solutions of adjoint matching without noise.

    python -m benchmarks.fixed_points

Adjoint matching is a regression on states that its own solution visits.  With a velocity free to
take any value at every state and step, the solution v_θ satisfies, with the columns of the scheme's
kernel (`adjoint.chain`), J the Jacobian of v_β and Λ_K = -r',

    M_k(x)  = E[Λ_{k+1}(x_{k+1}) | x_k = x],     x_{k+1} = mean_x x + mean_v v_θ(x, t_k) + std ε,
    Λ_k(x)  = (adjoint_x + adjoint_v J(x, adjoint_t)) M_k(x)  =  E[λ_k | x_k = x],
              plus (scale_{k+1} / scale_k) L'(x) E[ε Λ_{k+1}] where the noise is L(x) ε,
    v_θ(x, t_k) = v_β(x, t_k) - (residual_a / residual_v) · (M_k if residual_at_next else Λ_k)(x).

Solved backward in k on a grid of states, M_k by Gauss-Hermite quadrature.  The mean of the step
depends on v_θ(x, t_k), so every state has a scalar equation to solve; at K = 5 a few states of a
bimodal problem have several roots, and the solver takes the root that the regression itself
reaches from v_β, the first in the direction of its target.  With importance weights the expectation
is under the tilted base chain and explicit: with h_k(x) = E_β[h_{k+1}(x_{k+1}) | x_k = x] and
h_K = e^r, M_k(x) = E_β[h_{k+1} Λ_{k+1} | x_k = x] / h_k(x).

The velocity error at a time is E[(v_θ - v*)²] / E[(v* - v_β)²] under the exact marginal p*_t: 0 is
the exact tilt, 1 the base.  It is a ratio of squares; its root is the relative error.  The
correction v_θ - v_β is linear in time between the grid times and 0 at t = 1, as v* - v_β is; the
mean is over t = .1, .3, .5, .7, .9.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from torch import Tensor
from tqdm import tqdm

from adjoint import KERNELS, Kernel, make_kernel
from benchmarks.common.records import RESULTS
from flows import GaussianMixture, uniform, velocity_and_vjp
from flows.training import write_json

Array = NDArray[np.float64]

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
SCHEMES = (
    "euler_published",
    "euler_consistent",
    "ancestral_pair",
    "ancestral",
    "moment_matched",
    "covariance_matched",
    "ancestral_weighted",
    "moment_matched_weighted",
    "covariance_matched_weighted",
)
"""Names of kernels; the suffix ``_weighted`` adds importance weights."""

STATES = np.linspace(-9.0, 9.0, 721)
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(64)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
SCAN = np.linspace(0.0, 1.0, 41) ** 2
"""Corrections at which a sign change is sought, as fractions of their bound."""


@dataclass(frozen=True)
class Problem:
    """A one-dimensional mixture and the reward r(x) = b x - ½ κ x²."""

    base: GaussianMixture
    b: float
    kappa: float = 0.0

    def exact(self) -> GaussianMixture:
        """Return the tilted mixture."""
        like = self.base.means
        tilted, _ = self.base.tilt(like.new_tensor([[self.kappa]]), like.new_tensor([self.b]))
        return tilted


def mixture(means: list[float], variances: list[float]) -> GaussianMixture:
    """Make a one-dimensional mixture with equal weights, in float64."""
    m = torch.tensor(means, dtype=torch.float64)[:, None]
    return GaussianMixture.isotropic(m, torch.tensor(variances, dtype=torch.float64).sqrt())


PROBLEMS = {
    "A": Problem(mixture([-2.0, 2.0], [0.25, 0.25]), 0.6),
    "B": Problem(mixture([-1.5, 1.2], [0.09, 0.49]), 0.8),
    "C": Problem(mixture([-1.5, 1.2], [0.09, 0.49]), 0.9, 1.5),
}


def quadrature_mmse(base: GaussianMixture, t: Tensor) -> Tensor:
    """Return E Var(X_1 | X_t) by the trapezoidal rule, a scalar."""
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]
    p = base.log_prob(x, t).exp()
    return (p * base.posterior_covariance(x, t)[:, 0, 0]).sum() / p.sum()


def kernel_for(base: GaussianMixture, name: str, steps: int) -> Kernel:
    """Make kernel ``name`` on the uniform grid, with the base's exact mmse."""
    grid = uniform(steps)
    mmse = covariance = None
    if "mmse" in KERNELS[name].needs:
        mmse = torch.stack([quadrature_mmse(base, t) for t in grid[:-1]])
    if name == "covariance_matched":
        covariance = base.covariance()
    return make_kernel(name, grid, mmse=mmse, covariance=covariance)


class Curve:
    """Cubic spline through values (N,) on ``STATES``, continued by its end tangents."""

    def __init__(self, values: Array) -> None:
        self.spline = CubicSpline(STATES, values)
        self.slope = self.spline(STATES[[0, -1]], 1)

    def __call__(self, x: Array) -> Array:
        """Return the values at ``x`` of any shape."""
        inside = np.clip(x, STATES[0], STATES[-1])
        out = x - inside
        value: Array = self.spline(inside)
        return value + np.where(out < 0, self.slope[0], self.slope[1]) * out


def first_root(target: Curve, start: Array, factor: Array, move: float, spread: Array) -> Array:
    """Solve c = E[factor(ε) · target(start + move c + spread ε)] for c (N,) at every state.

    Among several roots it takes the first one in the direction of the right-hand side at c = 0.

    Raises:
        RuntimeError: no root lies within the bound that ``target`` implies.
    """

    def excess(c: Array) -> Array:
        x = (start + move * c)[:, None] + spread[:, None] * NODES
        return c - (factor * target(x)) @ WEIGHTS

    at_zero = excess(np.zeros_like(start))
    bound = (np.abs(factor) @ WEIGHTS) * 1.5 * np.abs(target(STATES)).max() + 1e-9
    side = -np.sign(at_zero) * bound
    low, high = np.zeros_like(start), np.zeros_like(start)
    open_ = at_zero != 0
    for a, b in itertools.pairwise(SCAN):
        crossed = open_ & (np.sign(excess(side * b)) != np.sign(at_zero))
        low, high = np.where(crossed, side * a, low), np.where(crossed, side * b, high)
        open_ &= ~crossed
        if not open_.any():
            break
    else:
        raise RuntimeError(f"no fixed point at states {STATES[open_]}")
    for _ in range(40):
        middle = 0.5 * (low + high)
        same = np.sign(excess(middle)) == np.sign(at_zero)
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    return 0.5 * (low + high)


def fixed_point(problem: Problem, kernel: Kernel, *, weighted: bool = False) -> tuple[Array, Array]:
    """Return v_θ and v_β at the grid times on ``STATES``, each (K, N)."""
    base, x = problem.base, torch.from_numpy(STATES)[:, None]
    value = problem.kappa * STATES - problem.b  # Λ
    log_h = problem.b * STATES - 0.5 * problem.kappa * STATES**2
    found = []
    for k in reversed(range(kernel.steps)):
        v_base = base(x, kernel.t[k])[:, 0].numpy()
        _, jacobian = velocity_and_vjp(base, x, kernel.adjoint_t[k], torch.ones_like(x))
        slope = float(kernel.adjoint_x[k]) + float(kernel.adjoint_v[k]) * jacobian.numpy()
        back = np.broadcast_to(slope, (len(STATES), len(NODES)))
        follows_base = kernel.noiseless_last and k == kernel.steps - 1
        if (noise := kernel.state_noise) is not None:
            spread = noise.root(base, k, x)[:, 0, 0].detach().numpy()
            one = torch.ones_like(x)
            pull = noise.pull(base, k, x, one, one)[:, 0].numpy()
            pull = pull * float(kernel.adjoint_scale[k + 1] / kernel.adjoint_scale[k])
            back = back + pull[:, None] * NODES
        else:
            spread = np.full_like(STATES, 0.0 if follows_base else float(kernel.std[k]))
        residual_v, residual_a = float(kernel.residual_v[k]), float(kernel.residual_a[k])
        # A step without a residual keeps the base.
        ratio = residual_a / residual_v if residual_v else 0.0
        factor = -ratio * (np.ones_like(back) if kernel.residual_at_next else back)

        mean_v = float(kernel.mean_v[k])
        start = float(kernel.mean_x[k]) * STATES + mean_v * v_base
        moved = Curve(value)
        correction = np.zeros_like(STATES)
        if not (weighted or follows_base):
            correction = first_root(moved, start, factor, mean_v, spread)
        ends = (start + mean_v * correction)[:, None] + spread[:, None] * NODES
        weights = np.broadcast_to(WEIGHTS, ends.shape)
        if weighted:
            log_w = Curve(log_h)(ends) + np.log(WEIGHTS)
            top = log_w.max(1, keepdims=True)
            weights = np.exp(log_w - top)
            log_h = np.log(weights.sum(1)) + top[:, 0]
        weights = weights / weights.sum(1, keepdims=True)
        ahead = weights * moved(ends)
        value = (back * ahead).sum(1)
        found.append((v_base + (factor * ahead).sum(1), v_base))
    v, v_base_all = (np.stack(part) for part in zip(*found[::-1], strict=True))
    return v, v_base_all


def velocity_error(problem: Problem, kernel: Kernel, v: Array, v_base: Array) -> float:
    """Return the mean relative velocity error of v (K, N) over ``TIMES``."""
    exact, x = problem.exact(), torch.from_numpy(STATES)[:, None]
    corrections = np.concatenate([v - v_base, np.zeros((1, len(STATES)))])
    times = kernel.t.numpy()
    errors = []
    for t in TIMES:
        k = min(int(np.searchsorted(times, t + 1e-9)) - 1, kernel.steps - 1)
        share = (t - times[k]) / (times[k + 1] - times[k])
        correction = (1 - share) * corrections[k] + share * corrections[k + 1]
        right = (exact(x, t) - problem.base(x, t))[:, 0].numpy()
        density = exact.log_prob(x, t).exp().numpy()
        errors.append((density * (correction - right) ** 2).sum() / (density * right**2).sum())
    return float(np.mean(errors))


def scheme_error(problem: Problem, scheme: str, steps: int) -> float:
    """Return the velocity error of the fixed point of a scheme in ``steps`` steps."""
    name = scheme.removesuffix("_weighted")
    kernel = kernel_for(problem.base, name, steps)
    v, v_base = fixed_point(problem, kernel, weighted=scheme != name)
    return velocity_error(problem, kernel, v, v_base)


@dataclass(frozen=True)
class Args:
    """Compute the fixed points of every scheme in one dimension (about three minutes)."""

    steps: tuple[int, ...] = (5, 10, 20, 40)
    """Numbers of steps K."""
    schemes: tuple[str, ...] = SCHEMES
    """Schemes, kernel names with or without the suffix _weighted."""
    output: Path = RESULTS / "fixed_points.json"
    """File of the rows."""


def main(args: Args) -> list[dict[str, str | int | float]]:
    """Compute, print and write all rows."""
    torch.set_num_threads(1)
    cases = [(s, k, p) for s in args.schemes for k in args.steps for p in PROBLEMS]
    rows: list[dict[str, str | int | float]] = []
    for scheme, steps, name in tqdm(cases, desc="fixed points"):
        error = scheme_error(PROBLEMS[name], scheme, steps)
        rows.append({"problem": name, "scheme": scheme, "steps": steps, "velocity_error": error})
    print(f"{'':<28}" + "".join(f"{f'K={k}, A/B/C':>20}" for k in args.steps))
    texts = iter([f"{row['velocity_error']:.3f}".lstrip("0") for row in rows])
    for scheme in args.schemes:
        groups = ("/".join(itertools.islice(texts, len(PROBLEMS))) for _ in args.steps)
        print(f"{scheme:<28}" + "".join(f"{group:>20}" for group in groups))
    write_json(args.output, rows)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m benchmarks.fixed_points"))
