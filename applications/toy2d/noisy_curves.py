"""Curves in the plane plus isotropic Gaussian noise: samplers and exact densities.

A point is c(s) + σ ε with ε ~ N(0, I) and s = u^q, u uniform on [0, 1], so that s has the density
w(s) = s^(1/q - 1)/q and

    p(x) = ∫ N(x; c(s), σ² I) w(s) ds.

The integral is taken at Gauss–Legendre nodes.  A sum of Gaussians of width σ at distance h from
each other along the curve is the integral up to exp(-2π² σ²/h²): with enough ``nodes`` to keep h
below about σ the error is below 1e-7 of the peak.  For a circle the integral is Bessel's I_0 (the
Rice distribution):

    p(x) = exp(-(|x|² + R²)/2σ²) I_0(|x| R/σ²) / (2π σ²).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Generator = torch.Generator | None
Draw = Callable[[int, Generator], tuple[Tensor, Tensor]]
LogDensity = Callable[[Tensor], Tensor]


class NoisyCurves(NamedTuple):
    """Sampler, classes, modes and density of noisy curves: the last arguments of a `Target`."""

    draw: Draw
    classes: int
    modes: Tensor
    log_density: LogDensity


def polar(radius: Tensor, angle: Tensor) -> Tensor:
    """Convert polar coordinates to Cartesian ones (..., 2)."""
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1)


def noisy_curves(
    arms: tuple[Callable[[Tensor], Tensor], ...],
    std: float,
    *,
    power: float = 1.0,
    modes_per_arm: int,
    classes_per_arm: int = 1,
    nodes: int = 256,
) -> NoisyCurves:
    """Add noise of size ``std`` to equally likely ``arms`` c(s), s = u^power.

    Classes are the arms in order, each cut into ``classes_per_arm`` parts of equal probability, and
    the modes are centres at equal steps of probability along each arm.
    """

    def draw(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        arm = torch.randint(len(arms), (n,), generator=generator)
        u = torch.rand(n, generator=generator)
        curves = torch.stack([c(u**power) for c in arms])
        x = curves[arm, torch.arange(n)] + std * torch.randn(n, 2, generator=generator)
        return x, arm * classes_per_arm + (u * classes_per_arm).long()

    roots, gauss = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(nodes))
    s = (roots + 1) / 2
    weight = gauss / 2 * s ** (1 / power - 1) / power
    centres = torch.cat([c(s) for c in arms])
    # log N(x; c, σ²I) = x·c/σ² - |c|²/2σ² - |x|²/2σ² - log 2πσ²: one matrix product a grid
    offset = (weight / len(arms)).log().repeat(len(arms)) - math.log(2 * math.pi * std**2)
    offset = offset - centres.square().sum(1) / (2 * std**2)

    def log_density(x: Tensor) -> Tensor:
        z = x.double()
        radial = z.square().sum(1) / (2 * std**2)
        return (torch.logsumexp(z @ centres.T / std**2 + offset, 1) - radial).to(x.dtype)

    u = (torch.arange(modes_per_arm, dtype=torch.float64) + 0.5) / modes_per_arm
    modes = torch.cat([c(u**power) for c in arms]).float()
    return NoisyCurves(draw, len(arms) * classes_per_arm, modes, log_density)


def noisy_circles(radii: tuple[float, float], std: float) -> NoisyCurves:
    """Add noise of size ``std`` to two equally likely circles; the class is the circle.

    The modes are the origin, whose cell holds the inner circle, and six points on the outer one.
    """
    R = torch.tensor(radii, dtype=torch.float64)

    def draw(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        circle = torch.randint(2, (n,), generator=generator)
        angle = 2 * math.pi * torch.rand(n, generator=generator)
        noise = std * torch.randn(n, 2, generator=generator)
        return polar(R.float()[circle], angle) + noise, circle

    def log_density(x: Tensor) -> Tensor:
        r = (x.double().square().sum(1, keepdim=True) + 1e-300).sqrt()  # differentiable at 0
        exponent = -(r - R).square() / (2 * std**2)
        log_bessel = torch.special.i0e(r * R / std**2).log()  # i0e(z) = exp(-z) I_0(z)
        log_p = torch.logsumexp(exponent + log_bessel, 1) - math.log(4 * math.pi * std**2)
        return log_p.to(x.dtype)

    angle = torch.arange(6) * math.pi / 3
    modes = torch.cat((torch.zeros(1, 2), polar(torch.full_like(angle, radii[1]), angle)))
    return NoisyCurves(draw, 2, modes, log_density)
