"""The flow-matching loss against its closed-form minimum, the couplings against brute force."""

import itertools
import math

import pytest
import torch

from flows.matching import flow_matching_loss, independent, optimal_transport
from flows.mixture import GaussianMixture

F64 = torch.float64


def gaussian(std, dim=2, mean=0.7):
    return GaussianMixture.isotropic(torch.full((1, dim), mean, dtype=F64), std)


def within(values, expected, sigmas=4.0):
    """Whether the mean of ``values`` agrees with ``expected``, and its standard error."""
    error = float(values.std() / math.sqrt(len(values)))
    return abs(float(values.mean()) - expected) < sigmas * error, error


@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_minimum_is_the_closed_form(std):
    """For N(m, s²I) mmse(t)/(1 - t)² = s²/(t²s² + (1 - t)²), with mean sπ/2 over t."""
    field = gaussian(std)
    g = torch.Generator().manual_seed(0)
    losses = torch.stack(
        [
            flow_matching_loss(field, field.sample(2000, generator=g), generator=g)[0]
            for _ in range(100)
        ]
    )
    agrees, error = within(losses, std * math.pi / 2)
    assert agrees
    assert error < 0.01 * std


@pytest.mark.parametrize("t", [0.0, 0.4, 0.9])
def test_minimum_at_a_given_time(t):
    std = 0.6
    field = gaussian(std)
    g = torch.Generator().manual_seed(0)
    time = torch.tensor(t, dtype=F64)
    losses = torch.stack(
        [
            flow_matching_loss(field, field.sample(2000, generator=g), t=time, generator=g)[0]
            for _ in range(50)
        ]
    )
    assert within(losses, std**2 / (t**2 * std**2 + (1 - t) ** 2))[0]


def test_another_field_loses_exactly_its_distance():
    """E‖v + c - (X1 - X0)‖² = minimum + c²: the exact velocity is the minimiser."""
    field, shift = gaussian(0.8), 0.5
    x1 = field.sample(200_000, generator=torch.Generator().manual_seed(0))
    losses = [
        flow_matching_loss(
            lambda x, t, cond, c=c: field(x, t) + c, x1, generator=torch.Generator().manual_seed(1)
        )[0]
        for c in (0.0, shift)
    ]
    # The cross term 2c(v - target) has standard error 2c sqrt(minimum / (2 · 200000)).
    error = 2 * shift * math.sqrt(0.8 * math.pi / 2 / 400_000)
    assert abs(float(losses[1] - losses[0]) - shift**2) < 4 * error


def test_value_by_hand():
    """A field of x, t and the condition, all ends given, shaped data, weights as they are."""
    g = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(4, 3, 2, generator=g, dtype=F64) for _ in range(2))
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=F64)
    cond = {"gain": torch.randn(4, generator=g, dtype=F64)}
    weights = torch.tensor([1.0, 0.0, 3.0, 0.5], dtype=F64)

    def field(x, t, cond):
        return cond["gain"][:, None, None] * x + t[:, None, None]

    loss, metrics = flow_matching_loss(field, x1, x0=x0, t=t, cond=cond, weights=weights)
    total = squares = 0.0
    for i in range(4):
        v = cond["gain"][i] * (t[i] * x1[i] + (1 - t[i]) * x0[i]) + t[i]
        error = v - (x1[i] - x0[i])
        squares += (v**2).sum()
        total += weights[i] * (error**2).sum() / 6 / 4
    torch.testing.assert_close(loss, total, rtol=1e-14, atol=0)
    assert float(metrics["loss"]) == float(loss)
    torch.testing.assert_close(metrics["velocity_rms"], (squares / 24) ** 0.5)
    assert set(metrics) == {"loss", "velocity_rms"}


def test_generator_decides_and_parameters_get_gradients():
    network = torch.nn.Linear(2, 2)

    def field(x, t, cond):
        return network(x)

    x1 = torch.randn(8, 2)
    runs = [
        flow_matching_loss(field, x1, generator=torch.Generator().manual_seed(seed))[0]
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]
    runs[0].backward()
    assert network.weight.grad.abs().max() > 0


@pytest.mark.parametrize("seed", range(5))
def test_optimal_transport_is_the_best_permutation(seed):
    g = torch.Generator().manual_seed(seed)
    x0, x1 = torch.randn(6, 3, generator=g), torch.randn(6, 3, generator=g) + 1
    paired0, paired1, permutation = optimal_transport(x0, x1)
    best = min(
        float((x1[list(order)] - x0).double().square().sum())
        for order in itertools.permutations(range(6))
    )
    assert float((paired1 - paired0).double().square().sum()) == pytest.approx(best, rel=1e-6)
    assert torch.equal(paired0, x0)
    assert torch.equal(paired1, x1[permutation])
    assert sorted(permutation.tolist()) == list(range(6))


def test_optimal_transport_on_a_line_sorts():
    g = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(200, 1, generator=g), torch.rand(200, 1, generator=g)
    _, paired, _ = optimal_transport(x0, x1)
    assert torch.equal(paired[x0[:, 0].argsort()], x1.sort(0).values)


def test_independent_keeps_the_pairs():
    x0, x1 = torch.randn(5, 2, 2), torch.randn(5, 2, 2)
    a, b, permutation = independent(x0, x1)
    assert torch.equal(a, x0)
    assert torch.equal(b, x1)
    assert permutation.tolist() == list(range(5))


@pytest.mark.parametrize("coupling", [independent, optimal_transport])
def test_couplings_reject(coupling):
    with pytest.raises(ValueError, match=r"same shape, got \(3, 2\) and \(4, 2\)"):
        coupling(torch.zeros(3, 2), torch.zeros(4, 2))


def test_optimal_transport_rejects_nan():
    with pytest.raises(ValueError, match="must be finite"):
        optimal_transport(torch.zeros(2, 2), torch.full((2, 2), math.nan))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.zeros(4, 3)}, r"x0 must have the shape of x1, \(4, 2\), got \(4, 3\)"),
        ({"t": torch.zeros(3)}, r"t must be a scalar or \(4,\), got shape \(3,\)"),
        ({"weights": torch.ones(4, 1)}, r"weights must have shape \(4,\), got \(4, 1\)"),
        ({"field": lambda x, t, cond: x[:, :1]}, r"returned shape \(4, 1\)"),
    ],
)
def test_loss_rejects(change, message):
    arguments = {"field": lambda x, t, cond: x, "x1": torch.zeros(4, 2), **change}
    with pytest.raises(ValueError, match=message):
        flow_matching_loss(**arguments)
