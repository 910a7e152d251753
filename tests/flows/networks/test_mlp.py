"""The small networks: inputs that matter, inputs that do not, and whether they learn."""

import math

import pytest
import torch

from flows.mixture import GaussianMixture
from flows.networks.mlp import MAX_FREQUENCY, MIN_FREQUENCY, MLPVelocity, TimeEmbedding


def conditional_network(**options):
    torch.manual_seed(0)
    return MLPVelocity(2, hidden=(16, 8), cond_dims={"goal": 2, "size": 1}, **options)


def inputs(batch=5):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 2, generator=g)
    t = torch.rand(batch, generator=g)
    cond = {"goal": torch.randn(batch, 2, generator=g), "size": torch.randn(batch, 1, generator=g)}
    return x, t, cond


def test_time_embedding_is_fourier_features():
    t = torch.tensor([0.0, 0.3, 1.0])
    features = TimeEmbedding(6)(t)
    for j, ratio in enumerate((0.0, 0.5, 1.0)):
        frequency = MIN_FREQUENCY * (MAX_FREQUENCY / MIN_FREQUENCY) ** ratio
        torch.testing.assert_close(features[:, j], (2 * math.pi * frequency * t).sin())
        torch.testing.assert_close(features[:, 3 + j], (2 * math.pi * frequency * t).cos())


def test_time_embedding_tells_all_times_apart():
    features = TimeEmbedding(32)(torch.linspace(0, 1, 101))
    distances = torch.cdist(features, features) + torch.eye(101)
    assert distances.min() > 0.01


@pytest.mark.parametrize("dim", [0, -2, 5])
def test_time_embedding_rejects(dim):
    with pytest.raises(ValueError, match=f"positive even number, got {dim}"):
        TimeEmbedding(dim)


def test_scalar_time_equals_a_batch_of_it():
    network, (x, _, cond) = conditional_network(), inputs()
    expected = network(x, torch.full((5,), 0.3), cond)
    torch.testing.assert_close(network(x, torch.tensor(0.3), cond), expected)


def test_forward_is_the_documented_formula():
    network, (x, t, cond) = conditional_network(), inputs()
    features = network.time(t)
    a, b = network.scales(features), network.shifts(features)
    h = torch.cat([x, cond["goal"], cond["size"]], dim=1)
    for layer, columns in zip(network.layers, (slice(0, 16), slice(16, 24)), strict=True):
        z = (1 + a[:, columns]) * layer(h) + b[:, columns]
        h = z * torch.sigmoid(z)
    torch.testing.assert_close(network(x, t, cond), network.last(h))


def test_points_do_not_see_each_other():
    network, (x, t, cond) = conditional_network(), inputs()
    alone = network(x[2:3], t[2:3], {name: value[2:3] for name, value in cond.items()})
    torch.testing.assert_close(network(x, t, cond)[2:3], alone)


def test_every_input_matters_and_conditions_go_by_name():
    network, (x, t, cond) = conditional_network(), inputs()
    v = network(x, t, cond)
    swapped = {"size": cond["size"], "goal": cond["goal"]}
    assert torch.equal(v, network(x, t, swapped))
    for name in cond:
        assert not torch.allclose(v, network(x, t, {**cond, name: cond[name] + 1}))
    assert not torch.allclose(v, network(x + 1, t, cond))
    assert not torch.allclose(v, network(x, t / 2, cond))


def test_zero_init_starts_at_zero_and_can_leave_it():
    network, (x, t, cond) = conditional_network(zero_init=True), inputs()
    v = network(x, t, cond)
    assert torch.equal(v, torch.zeros_like(v))
    (v - 1).square().sum().backward()
    assert network.last.weight.grad.abs().max() > 0
    assert conditional_network()(x, t, cond).abs().max() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cond": None}, r"cond must name \['goal', 'size'\], got \[\]"),
        ({"cond": {"goal": torch.zeros(5, 2)}}, "cond must name"),
        (
            {"cond": {"goal": torch.zeros(5, 2), "sise": torch.zeros(5, 1)}},
            r"got \['goal', 'sise'\]",
        ),
        (
            {"cond": {"goal": torch.zeros(5, 3), "size": torch.zeros(5, 1)}},
            r"cond\['goal'\] must have shape \(5, 2\), got \(5, 3\)",
        ),
        ({"x": torch.zeros(5, 3)}, r"x must have shape \(B, 2\), got \(5, 3\)"),
        ({"t": torch.zeros(4)}, r"t must be a scalar or \(5,\), got shape \(4,\)"),
    ],
)
def test_bad_inputs(change, message):
    x, t, cond = inputs()
    arguments = {"x": x, "t": t, "cond": cond, **change}
    with pytest.raises(ValueError, match=message):
        conditional_network()(*arguments.values())


@pytest.mark.parametrize(
    "options",
    [{"dim": 0}, {"hidden": ()}, {"hidden": (8, 0)}, {"cond_dims": {"goal": 0}}],
)
def test_bad_sizes(options):
    with pytest.raises(ValueError, match="must be positive"):
        MLPVelocity(**{"dim": 2, **options})


@pytest.mark.slow
def test_learns_the_velocity_of_a_mixture():
    """A short regression on the exact velocity: the network resolves four modes over all times."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(2)
    centres = torch.tensor([[-2.0, -2.0], [-2.0, 2.0], [2.0, -2.0], [2.0, 2.0]])
    mixture = GaussianMixture.isotropic(centres, 0.5)
    network = MLPVelocity(2, hidden=(64, 64, 64))
    steps = 400
    optimiser = torch.optim.Adam(network.parameters(), lr=4e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    def batch(n):
        t = torch.rand(n, generator=g)
        x1 = mixture.sample(n, generator=g)
        x = t[:, None] * x1 + (1 - t[:, None]) * torch.randn(n, 2, generator=g)
        return x, t, mixture(x, t)

    for _ in range(steps):
        x, t, v = batch(512)
        optimiser.zero_grad()
        (network(x, t) - v).square().mean().backward()
        optimiser.step()
        decay.step()
    x, t, v = batch(4000)
    with torch.no_grad():
        error = (network(x, t) - v).norm() / v.norm()
    assert error < 0.06
