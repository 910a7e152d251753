"""Two-dimensional distributions to tilt, each with a fast sampler and most with a log-density.

A `Target` is a name, a description and a sampler; whatever else is known of it (log-density, modes,
classes, closed form) makes more rewards and comparisons possible.  Those of ``TARGETS`` are scaled
to lie in about [-3, 3]^2 and come in three families.

* Gaussian mixtures (``ring``, ``grid``, ``two_gaussians``): everything is in closed form, including
  the velocity of the flow and its tilt; they carry their ``GaussianMixture``.
* A curve plus isotropic Gaussian noise (``moons``, ``swiss_roll``, ``spirals``, ``circles``): the
  density is a line integral (see `noisy_curves`).
* ``checkerboard`` is uniform on its eight dark cells (log-density -inf elsewhere).  ``pinwheel``
  turns the arms z of a star-shaped Gaussian mixture by an angle ω|z|² that depends on the radius
  alone: that map preserves areas, so p(x) is the mixture's density at the point turned back.

``modes`` is a set of centres whose nearest-centre cells partition the plane, so that mode
frequencies are defined.  For mixtures, checkerboard and pinwheel they are the true modes, cells and
arms; for the curves they are points at equal steps of probability along the curve (and, for
``circles``, the origin for the inner circle and points on the outer one): a sensible partition, not
modes.  ``labelled`` samples carry a class in 0 … ``classes`` - 1, from which the classifier reward
is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from applications.common.objects import is_reference, load_object
from applications.toy2d.noisy_curves import (
    Generator,
    LogDensity,
    noisy_circles,
    noisy_curves,
    polar,
)
from flows import GaussianMixture

Draw = Callable[[int, Generator], Tensor | tuple[Tensor, Tensor]]
"""Callable (n, generator) to points (n, 2), or to points and their classes (n,)."""


@dataclass(frozen=True, eq=False)
class Target:
    """A distribution on the plane, given by its sampler and whatever else is known of it.

    Arguments:
        name: short name, for folders, reports and captions.
        description: one line for help texts and captions.
        draw: callable (n, generator) to points (n, 2) and, with ``classes``, their classes (n,).
            It draws all its random numbers from the generator.
        classes: number of classes; 0 where the samples have none.
        modes: centres (C, 2) whose nearest-centre cells partition the plane, or None.
        log_density: the exact log p(x), (B, 2) to (B,), or None where it is unknown.
        mixture: the distribution as a mixture in closed form, where it is one.
        extent: half-width of the square window that holds the distribution, with margin for its
            tilts.
    """

    name: str
    description: str
    draw: Draw
    classes: int = 0
    modes: Tensor | None = None
    log_density: LogDensity | None = None
    mixture: GaussianMixture | None = None
    extent: float = 4.0

    def sample(self, n: int, generator: Generator = None) -> Tensor:
        """Draw ``n`` independent points, float32 (n, 2), on the CPU.

        Raises:
            ValueError: ``n`` is not positive, or ``draw`` returns another shape.
        """
        return self._drawn(n, generator)[0]

    def labelled(self, n: int, generator: Generator = None) -> tuple[Tensor, Tensor]:
        """Draw ``n`` independent points, float32 (n, 2), and their classes, int64 (n,).

        Raises:
            ValueError: ``n`` is not positive, or the target has no classes.
        """
        x, label = self._drawn(n, generator)
        if not self.classes or label is None:
            raise ValueError(f"target {self.name!r} has no classes, its samples have no labels")
        return x, label

    def _drawn(self, n: int, generator: Generator) -> tuple[Tensor, Tensor | None]:
        if n < 1:
            raise ValueError(f"n must be a positive number of samples, got {n}")
        drawn = self.draw(n, generator)
        x, label = drawn if isinstance(drawn, tuple) else (drawn, None)
        if x.shape != (n, 2):
            raise ValueError(
                f"draw of target {self.name!r} must return points of shape ({n}, 2), got "
                f"{tuple(x.shape)}"
            )
        return x.float(), label


def find_target(target: str | Target) -> Target:
    """Return the target of a name in ``TARGETS``, of ``module:Name``, or the target itself.

    What ``module:Name`` stands for is a `Target`, or a class or function without arguments that
    makes one.

    Raises:
        ValueError: there is no such target; the message lists the names.
    """
    found: object = target
    if isinstance(target, str):
        if target in TARGETS:
            return TARGETS[target]
        if not is_reference(target):
            raise ValueError(
                f"unknown target {target!r}; expected one of {', '.join(TARGETS)}, or module:Name"
            )
        found = load_object(target, "target")
        if callable(found):
            found = found()
    if not isinstance(found, Target):
        raise ValueError(
            "target must be a name, module:Name or an applications.toy2d.targets.Target, got "
            f"{found!r} by {target!r}"
        )
    return found


def nearest(x: Tensor, modes: Tensor) -> Tensor:
    """Find the index (N,) of the row of ``modes`` (C, d) nearest to each row of ``x`` (N, d)."""
    modes = modes.to(x)
    return (modes.square().sum(1) - 2 * x @ modes.T).argmin(1)


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Turn the rows of ``x`` (N, 2) counter-clockwise by ``angle`` (N,) or (1,)."""
    c, s = angle.cos(), angle.sin()
    return torch.stack((c * x[:, 0] - s * x[:, 1], s * x[:, 0] + c * x[:, 1]), 1)


# --- Gaussian mixtures -------------------------------------------------------------------------


def _mixture(
    name: str, description: str, means: Tensor, covariances: Tensor, weights: Tensor, label: Tensor
) -> Target:
    """Make the target of a mixture whose component k has the class ``label[k]``."""
    mixture = GaussianMixture(weights, means, covariances)

    def draw(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        x = mixture.sample(n, generator=generator)
        return x, label[nearest(x, means)]

    classes = int(label.max()) + 1
    return Target(name, description, draw, classes, means.float(), mixture.log_prob, mixture)


def _isotropic(name: str, description: str, means: Tensor, std: float, label: Tensor) -> Target:
    mixture = GaussianMixture.isotropic(means, std)
    return _mixture(name, description, means, mixture.covariances, mixture.weights, label)


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


# --- curves with Gaussian noise ----------------------------------------------------------------


def _moons() -> Target:
    def upper(s: Tensor) -> Tensor:
        return 1.7 * (polar(torch.ones_like(s), math.pi * s) - s.new_tensor([0.5, 0.25]))

    curves = noisy_curves((upper, lambda s: -upper(s)), 0.16, modes_per_arm=3, nodes=64)
    return Target("moons", "two interleaved half-moons", *curves)


def _swiss_roll() -> Target:
    def roll(s: Tensor) -> Tensor:
        angle = 1.5 * math.pi * (1 + 2 * s)
        return polar(0.19 * angle, angle)

    curves = noisy_curves((roll,), 0.12, modes_per_arm=8, classes_per_arm=3)
    return Target("swiss_roll", "a rolled-up sheet seen from its edge", *curves)


def _spirals() -> Target:
    def arm(s: Tensor) -> Tensor:
        angle = 3 * math.pi * s
        return polar(0.28 * angle, angle)

    curves = noisy_curves((arm, lambda s: -arm(s)), 0.11, power=0.5, modes_per_arm=4)
    return Target("spirals", "two intertwined spirals", *curves)


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
"""Targets by name."""
