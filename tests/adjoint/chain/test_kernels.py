"""Kernels against closed forms on a Gaussian base: ratios, pins, moments, errors."""

from dataclasses import replace

import pytest
import torch
from helpers.tilt_problems import LAMBDA, PROBLEMS, S2, M, gaussian, linear

from adjoint.chain.adjoints import lean_adjoint
from adjoint.chain.kernels import KERNELS, Kernel, make_kernel, measure_mmse, own_time_kernel
from adjoint.chain.rollout import rollout
from adjoint.rewards.reward import Reward
from flows import grid as grids


def mmse_of_gaussian(grid, variance=S2):
    t = grid[:-1]
    return variance * (1 - t) ** 2 / (t**2 * variance + (1 - t) ** 2)


def kernel_on_gaussian(name: str, steps: int) -> Kernel:
    grid = grids.uniform(steps)
    return make_kernel(
        name,
        grid,
        mmse=mmse_of_gaussian(grid) if "mmse" in KERNELS[name].needs else None,
        covariance=torch.tensor([[S2]]) if name == "covariance_matched" else None,
    )


def chain_moments(kernel: Kernel, field, start: float = 1.0) -> tuple[float, float]:
    """Exact mean and variance of the end of an affine chain from N(0, start)."""
    mean, variance = 0.0, start
    probes = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for k in range(kernel.steps):
        at = kernel.mean_x[k] * probes + kernel.mean_v[k] * field(probes, kernel.t[k])
        offset, slope = at[0].item(), (at[1] - at[0]).item()
        mean = offset + slope * mean
        variance = slope**2 * variance + kernel.std[k].item() ** 2
    return mean, variance


def tilt_ratio(kernel: Kernel) -> float:
    """(mean_θ - mean_β) / (λ Var_β) where v_θ solves the regression exactly.

    For a linear reward on a Gaussian base the adjoint does not depend on the state, so the solution
    is v_β plus a constant a step, read off the table.
    """
    base = gaussian()
    x0 = torch.zeros(1, 1, dtype=torch.float64)
    noise = torch.zeros(kernel.steps, 1, 1, dtype=torch.float64)
    xs = rollout(base, base, kernel, x0, noise).xs
    _, gradient, _ = Reward(linear).value_and_gradient(xs[-1])
    lam = lean_adjoint(base, kernel, xs, -gradient).values
    shift = {}
    for k in range(kernel.steps):
        read = lam[k + 1 if kernel.residual_at_next else k]
        v = kernel.residual_v[k]
        shift[float(kernel.t[k])] = -kernel.residual_a[k] * read / v if v > 0 else torch.zeros(1, 1)

    def tilted(x, t, cond=None):
        return base(x, t) + shift[float(t)]

    moved = rollout(tilted, base, kernel, x0, noise).xs[-1] - xs[-1]
    # A control cannot tilt x_0, so its small share of the Euler chains' variance does not count.
    return float(moved) / (LAMBDA * chain_moments(kernel, base, start=0.0)[1])


@pytest.mark.parametrize("steps", [5, 10, 40])
@pytest.mark.parametrize("name", ["euler_consistent", "ancestral_pair"])
def test_consistent_pairs_tilt_their_own_chain_exactly(name, steps):
    assert tilt_ratio(kernel_on_gaussian(name, steps)) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(("steps", "ratio"), [(5, 0.949), (10, 0.998), (40, 0.999)])
def test_published_pair_has_its_known_ratio(steps, ratio):
    assert tilt_ratio(kernel_on_gaussian("euler_published", steps)) == pytest.approx(
        ratio, abs=5e-4
    )


@pytest.mark.parametrize(
    ("steps", "under", "over"), [(5, 0.59, 1.44), (10, 0.78, 1.24), (40, 0.94, 1.06)]
)
def test_mixed_pairs_are_wrong_by_the_known_amounts(steps, under, over):
    """With a noisy last step too: a_k with its own Jacobian, a_{k+1} with that at t+h."""
    grid = grids.uniform(steps)
    t, s, h = grid[:-1], grid[1:], 1 / steps
    sigma = (2 * (1 - t + h) / s).sqrt()
    chain = replace(
        kernel_on_gaussian("euler_published", steps),
        mean_x=1 - h / s,
        mean_v=torch.full_like(s, 2 * h),
        std=h**0.5 * sigma,
        noiseless_last=False,
    )
    own_jacobian = replace(chain, adjoint_t=t, own_time=(True,) * steps)
    next_adjoint = replace(chain, residual_at_next=True)
    assert tilt_ratio(own_jacobian) == pytest.approx(under, abs=1e-2)
    assert tilt_ratio(next_adjoint) == pytest.approx(over, abs=1e-2)


@pytest.mark.parametrize("steps", [5, 10, 40])
@pytest.mark.parametrize("name", ["ancestral", "moment_matched"])
def test_left_point_rule_is_exact_on_a_gaussian(name, steps):
    kernel = kernel_on_gaussian(name, steps)
    xs = torch.randn(steps + 1, 3, 1, dtype=torch.float64)  # the adjoint must not depend on them
    terminal = torch.full((3, 1), -LAMBDA, dtype=torch.float64)
    c = lean_adjoint(gaussian(), kernel, xs, terminal).values
    t = kernel.adjoint_scale  # the grid, with the small time of the first step
    exact = -LAMBDA * S2 / (t**2 * S2 + (1 - t) ** 2)
    torch.testing.assert_close(c[:, 0, 0], exact, rtol=0, atol=2e-14)


@pytest.mark.parametrize("mmse", [None, 0.01, 0.3])
def test_own_time_kernels_weight_a_step_by_what_its_control_costs(mmse):
    """mean_v² / std², at most five times the median, with mean 1; the noiseless last as before."""
    steps = 20
    grid = grids.uniform(steps)
    given = None if mmse is None else torch.full((steps,), mmse, dtype=torch.float64)
    kernel = own_time_kernel(grid, given)
    weights = []
    for t, s in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        rho = t * (1 - s) / (s * (1 - t))
        g, bridge = s * (1 - rho**2), (1 - s) ** 2 * (1 - rho**2)
        variance = bridge + g**2 * (mmse or 0.0)
        weights.append((g * (1 - t)) ** 2 / variance if variance else weights[-1])
    cap = 5 * sorted(weights)[steps // 2 - 1]
    assert (max(weights) > cap) == (mmse != 0.3)  # with little noise the cap acts
    capped = torch.tensor([min(w, cap) for w in weights], dtype=torch.float64)
    expected = capped / capped.mean()
    torch.testing.assert_close(kernel.residual_v**2, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(kernel.residual_a, kernel.residual_v * (1 - grid[:-1]))


@pytest.mark.parametrize("steps", [5, 10, 20, 40])
def test_moment_matched_chain_ends_with_the_exact_moments(steps):
    kernel = kernel_on_gaussian("moment_matched", steps)
    tilted = gaussian(M + LAMBDA * S2)
    assert chain_moments(kernel, gaussian()) == pytest.approx((M, S2), abs=1e-12)
    assert chain_moments(kernel, tilted) == pytest.approx((M + S2, S2), abs=1e-12)


@pytest.mark.parametrize(
    ("steps", "variance"),
    [(5, 0.2162810914), (10, 0.3078208940), (20, 0.3802170377), (40, 0.4283622253)],
)
def test_plain_ancestral_chain_is_under_dispersed_by_the_known_amount(steps, variance):
    kernel = kernel_on_gaussian("ancestral", steps)
    assert chain_moments(kernel, gaussian()) == pytest.approx((M, variance), abs=1e-10)
    # Own-time reading moves the mean to the exact tilt of the data law, .99 ...
    assert chain_moments(kernel, gaussian(M + S2))[0] == pytest.approx(0.99, abs=1e-12)
    # ... the pair's reading to the exact tilt of the chain's own law, .5 + variance.
    pair = kernel_on_gaussian("ancestral_pair", steps)
    assert tilt_ratio(pair) * variance == pytest.approx(variance, abs=1e-9)


def test_measured_mmse_has_its_known_values():
    grid = grids.uniform(10)
    known = [4.25, 4.0379, 3.3428, 2.2768, 1.1945, 0.4821, 0.2009, 0.1085, 0.0501, 0.0118]
    generator = torch.Generator().manual_seed(0)
    base = PROBLEMS["A"].base
    found = measure_mmse(base, grid, base.sample(400_000, generator=generator), generator=generator)
    torch.testing.assert_close(found, torch.tensor(known, dtype=torch.float64), rtol=0.02, atol=0)


@pytest.mark.parametrize("name", KERNELS)
def test_first_step_forgets_the_noise(name):
    """Memoryless: the mean of the first step from t = 0 does not depend on x_0."""
    kernel = kernel_on_gaussian(name, 10)
    x = torch.tensor([[-3.0], [4.0]], dtype=torch.float64)
    mean = kernel.mean_x[0] * x + kernel.mean_v[0] * gaussian()(x, kernel.t[0])
    spread = (mean[1] - mean[0]).abs().item()
    # The published chain pushes with 2h v, whose slope at t = 0 is -1: (1 - h/h) - 2h.
    expected = 7 * 0.2 if name.startswith("euler") else 0.0
    assert spread == pytest.approx(expected, abs=1e-12)


def test_ancestral_kernel_is_the_posterior_average_of_bridges():
    """Two routes to the mean: s x̂₁ + (1-s) ρ x̂₀ against the table's mean_x x + mean_v v."""
    grid = grids.from_times([0.0, 0.1, 0.35, 0.8, 1.0])
    kernel = make_kernel("ancestral", grid)
    x, v = torch.randn(2, 5, 3, dtype=torch.float64)
    for k in range(4):
        t, s = grid[k], grid[k + 1]
        rho = t * (1 - s) / (s * (1 - t))
        mean = s * (x + (1 - t) * v) + (1 - s) * rho * (x - t * v)
        torch.testing.assert_close(
            kernel.mean_x[k] * x + kernel.mean_v[k] * v, mean, rtol=0, atol=1e-14
        )
        assert kernel.std[k].item() == pytest.approx(
            ((1 - s) * (1 - rho**2).sqrt()).item(), abs=1e-15
        )


def test_bad_arguments_are_refused():
    grid = grids.uniform(10)
    with pytest.raises(ValueError, match="kernel must be one of"):
        make_kernel("euler", grid)
    with pytest.raises(ValueError, match="from 0 to 1"):
        make_kernel("ancestral", grids.from_times([0.1, 0.5, 1.0]))
    with pytest.raises(ValueError, match="increasing"):
        make_kernel("ancestral", torch.tensor([0.0, 0.6, 0.5, 1.0]))
    with pytest.raises(ValueError, match="mmse goes with"):
        make_kernel("moment_matched", grid)
    with pytest.raises(ValueError, match="10 positive numbers"):
        make_kernel("moment_matched", grid, mmse=torch.zeros(10))
