"""Rewards on the plane, made for a target so that the tilt p*(x) ∝ p(x) exp(r(x)) is visible.

Each entry of ``REWARDS`` maps a ``Target`` to a ``ToyReward``.  The strengths are chosen so that
base samples, weighted by exp(r), keep an effective sample size of about a twentieth to a half.
Any differentiable function r(x, cond) of one's own serves as well, see `make_reward`.

    linear      r = bᵀx
    quadratic   r = -½ (x - c)ᵀA(x - c) + ½ cᵀAc, a well around c, positive definite A
    ring        r = -(|x - c| - R)²/2w², a circle that cuts through the target
    half_plane  r = h sigmoid((nᵀx - o)/w), a smooth step of height h
    peaks       r = Σ_j h_j exp(-|x - p_j|²/2w²) with the p_j at up to three of the target's centres
    classifier  r = log P(class 0 | x) under a small network trained on samples of the target

The first two carry ``quadratic_form`` (A, b) with r = -½ xᵀAx + bᵀx: the tilt of a Gaussian mixture
by such a reward is known in closed form (``GaussianMixture.tilt``).
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adjoint import AbstractReward, Reward, ValueFunction, as_reward
from applications.common.objects import is_reference, load_object
from applications.toy2d.targets import Target


@dataclass(frozen=True, eq=False)
class ToyReward:
    """A differentiable reward maps points (B, 2) to values (B,); the condition is ignored.

    Arguments:
        name: short name, for folders, reports and captions.
        description: one line for help texts and captions.
        value: the function itself, in the dtype and on the device of its argument.
        quadratic_form: (A, b) of r = -½ xᵀAx + bᵀx, float64 (2, 2) and (2,), where r has that form.
        own: a reward of one's own with the same value, whose gradient and cap the tilt takes.
    """

    name: str
    description: str
    value: Callable[[Tensor], Tensor]
    quadratic_form: tuple[Tensor, Tensor] | None = None
    own: AbstractReward | None = None

    @property
    def for_tilt(self) -> AbstractReward:
        """Return the reward that a tilt is trained toward."""
        return Reward(self, name=self.name) if self.own is None else self.own

    def __call__(self, x: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the rewards (B,) of points ``x`` (B, 2).

        Raises:
            ValueError: ``x`` is not of shape (B, 2).
        """
        if x.ndim != 2 or x.shape[1] != 2:
            raise ValueError(f"x must have shape (B, 2), got {tuple(x.shape)}")
        return self.value(x)


def make_reward(reward: str | ValueFunction, target: Target) -> ToyReward:
    """Return the reward of a name in ``REWARDS``, of ``module:Name``, or of a function.

    Arguments:
        reward: a name, ``module:Name`` or a callable.  What ``module:Name`` stands for is a
            callable, or a class without arguments whose instances are.  A callable is a `ToyReward`
            or any differentiable r(x, cond), (B, 2) to (B,).
        target: the target that a reward of ``REWARDS`` is made for.

    Raises:
        ValueError: there is no such reward, the target lacks what the reward needs, or the callable
            takes other arguments.
    """
    found: object = reward
    if isinstance(reward, str):
        if reward in REWARDS:
            return REWARDS[reward](target)
        if not is_reference(reward):
            raise ValueError(
                f"unknown reward {reward!r}; expected one of {', '.join(REWARDS)}, or module:Name"
            )
        found = load_object(reward, "reward")
        if isinstance(found, type):
            found = found()
    if isinstance(found, ToyReward):
        return found
    return _from_function(found)


def _from_function(function: Any) -> ToyReward:
    """Wrap a differentiable function r(x, cond)."""
    try:
        own = as_reward(function)
    except TypeError as error:
        raise ValueError(f"reward must be a callable (x, cond): {error}") from error
    documented = None if own is function else inspect.getdoc(function)
    lines = (documented or own.name).splitlines()
    return ToyReward(own.name, lines[0].rstrip("."), lambda x: own(x, None), own=own)


def _quadratic_form(name: str, description: str, A: list[list[float]], b: list[float]) -> ToyReward:
    A64, b64 = torch.tensor(A, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)

    def value(x: Tensor) -> Tensor:
        return x @ b64.to(x) - 0.5 * (x @ A64.to(x) * x).sum(1)

    return ToyReward(name, description, value, (A64, b64))


def linear(target: Target) -> ToyReward:
    """Return a reward with a constant slope toward the upper right."""
    return _quadratic_form("linear", "a constant slope", [[0.0, 0.0], [0.0, 0.0]], [0.8, 0.5])


def quadratic(target: Target) -> ToyReward:
    """Return a well around c = (1, -0.5), narrower along one diagonal than along the other."""
    return _quadratic_form(
        "quadratic", "a well off the centre", [[1.0, 0.3], [0.3, 0.7]], [0.85, -0.05]
    )


def ring(target: Target) -> ToyReward:
    """Return a reward that is highest on a circle of radius 1.5 around (0.9, 0.4)."""
    centre, radius, width = (0.9, 0.4), 1.5, 0.45

    def value(x: Tensor) -> Tensor:
        squared = (x - x.new_tensor(centre)).square().sum(1)
        distance = (squared + 1e-6).sqrt()  # smooth at the centre
        return -0.5 * ((distance - radius) / width).square()

    return ToyReward("ring", "a circle off the centre", value)


def half_plane(target: Target) -> ToyReward:
    """Return a smooth step of height 3 up to the half-plane 0.8 x + 0.6 y > 0.5."""
    normal, offset, width, height = (0.8, 0.6), 0.5, 0.3, 3.0

    def value(x: Tensor) -> Tensor:
        return height * torch.sigmoid((x @ x.new_tensor(normal) - offset) / width)

    return ToyReward("half_plane", "a smooth step across the plane", value)


def peaks(target: Target) -> ToyReward:
    """Return bumps of heights 3, 2.5 and 2 at centres of the target a third of the list apart.

    A target of two modes has two bumps, half the list apart.

    Raises:
        ValueError: the target has no ``modes``.
    """
    if target.modes is None:
        raise ValueError(f"peaks needs a target with modes, {target.name!r} has none")
    modes, heights, width = target.modes, (3.0, 2.5, 2.0)[: len(target.modes)], 0.6
    where = modes[[len(modes) * j // len(heights) for j in range(len(heights))]]

    def value(x: Tensor) -> Tensor:
        squares = (x[:, None, :] - where.to(x)).square().sum(2)
        return (-squares / (2 * width**2)).exp() @ x.new_tensor(heights)

    return ToyReward("peaks", "bumps of different heights", value)


def classifier(target: Target, *, label: int = 0, seed: int = 0) -> ToyReward:
    """Return log P(label | x) under a small network, trained for a second on labelled samples.

    Labels are smoothed by a tenth, which keeps the log-probability above about -5 on most of the
    target and its slope moderate.  Training is deterministic in ``seed`` and leaves the global
    generator alone.

    Raises:
        ValueError: the target has no classes, or not this one.
    """
    if not target.classes:
        raise ValueError(f"classifier needs a target with classes, {target.name!r} has none")
    if not 0 <= label < target.classes:
        raise ValueError(f"label must be one of 0 … {target.classes - 1}, got {label}")
    layers = _train_classifier(target, seed)

    def value(x: Tensor) -> Tensor:
        return F.log_softmax(_logits(layers, x), 1)[:, label]

    text = f"log-probability of class {label} of {target.classes} under a trained network"
    return ToyReward("classifier", text, value)


Layers = list[tuple[Tensor, Tensor]]


def _logits(layers: Layers, x: Tensor) -> Tensor:
    """Evaluate a fully connected network with SiLU between layers, in the dtype of ``x``."""
    for weight, bias in layers[:-1]:
        x = F.silu(F.linear(x, weight.to(x), bias.to(x)))
    weight, bias = layers[-1]
    return F.linear(x, weight.to(x), bias.to(x))


def _train_classifier(target: Target, seed: int, *, width: int = 64, steps: int = 400) -> Layers:
    """Train weights and biases by Adam from the initial values of PyTorch's linear layers."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (2, width, width, target.classes)
    layers = []
    for n_in, n_out in itertools.pairwise(sizes):
        layer = torch.rand(n_out, n_in + 1, generator=generator).sub(0.5).mul(2 / math.sqrt(n_in))
        layers.append((layer[:, :-1].requires_grad_(), layer[:, -1].requires_grad_()))
    optimiser = torch.optim.Adam([p for layer in layers for p in layer], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with torch.enable_grad():
        for _ in range(steps):
            x, label = target.labelled(512, generator)
            loss = F.cross_entropy(_logits(layers, x), label, label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return [(weight.detach(), bias.detach()) for weight, bias in layers]


REWARDS: dict[str, Callable[[Target], ToyReward]] = {
    "linear": linear,
    "quadratic": quadratic,
    "ring": ring,
    "half_plane": half_plane,
    "peaks": peaks,
    "classifier": classifier,
}
"""Makers of rewards by name."""
