"""Wrong pipelines have to fail both tests that the right one passes.

The certificate test: the standard deviation of log w on the judge's chain, of the right base and
the right reward, is near zero.  The velocity test: the velocity is that of the exact tilt.

On a Gaussian base with a linear reward the lean adjoint does not depend on the state, so that a
scheme's fixed point is known without training: v_β - (residual_a / residual_v) λ, read off the
table step by step.  With a mixture the fixed point of a wrong reward is known as an exact tilt by
that reward.
"""

import math
from dataclasses import replace

import pytest
import torch
from helpers.tilt_problems import LAMBDA, PROBLEMS, S2, M, gaussian, linear

from adjoint.certificate import certify
from adjoint.chain.adjoints import lean_adjoint
from adjoint.chain.kernels import make_kernel, measure_mmse
from adjoint.rewards.reward import Reward
from flows import grid as grids

STEPS = 40
GRID = grids.uniform(STEPS)
TIMES = GRID[[4, 12, 20, 28, 36]]  # .1, .3, .5, .7, .9
BASE, EXACT = gaussian(), gaussian(M + LAMBDA * S2)


def kernel_of(name):
    t = GRID[:-1]
    mmse = S2 * (1 - t) ** 2 / (t**2 * S2 + (1 - t) ** 2)
    return make_kernel(name, GRID, mmse=mmse if name == "moment_matched" else None)


def constant_noise(sigma):
    """Euler-Maruyama pair of dX = (v + σ²/(2η) (v - X/t)) dt + σ dB, η = (1-t)/t, at constant σ.

    It has the marginals of the flow, but is not memoryless.
    """
    t, h = GRID[:-1], GRID.diff()
    extra = sigma**2 * t / (2 * (1 - t))
    mean_x, mean_v = 1 - h * sigma**2 / (2 * (1 - t)), h * (1 + extra)
    std = h.sqrt() * sigma
    return replace(
        kernel_of("euler_consistent"),
        name="constant",
        mean_x=mean_x,
        mean_v=mean_v,
        std=std,
        adjoint_x=mean_x,
        adjoint_v=mean_v,
        residual_v=mean_v / std,
        residual_a=std,
        noiseless_last=False,
    )


class FixedPoint:
    """Solution of the regression: the base plus a constant at each time of the grid."""

    def __init__(self, kernel, reward, *, reverse=False):
        xs = torch.zeros(STEPS + 1, 1, 1, dtype=torch.float64)
        _, gradient, _ = Reward(reward).value_and_gradient(xs[-1])
        lam = lean_adjoint(BASE, kernel, xs, -gradient).values.flatten()
        if reverse:
            lam = lam.flip(0)
        lam = lam[1:] if kernel.residual_at_next else lam[:-1]
        self.shifts = (-kernel.residual_a / kernel.residual_v * lam).nan_to_num(0.0)

    def __call__(self, x, t, cond=None):
        # The judge asks for one time a step, or for a batch of steps times trajectories.
        return BASE(x, t) + self.shifts[(t * STEPS).round().long()].reshape(-1, 1)


def velocity_error(field):
    """Mean over times of the error of the velocity, relative to what the exact tilt adds."""
    x = torch.linspace(-2, 3, 5, dtype=torch.float64)[:, None]
    errors = [(field(x, t) - EXACT(x, t)).norm() / (EXACT(x, t) - BASE(x, t)).norm() for t in TIMES]
    return float(torch.stack(errors).mean())


def log_weight_std(field, base=BASE, reward=linear, kernel=None):
    kernel = kernel_of("moment_matched") if kernel is None else kernel
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(1000, base.dim, generator=generator, dtype=torch.float64)
    return certify(field, base, reward, kernel, x0, generator=generator).log_weight_std


def scaled(factor):
    return lambda x, cond=None: factor * linear(x)


WRONG = {
    "constant noise 0.5": FixedPoint(constant_noise(0.5), linear),
    "constant noise 1": FixedPoint(constant_noise(1.0), linear),
    "constant noise 1.4": FixedPoint(constant_noise(1.4), linear),
    "reward with its sign flipped": FixedPoint(kernel_of("moment_matched"), scaled(-1.0)),
    "temperature of 10": FixedPoint(kernel_of("moment_matched"), scaled(0.1)),
    "time reversed": FixedPoint(kernel_of("moment_matched"), linear, reverse=True),
}


@pytest.mark.parametrize("name", ["moment_matched", "ancestral"])
def test_the_right_pipeline_passes_both(name):
    right = FixedPoint(kernel_of(name), linear)
    assert velocity_error(right) < 1e-12
    assert log_weight_std(right) < 1e-3
    assert log_weight_std(BASE) > 0.6  # before the tilt


@pytest.mark.parametrize("name", ["euler_published", "euler_consistent", "ancestral_pair"])
def test_other_memoryless_schemes_pass_both_up_to_their_discretisation(name):
    other = FixedPoint(kernel_of(name), linear)
    assert velocity_error(other) < 0.16
    assert log_weight_std(other) < 0.13


@pytest.mark.parametrize("name", WRONG)
def test_wrong_pipelines_fail_both(name):
    assert velocity_error(WRONG[name]) > 0.4
    assert log_weight_std(WRONG[name]) > 0.2


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.4])
def test_it_is_the_constant_noise_that_is_wrong_and_not_its_discretisation(sigma):
    """The fixed point above approaches that of continuous time, which is not the exact tilt.

    With C = t²s² + (1-t)² the drift has the slope v' - σ²/(2C), so that
    a = -λ s/√C exp(-½σ² ∫_t^1 dτ/C), and v = v_β - σ² a / (1 + σ²/(2η)).
    """
    t, s = TIMES, S2**0.5
    variance = t**2 * S2 + (1 - t) ** 2
    integral = (math.atan(s) - (((1 + S2) * t - 1) / s).atan()) / s
    a = -LAMBDA * s / variance.sqrt() * (-0.5 * sigma**2 * integral).exp()
    continuous = -(sigma**2) * a / (1 + sigma**2 * t / (2 * (1 - t)))
    found = WRONG[f"constant noise {sigma:g}"].shifts[(t * STEPS).round().long()]
    exact = LAMBDA * S2 * (1 - t) / variance
    assert float((found - continuous).norm() / continuous.norm()) < 0.04
    assert float((exact - continuous).norm() / exact.norm()) > 0.25


MIXTURE = PROBLEMS["square"]
TILTED = MIXTURE.exact()[0]
WRONG_ON_MIXTURE = {
    "untilted": MIXTURE.base,
    "reward with its sign flipped": MIXTURE.base.tilt(-MIXTURE.A, -MIXTURE.b)[0],
    "temperature of 10": MIXTURE.base.tilt(MIXTURE.A / 10, MIXTURE.b / 10)[0],
    "time reversed": lambda x, t, cond=None: (
        MIXTURE.base(x, t) + TILTED(x, 1 - t) - MIXTURE.base(x, 1 - t)
    ),
}


def judge_on_mixture(field):
    """Relative velocity error under p*_t, and the standard deviation of log w."""
    generator = torch.Generator().manual_seed(1)
    errors = []
    for t in TIMES:
        x = TILTED.marginal(float(t)).sample(2000, generator=generator)
        exact = TILTED(x, t)
        errors.append((field(x, t) - exact).norm() / (exact - MIXTURE.base(x, t)).norm())
    x1 = MIXTURE.base.sample(20_000, generator=generator)
    mmse = measure_mmse(MIXTURE.base, GRID, x1, generator=generator)
    kernel = make_kernel("moment_matched", GRID, mmse=mmse)
    std = log_weight_std(field, MIXTURE.base, MIXTURE.reward, kernel)
    return float(torch.stack(errors).mean()), std


def test_the_right_tilt_of_a_mixture_passes_both():
    error, std = judge_on_mixture(TILTED)
    assert error == 0
    assert std < 0.4


@pytest.mark.parametrize("name", WRONG_ON_MIXTURE)
def test_wrong_tilts_of_a_mixture_fail_both(name):
    error, std = judge_on_mixture(WRONG_ON_MIXTURE[name])
    assert error > 0.4
    assert std > 1.5
