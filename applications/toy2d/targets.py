"""Nine two-dimensional laws to tilt, each with a fast sampler and an exact log-density.

All are scaled to lie in about [-3, 3]^2 and come in three families.

* Gaussian mixtures (``ring``, ``grid``, ``two_gaussians``): everything is in closed form, including
  the velocity of the flow and its tilt; they carry their ``GaussianMixture``.
* A curve plus isotropic Gaussian noise (``moons``, ``swiss_roll``, ``spirals``, ``circles``): the
  density is a line integral (see ``curves``).
* ``checkerboard`` is uniform on its eight dark cells (log-density -inf elsewhere).  ``pinwheel``
  turns the arms z of a star-shaped Gaussian mixture by an angle ω|z|² that depends on the radius
  alone: that map preserves areas, so p(x) is the mixture's density at the point turned back.

``modes`` is a set of centres whose nearest-centre cells partition the plane, so that mode
frequencies are defined for every target.  For mixtures, checkerboard and pinwheel they are the true
modes, cells and arms; for the curves they are points at equal steps of probability along the curve
(and, for ``circles``, the origin for the inner circle and points on the outer one): a sensible
partition, not modes.  ``labelled`` samples carry a class in 0 … ``classes`` - 1, from which the
classifier reward is trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from applications.toy2d.noisy_curves import (
    Draw,
    Generator,
    LogDensity,
    noisy_circles,
    noisy_curves,
    polar,
)
from flows import GaussianMixture


@dataclass(frozen=True, eq=False)
class Target:
    """A law on the plane.

    Arguments:
        name: The key in ``TARGETS``.
        description: One line for help texts and captions.
        draw: (n, generator) to points (n, 2) and their classes (n,).
        classes: The number of classes.
        modes: Centres (C, 2) whose nearest-centre cells partition the plane.
        log_density: The exact log p(x), (B, 2) to (B,), or ``None`` where it is unknown.
        mixture: The law as a mixture in closed form, where it is one.
        extent: Half-width of the square window that holds the law, with margin for its tilts.
    """

    name: str
    description: str
    draw: Draw
    classes: int
    modes: Tensor | None
    log_density: LogDensity | None = None
    mixture: GaussianMixture | None = None
    extent: float = 4.0

    def sample(self, n: int, generator: Generator = None) -> Tensor:
        """``n`` independent points, float32 (n, 2), on the CPU."""
        return self.labelled(n, generator)[0]

    def labelled(self, n: int, generator: Generator = None) -> tuple[Tensor, Tensor]:
        """``n`` independent points, float32 (n, 2), and their classes, int64 (n,).

        Raises:
            ValueError: ``n`` is not positive.
        """
        if n < 1:
            raise ValueError(f"n must be a positive number of samples, got {n}")
        x, label = self.draw(n, generator)
        return x.float(), label


def find_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in TARGETS:
        raise ValueError(f"unknown target {name!r}; expected one of {', '.join(TARGETS)}")
    return TARGETS[name]


def nearest(x: Tensor, modes: Tensor) -> Tensor:
    """Index (N,) of the row of ``modes`` (C, d) nearest to each row of ``x`` (N, d)."""
    modes = modes.to(x)
    return (modes.square().sum(1) - 2 * x @ modes.T).argmin(1)


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rows of ``x`` (N, 2) turned counter-clockwise by ``angle`` (N,) or (1,)."""
    c, s = angle.cos(), angle.sin()
    return torch.stack((c * x[:, 0] - s * x[:, 1], s * x[:, 0] + c * x[:, 1]), 1)


# --- Gaussian mixtures -------------------------------------------------------------------------


def _mixture(
    name: str, description: str, means: Tensor, covariances: Tensor, weights: Tensor, label: Tensor
) -> Target:
    """A mixture whose component k has the class ``label[k]``."""
    mixture = GaussianMixture(weights, means, covariances)

    def draw(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        x = mixture.sample(n, generator=generator)
        return x, label[nearest(x, means)]

    classes = int(label.max()) + 1
    return Target(name, description, draw, classes, means.float(), mixture.log_prob, mixture)


def _isotropic(name: str, description: str, means: Tensor, std: float, label: Tensor) -> Target:
    law = GaussianMixture.isotropic(means, std)
    return _mixture(name, description, means, law.covariances, law.weights, label)


def _ring() -> Target:
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    means = polar(torch.full_like(angle, 2.4), angle)
    label = torch.arange(8) // 2
    return _isotropic("ring", "eight Gaussians on a circle", means, 0.25, label)


def _grid() -> Target:
    axis = torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64)
    label = torch.arange(9) // 3
    return _isotropic(
        "grid", "nine Gaussians on a grid", torch.cartesian_prod(axis, axis), 0.3, label
    )


def _two_gaussians() -> Target:
    means = torch.tensor([[-1.3, -0.5], [1.3, 0.5]], dtype=torch.float64)
    covariances = torch.tensor(
        [[[0.30, 0.18], [0.18, 0.25]], [[0.20, -0.12], [-0.12, 0.30]]], dtype=torch.float64
    )
    weights = torch.tensor([0.6, 0.4], dtype=torch.float64)
    text = "two correlated Gaussians of unequal weight"
    return _mixture("two_gaussians", text, means, covariances, weights, torch.arange(2))


# --- curves with Gaussian noise (curves.py) ----------------------------------------------------


def _moons() -> Target:
    def upper(s: Tensor) -> Tensor:
        return 1.7 * (polar(torch.ones_like(s), math.pi * s) - s.new_tensor([0.5, 0.25]))

    law = noisy_curves((upper, lambda s: -upper(s)), 0.16, modes_per_arm=3, nodes=64)
    return Target("moons", "two interleaved half-moons", *law)


def _swiss_roll() -> Target:
    def roll(s: Tensor) -> Tensor:
        angle = 1.5 * math.pi * (1 + 2 * s)
        return polar(0.19 * angle, angle)

    law = noisy_curves((roll,), 0.12, modes_per_arm=8, classes_per_arm=3)
    return Target("swiss_roll", "a rolled-up sheet seen from its edge", *law)


def _spirals() -> Target:
    def arm(s: Tensor) -> Tensor:
        angle = 3 * math.pi * s
        return polar(0.28 * angle, angle)

    law = noisy_curves((arm, lambda s: -arm(s)), 0.11, power=0.5, modes_per_arm=4)
    return Target("spirals", "two intertwined spirals", *law)


def _circles() -> Target:
    return Target("circles", "two concentric circles", *noisy_circles((1.2, 2.5), 0.15))


# --- cells and arms ----------------------------------------------------------------------------


def _checkerboard() -> Target:
    side = 1.5
    cells = torch.tensor([(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0])
    corners = side * (cells - 2).float()  # [-3, 3]^2 in steps of 1.5

    def draw(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        cell = torch.randint(len(cells), (n,), generator=generator)
        return corners[cell] + side * torch.rand(n, 2, generator=generator), cell // 2

    def log_density(x: Tensor) -> Tensor:
        index = (x.detach() / side + 2).floor()
        dark = ((index >= 0) & (index < 4)).all(1) & (index.sum(1) % 2 == 0)
        inside = torch.full_like(x[:, 0], -math.log(len(cells) * side**2))
        return torch.where(dark, inside, -torch.inf)

    text = "uniform on the dark cells of a 4×4 board"
    return Target("checkerboard", text, draw, 4, corners + side / 2, log_density)


def _pinwheel() -> Target:
    arms, twist = 5, 0.25
    angle = torch.arange(arms, dtype=torch.float64) * 2 * math.pi / arms
    star = polar(torch.full_like(angle, 1.5), angle)
    ray = torch.diag(torch.tensor([0.45, 0.15], dtype=torch.float64).square())
    turn = torch.stack([_rotate(torch.eye(2, dtype=torch.float64), a[None]).T for a in angle])
    weights = torch.full((arms,), 1 / arms, dtype=torch.float64)
    mixture = GaussianMixture(weights, star, turn @ ray @ turn.mT)

    def draw(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        z = mixture.sample(n, generator=generator)
        return _rotate(z, twist * z.square().sum(1)), (nearest(z, star) + 1) // 2

    def log_density(x: Tensor) -> Tensor:
        z = x.double()
        return mixture.log_prob(_rotate(z, -twist * z.square().sum(1))).to(x.dtype)

    modes = _rotate(star, twist * star.square().sum(1)).float()
    return Target("pinwheel", "five twisted arms", draw, 3, modes, log_density)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        _ring(),
        _grid(),
        _moons(),
        _checkerboard(),
        _pinwheel(),
        _swiss_roll(),
        _spirals(),
        _circles(),
        _two_gaussians(),
    )
}
