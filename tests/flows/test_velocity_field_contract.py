"""Every velocity field of the repository keeps the rules of `flows.testing`."""

import pytest
import torch
from helpers import pretrained_fakes as fakes
from torch import nn

from adjoint import RewardInformed
from adjoint.models.reward_informed import reward_informed
from applications.rl.agents.networks import FlowActor
from flows import (
    GaussianMixture,
    Guided,
    MLPVelocity,
    OnCanonicalPath,
    Residual,
    UNetVelocity,
    check_cond,
    load,
)
from flows.field import batch_time
from flows.schedule import Cosine
from flows.testing import RULES, check_velocity_field

F64 = torch.float64
GENERATOR = torch.Generator().manual_seed(0)
POINTS = torch.randn(5, 3, generator=GENERATOR)
IMAGES = torch.randn(3, 1, 8, 8, generator=GENERATOR)
CLASSES = {"label": torch.tensor([0, 2, 1])}
SIZES = {"c": torch.randn(5, 2, generator=GENERATOR)}
MIXTURE = GaussianMixture.isotropic(torch.randn(4, 3, generator=GENERATOR, dtype=F64), 0.4)


def mlp(**options):
    return MLPVelocity(3, hidden=(8, 8), **options)


def actor(**options):
    return FlowActor(2, 3, hidden=(8, 8), **options)


def informed():
    field = reward_informed(mlp(), lambda x, cond=None: -x.square().sum(1), dim=3, hidden=(8,))
    nn.init.ones_(field.gain.weight)
    return field


class Renamed(nn.Module):
    """An actor whose condition is called c."""

    def __init__(self, actor):
        super().__init__()
        self.actor = actor

    def forward(self, x, t, cond=None):
        return self.actor(x, t, {"observation": cond["c"]})

    def linearised(self, x, t, cond):
        return self.actor.linearised(x, t, {"observation": cond["c"]})


FIELDS = {
    "MLPVelocity": (mlp, POINTS, None),
    "MLPVelocity, conditional": (lambda: mlp(cond_dims={"c": 2}), POINTS, SIZES),
    "UNetVelocity": (lambda: UNetVelocity(1, widths=(4, 8)), IMAGES, None),
    "UNetVelocity, classes": (lambda: UNetVelocity(1, widths=(4, 8), classes=3), IMAGES, CLASSES),
    "GaussianMixture": (lambda: MIXTURE, POINTS.double(), None),
    "Residual": (lambda: Residual(MIXTURE, mlp().double()), POINTS.double(), None),
    "Guided": (
        lambda: Guided(mlp(cond_dims={"c": 2}), 1.5, {"c": torch.zeros(1, 2)}),
        POINTS,
        SIZES,
    ),
    "Guided, of two fields": (
        lambda: Guided(mlp(cond_dims={"c": 2}), 1.5, {}, null_field=mlp(cond_dims={"c": 2})),
        POINTS,
        SIZES,
    ),
    "RewardInformed": (informed, POINTS, None),
    "FlowActor": (lambda: Renamed(actor()), POINTS, SIZES),
    "FlowActor, normalised": (lambda: Renamed(actor(layer_norm=True)), POINTS, SIZES),
    "OnCanonicalPath": (lambda: OnCanonicalPath(mlp(), Cosine(), "noise"), POINTS, None),
    "Pretrained": (
        lambda: load(fakes.SD3Transformer2DModel(), quiet=True),
        torch.randn(4, 2, 1, 2, generator=GENERATOR, dtype=F64),
        {
            "encoder_hidden_states": torch.randn(4, fakes.DIM, generator=GENERATOR, dtype=F64),
            "pooled_projections": torch.zeros(4, 2, dtype=F64),
        },
    ),
}
"""By name: a function that makes the field, states, and conditions."""


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_keeps_the_rules(name):
    torch.manual_seed(0)
    make, x, cond = FIELDS[name]
    check_velocity_field(make(), x, cond)


def test_the_optional_promises_are_checked_for_somebody():
    made = [make() for make, _, _ in FIELDS.values()]
    assert sum(bool(getattr(field, "broadcasts", False)) for field in made) >= 3
    assert any(hasattr(field, "linearised") for field in made)
    assert any(isinstance(field, RewardInformed) for field in made)


def test_a_module_is_left_as_it_was():
    field = mlp()
    field.layers[0].eval()
    grad = field.last.weight.grad = torch.ones_like(field.last.weight)
    check_velocity_field(field, POINTS)
    assert field.training
    assert not field.layers[0].training
    assert field.last.weight.grad is grad
    assert field.last.bias.grad is None


# --- every rule can fail -------------------------------------------------------------------------


class Good(nn.Module):
    """A linear field, which the classes below break."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3) + 0.1)

    def forward(self, x, t, cond=None):
        check_cond(cond, x)
        return (x @ self.weight) * batch_time(t, x)


class Flat(Good):
    def forward(self, x, t, cond=None):
        return super().forward(x, t, cond)[:, :1]


class NotFinite(Good):
    def forward(self, x, t, cond=None):
        return super().forward(x, t, cond) / (x - x)


class Random(Good):
    def forward(self, x, t, cond=None):
        return super().forward(x, t, cond) + torch.randn_like(x)


class FirstTime(Good):
    def forward(self, x, t, cond=None):
        t = torch.as_tensor(t)
        return super().forward(x, t.expand(len(x)) if t.ndim else t + 0.1, cond)


class Mixing(Good):
    def forward(self, x, t, cond=None):
        return super().forward(x - x.mean(0), t, cond)


class FalseBroadcast(Good):
    broadcasts = True

    def forward(self, x, t, cond=None):
        return (
            (x @ self.weight) * torch.as_tensor(t).mean() if x.ndim == 3 else super().forward(x, t)
        )


class Transposed(Good):
    def linearised(self, x, t, cond=None):
        times = t.reshape(-1, 1, 1)
        return (x @ self.weight) * times, lambda k, c: (c @ self.weight) * t[k]

    def __init__(self):
        super().__init__()
        self.weight.data.triu_()


class Detached(Good):
    def forward(self, x, t, cond=None):
        return super().forward(x.detach(), t, cond)


class InPlace(Good):
    def forward(self, x, t, cond=None):
        v = super().forward(x.clone(), t, cond)
        if x.requires_grad:
            x.data.add_(1e-3)
        return v


class Hidden(Good):
    """A number that the state dict does not have, and that copies forget."""

    def __init__(self):
        super().__init__()
        self.scale = 2.0

    def __deepcopy__(self, memo):
        return type(self).__bases__[0]()

    def forward(self, x, t, cond=None):
        return self.scale * super().forward(x, t, cond)


class Shared(Good):
    def __deepcopy__(self, memo):
        return self


class Unsaved(Good):
    def state_dict(self, **options):
        return {"weight": torch.zeros(3, 3)}


class Unused(Good):
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(2))


class NotFiniteGradient(Good):
    def __init__(self):
        super().__init__()
        self.root = nn.Parameter(torch.zeros(3))

    def forward(self, x, t, cond=None):
        return super().forward(x, t, cond) + self.root.abs().sqrt()


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (Flat, "shape: field returned shape"),
        (NotFinite, "values: the velocity is not finite"),
        (Random, "two evaluations must give the same"),
        (FirstTime, "a scalar time must stand for"),
        (Mixing, "rows must not mix, but row 0"),
        (FalseBroadcast, "broadcasts is true"),
        (Transposed, r"linearised must give \(dv/dx\)"),
        (Hidden, "a deep copy must give the same"),
        (Detached, "must be differentiable in its states"),
        (InPlace, "must not change its states in place"),
        (Shared, "a deep copy must not share"),
        (Unsaved, "a copy that loads the state dict"),
        (Unused, "none reaches the parameter unused"),
        (NotFiniteGradient, "that of root is not finite"),
    ],
)
def test_a_field_that_breaks_a_rule_is_told_which(kind, match):
    check_velocity_field(Good(), POINTS, {})
    with pytest.raises(AssertionError, match=match):
        check_velocity_field(kind(), POINTS)


def test_states_that_cannot_tell_are_refused():
    with pytest.raises(ValueError, match="B at least 2"):
        check_velocity_field(Good(), POINTS[:1])
    assert len(RULES) == 8
