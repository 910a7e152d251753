"""The networks against independent ones of torch.nn, and against closed forms."""

import itertools
import math

import pytest
import torch
from torch import distributions, nn

from applications.rl.agents.layers import gelu, gelu_and_slope
from applications.rl.agents.networks import (
    LOG_STD_RANGE,
    Critics,
    DeterministicActor,
    FlowActor,
    OneStepActor,
    TanhGaussianActor,
    TimedCritics,
    ValueNetwork,
    tanh_gaussian_log_prob,
)
from flows.autodiff import velocity_and_vjp
from flows.sampling import sample

OBS, ACT, B = 5, 3, 7


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def shaken(module):
    """The module in float64, no parameter of which has a trivial value."""
    module.double()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.add_(0.1 * randn(*parameter.shape, seed=100 + i))
    return module


def reference(sizes, layer_norm):
    layers = []
    for m, n in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(m, n), nn.GELU(approximate="tanh")]
        layers += [nn.LayerNorm(n, eps=1e-6)] if layer_norm else []
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:])).double()


@pytest.mark.parametrize("layer_norm", [True, False])
def test_stacked_critics_are_independent_networks(layer_norm):
    critics = shaken(Critics(OBS, ACT, hidden=(8, 9), members=4, layer_norm=layer_norm))
    s, a = randn(B, OBS, seed=1), randn(B, ACT, seed=2)
    values = critics(s, a)
    assert values.shape == (4, B)
    for e in range(4):
        single = reference([OBS + ACT, 8, 9, 1], layer_norm)
        linear = [layer for layer in single if isinstance(layer, nn.Linear)]
        norms = [layer for layer in single if isinstance(layer, nn.LayerNorm)]
        with torch.no_grad():
            for i, layer in enumerate(linear):
                layer.weight.copy_(critics.weights[i][e].T)
                layer.bias.copy_(critics.biases[i][e, 0])
            for i, layer in enumerate(norms):
                layer.weight.copy_(critics.scales[i][e, 0])
                layer.bias.copy_(critics.shifts[i][e, 0])
        torch.testing.assert_close(values[e], single(torch.cat([s, a], 1))[:, 0])


def test_fixed_critics_pass_gradients_to_the_actions_only():
    critics = shaken(Critics(OBS, ACT, hidden=(8,), members=2))
    s, a = randn(B, OBS), randn(B, ACT).requires_grad_(True)
    critics(s, a, stop_weight_gradient=True).sum().backward()
    assert all(parameter.grad is None for parameter in critics.parameters())
    found, a.grad = a.grad, None
    critics(s, a).sum().backward()
    torch.testing.assert_close(found, a.grad)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_the_gradient_by_hand_is_that_of_autograd(layer_norm):
    critics = shaken(Critics(OBS, ACT, hidden=(8, 9), members=4, layer_norm=layer_norm))
    s, a = randn(B, OBS, seed=1), 2 * randn(B, ACT, seed=2)
    a.requires_grad_(True)
    (expected,) = torch.autograd.grad(critics(s, a).mean(0).sum(), a)
    torch.testing.assert_close(critics.action_gradient(s, a), expected, rtol=1e-12, atol=1e-13)
    assert not critics.action_gradient(s, a).requires_grad


def test_the_gradient_of_timed_critics_has_no_part_for_the_time():
    critics = shaken(TimedCritics(OBS, ACT, hidden=(8, 9), members=4))
    s, a, t = randn(B, OBS, seed=1), randn(B, ACT, seed=2).requires_grad_(True), randn(B, seed=3)
    for time in (t, torch.tensor(0.3), 1.0):
        (expected,) = torch.autograd.grad(critics(s, a, time).mean(0).sum(), a)
        found = critics.action_gradient(s, a, time)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def members():
    """Weights (in, out) and biases of one layer of each kind of network, by name."""
    wide = 200
    critics = Critics(100, 50, hidden=(wide,), members=6)
    for e in range(6):
        yield f"critic {e}", critics.weights[0][e], critics.biases[0][e]
    flow = FlowActor(100, 50, hidden=(wide,)).mlp
    editor = TanhGaussianActor(150, 50, hidden=(wide,))
    value = ValueNetwork(150, hidden=(wide,)).mlp
    one_step = OneStepActor(100, 50, hidden=(wide,)).mlp
    named = {
        "flow": flow.layers[0],
        "flow, last": flow.layers[1],
        "editor": editor.trunk.layers[0],
        "editor, mean": editor.mean.layers[0],
        "editor, log σ": editor.log_std.layers[0],
        "value": value.layers[0],
        "one step": one_step.layers[1],
    }
    for name, layer in named.items():
        yield name, layer.weight.T, layer.bias


def test_initial_weights_are_xavier_uniform_each_by_its_own_shape():
    torch.manual_seed(0)
    for name, weight, bias in members():
        m, n = weight.shape
        bound = math.sqrt(6 / (m + n))
        assert weight.abs().max() <= bound, name
        assert weight.abs().max() > 0.995 * bound, name
        # Uniform: variance bound²/3, its estimate has relative deviation √(0.8 / (m n)).
        ratio = weight.var().item() / (bound**2 / 3)
        assert abs(ratio - 1) < 4 * math.sqrt(0.8 / (m * n)), name
        assert not bias.any(), name


def test_members_start_different():
    critics = Critics(OBS, ACT, hidden=(8,), members=3)
    assert (critics.weights[0][0] != critics.weights[0][1]).all()


def test_gelu_is_the_tanh_approximation():
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)
    expected = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(gelu(x), expected)
    assert (gelu(x) - torch.nn.functional.gelu(x)).abs().max() > 1e-4


@pytest.mark.parametrize("layer_norm", [True, False])
def test_flow_actor_reads_observation_action_and_raw_time(layer_norm):
    actor = shaken(FlowActor(OBS, ACT, hidden=(8, 9), layer_norm=layer_norm))
    single = reference([OBS + ACT + 1, 8, 9, ACT], layer_norm)
    copy_parameters(actor.mlp, single)
    s, x, t = randn(B, OBS, seed=1), randn(B, ACT, seed=2), torch.rand(B, dtype=torch.float64)
    expected = single(torch.cat([s, x, t[:, None]], 1))
    torch.testing.assert_close(actor(x, t, {"observation": s}), expected)
    scalar = actor(x, t[3], {"observation": s})
    torch.testing.assert_close(scalar[3], expected[3])
    torch.testing.assert_close(
        actor(x, 0.25, {"observation": s})[0],
        actor(x[:1], torch.full((1,), 0.25, dtype=torch.float64), {"observation": s[:1]})[0],
    )


def copy_parameters(mlp, single):
    ours = []
    for i, layer in enumerate(mlp.layers):
        ours += [layer.weight, layer.bias]
        ours += [mlp.norms[i].weight, mlp.norms[i].bias] if i < len(mlp.norms) else []
    with torch.no_grad():
        for parameter, value in zip(single.parameters(), ours, strict=True):
            parameter.copy_(value)


def test_flow_actor_is_a_velocity_field_of_the_core():
    actor = shaken(FlowActor(OBS, ACT, hidden=(8,)))
    out = sample(actor, randn(B, ACT), grid=3, cond={"observation": randn(B, OBS)})
    assert out.shape == (B, ACT)


@pytest.mark.parametrize("cond", [None, {}, {"state": torch.zeros(B, OBS)}])
def test_flow_actor_refuses_other_conditions(cond):
    with pytest.raises(ValueError, match="cond must name exactly 'observation'"):
        FlowActor(OBS, ACT, hidden=(8,))(torch.zeros(B, ACT), torch.tensor(0.5), cond)


def test_one_step_actor_has_no_time():
    actor = shaken(OneStepActor(OBS, ACT, hidden=(8,)))
    single = reference([OBS + ACT, 8, ACT], False)
    copy_parameters(actor.mlp, single)
    s, z = randn(B, OBS, seed=1), randn(B, ACT, seed=2)
    torch.testing.assert_close(actor(s, z), single(torch.cat([s, z], 1)))


def test_value_network():
    network = shaken(ValueNetwork(OBS, hidden=(8, 9)))
    single = reference([OBS, 8, 9, 1], True)
    copy_parameters(network.mlp, single)
    s = randn(B, OBS)
    torch.testing.assert_close(network(s), single(s)[:, 0])


def test_deterministic_actor_is_bounded_and_starts_near_zero():
    torch.manual_seed(0)
    actor = DeterministicActor(40, 60, hidden=(80, 90)).double()
    first, last = actor.mlp.layers[0].weight.abs(), actor.mlp.layers[-1].weight.abs()
    assert 0.95 * math.sqrt(6 / 120) < first.max() <= math.sqrt(6 / 120)
    bound = math.sqrt(3 * 0.01 / ((90 + 60) / 2))  # variance scaling by the mean of both widths
    assert 0.95 * bound < last.max() <= bound + 1e-7
    s = randn(B, 40)
    torch.testing.assert_close(actor(s), torch.tanh(actor.mlp(s)))
    assert actor(1e6 * s).abs().max() == 1


def test_log_prob_is_that_of_torch_distributions():
    mean, log_std, eps = randn(B, ACT), 0.5 * randn(B, ACT, seed=1), randn(B, ACT, seed=2)
    u = mean + log_std.exp() * eps
    base = distributions.Independent(distributions.Normal(mean, log_std.exp()), 1)
    law = distributions.TransformedDistribution(base, [distributions.TanhTransform(cache_size=1)])
    actual = tanh_gaussian_log_prob(u, mean, log_std)
    torch.testing.assert_close(actual, law.log_prob(u.tanh()), rtol=1e-9, atol=1e-9)


def test_log_prob_is_finite_where_tanh_saturates():
    u = torch.tensor([[40.0], [-40.0]])
    log_prob = tanh_gaussian_log_prob(u, u, torch.zeros(2, 1))
    # log(1 - tanh² u) -> log 4 - 2|u|
    expected = -0.5 * math.log(2 * math.pi) - (math.log(4) - 80)
    torch.testing.assert_close(log_prob, torch.full((2,), expected))


def test_tanh_gaussian_sample_and_limits():
    actor = shaken(TanhGaussianActor(OBS, ACT, hidden=(8,)))
    x, eps = randn(B, OBS), randn(B, ACT, seed=1)
    features = gelu(actor.trunk.layers[0](x))  # the last hidden layer is activated too
    mean = actor.mean.layers[0](features)
    log_std = actor.log_std.layers[0](features).clamp(-20, 2)
    action, log_prob = actor.sample(x, eps)
    torch.testing.assert_close(action, torch.tanh(mean + log_std.exp() * eps))
    torch.testing.assert_close(
        log_prob, tanh_gaussian_log_prob(mean + log_std.exp() * eps, mean, log_std)
    )
    with torch.no_grad():
        actor.log_std.layers[0].bias.copy_(torch.tensor([-100.0, 100.0, 0.0]))
    _, limited = actor(x)
    assert (limited[:, 0] == LOG_STD_RANGE[0]).all()
    assert (limited[:, 1] == LOG_STD_RANGE[1]).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Critics(OBS, ACT, hidden=(8, 0), members=2),
        lambda: Critics(OBS, ACT, hidden=(8,), members=0),
        lambda: FlowActor(OBS, ACT, hidden=(-1,)),
        lambda: TanhGaussianActor(OBS, ACT, hidden=()),
        lambda: ValueNetwork(0, hidden=(8,)),
    ],
)
def test_sizes_that_are_not_positive_are_refused(make):
    with pytest.raises(ValueError, match="must be at least"):
        make()


def test_gelu_and_slope():
    x = torch.linspace(-8, 8, 101, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(gelu(x).sum(), x)
    torch.testing.assert_close(gelu_and_slope(x), (gelu(x), slope), rtol=1e-12, atol=1e-14)
    far = torch.tensor([-1e4, 1e4])
    assert torch.stack(gelu_and_slope(far)).tolist() == [[0.0, 1e4], [0.0, 1.0]]


@pytest.mark.parametrize("layer_norm", [True, False])
def test_linearised_flow_actors(layer_norm):
    actor = shaken(FlowActor(OBS, ACT, hidden=(8, 9), layer_norm=layer_norm))
    x, c, cond = randn(4, B, ACT), randn(4, B, ACT, seed=1), {"observation": randn(B, OBS, seed=2)}
    t = torch.linspace(0, 1, 4, dtype=torch.float64)
    v, pull = actor.linearised(x, t, cond)
    assert not v.requires_grad
    for k in range(4):
        product = pull(k, c[k])
        assert not product.requires_grad
        expected = velocity_and_vjp(actor, x[k], t[k], c[k], cond)
        torch.testing.assert_close((v[k], product), expected, rtol=1e-12, atol=1e-12)


def test_outputs_stay_in_full_precision_under_autocast():
    """Values near -200, where bfloat16 has a spacing of 1, and all outputs of a flow's field."""
    torch.manual_seed(0)
    critics = Critics(5, 3, hidden=(32, 32), members=2)
    torch.nn.init.constant_(critics.biases[-1], -200.3)
    actor = FlowActor(5, 3, hidden=(32, 32))
    s, a, t = torch.randn(64, 5), torch.randn(64, 3), torch.rand(64)
    exact, velocity = critics(s, a), actor(a, t, {"observation": s})
    with torch.autocast("cpu", torch.bfloat16):
        rounded, near = critics(s, a), actor(a, t, {"observation": s})
        along, _ = actor.linearised(a[None], t[:1], {"observation": s[None]})
    assert rounded.dtype == near.dtype == along.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.1
    assert 0 < (near - velocity).abs().max() < 0.1
