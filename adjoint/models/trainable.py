"""The module that a tilt trains where the caller names none."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adjoint.models.estimate_informed import ESTIMATE, EstimateInformed
from flows.field import Cond, Residual, VelocityField
from flows.networks.mlp import MLPVelocity
from flows.weights import copy_sharing

NARROWEST, WIDEST = 128, 1024
"""Bounds of the width of the network that is trained on a base without parameters."""

FEW_ENTRIES = 32
"""Entries of a sample up to which this network sees the state alone (docs/exactness.md)."""


def trainable(
    base: VelocityField,
    shape: tuple[int, ...],
    seed: int,
    *,
    cond: Cond | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Return a module to train that starts at the base.

    A base with parameters is copied, and its parameters that require a gradient (all, if none does)
    are trained.  A base without parameters (a closed form) gets a zero-initialised residual network
    of ``dtype`` that sees the conditions, and for samples of more than `FEW_ENTRIES` entries the
    base's estimate of the sample.

    Raises:
        ValueError: a base without parameters whose samples or conditions are not vectors.
    """
    if isinstance(base, nn.Module) and any(True for _ in base.parameters()):
        clone = copy_sharing(base, ())
        if not any(p.requires_grad for p in clone.parameters()):
            clone.requires_grad_(True)
        return clone
    sizes = {name: tuple(c.shape[1:]) for name, c in (cond or {}).items()}
    if len(shape) != 1 or any(len(size) != 1 for size in sizes.values()):
        raise ValueError(
            f"a base without parameters, samples of shape {shape} and conditions {sizes} needs "
            "model=, a module to train; only vectors get a residual network by default"
        )
    dims = {name: size[0] for name, size in sizes.items()}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        width = min(max(NARROWEST, 2 * shape[0]), WIDEST)
        many = shape[0] > FEW_ENTRIES
        sees = {**dims, ESTIMATE: shape[0]} if many else dims
        network = MLPVelocity(shape[0], hidden=(width,) * 3, cond_dims=sees, zero_init=True)
        kind = EstimateInformed if many else Residual
        return kind(base, network.to(dtype))


@torch.no_grad()
def check_base_is_apart(
    base: VelocityField, model: nn.Module, x: Tensor, cond: Cond | None
) -> None:
    """Refuse a base whose velocities follow the weights of the model that are trained.

    Raises:
        ValueError: they change with these weights, which are then put back.
    """
    t = torch.tensor(0.5).to(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = [p.clone() for p in trained]
    before, again = base(x, t, cond), base(x, t, cond)
    try:
        for p in trained:
            p.mul_(1.1).add_(0.01)
        after = base(x, t, cond)
    finally:
        for p, weight in zip(trained, kept, strict=True):
            p.copy_(weight)
    if torch.equal(before, again) and not torch.equal(before, after):
        raise ValueError(
            "base must not change while model is trained, but is a callable that evaluates weights "
            "of the model: give the module itself, or a copy, as the base"
        )
