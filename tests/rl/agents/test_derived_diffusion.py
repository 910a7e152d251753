"""Losses and gradients of RQL, QSM and DAC against the formulas, written out again in float64."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.agent_problems import HORIZON, B, batch, make, noise
from helpers.formulas import (
    D,
    check_formula,
    critic_term,
    critics,
    dense,
    euler,
    flow,
    lower,
    policy_value,
)

from applications.rl.agents.diffusion import ddpm_action, denoising_loss, noised
from applications.rl.agents.rql import reverse_flow, reverse_lengths
from flows import frozen


def timed(net, s, x, t, *, constant=False):
    """Values (E, B) of actions at times (B,): the time is one more input of the critics."""
    return critics(net.critics, s, torch.cat([x, t[:, None]], 1), constant=constant)


def rql(agent, data, eps):
    config, K, s = agent.config, 4, data.observations
    A = data.actions.reshape(B, D)
    d = eps["reverse_length"][:, 0].clone()
    for row in range(B // 2, B):
        d[row] = math.floor(float(d[row]) * (K + 1)) / K
    x = []
    for row in range(B):  # each by itself
        state, time = A[row : row + 1], 1.0
        for _ in range(K):
            state = state - flow(agent.policy, s[row : row + 1], state, time) * d[row] / K
            time -= float(d[row]) / K
        x.append(state.detach())
    zero = torch.zeros(B, dtype=s.dtype)
    following = timed(agent.target_critic, data.next_observations, eps["next_action_noise"], zero)
    y = data.rewards + config.discount**HORIZON * data.masks * lower(following, config.rho)
    delta = y.detach() - timed(agent.critic, s, torch.cat(x), 1 - d)
    weight = (config.expectile - (delta < 0).double()).abs()
    critic = (data.valid * weight * delta**2).mean()

    t, x0 = eps["bc_t"], eps["bc_x0"]
    x_t = (1 - t) * x0 + t * A
    v = flow(agent.policy, s, x_t, t)
    imitation = (data.valid * ((v - (A - x0)) ** 2).mean(1)).mean()
    step = torch.minimum(torch.full_like(t, 1 / K), 1 - t)
    q = timed(agent.critic, s, x_t + v * step, (t + step)[:, 0], constant=True)
    return critic + config.alpha * imitation - q.mean()


def mish(x):
    return x * torch.tanh(torch.log1p(x.exp()))


def predicted_noise(net, x, t, s):
    angle = 2 * math.pi * t[:, None] * net.frequencies
    time = torch.cat([torch.cos(angle), torch.sin(angle)], 1)
    for i, layer in enumerate(net.time.layers):
        time = dense(layer, time if i == 0 else mish(time))
    y = torch.cat([x, s, time], 1)
    for i, layer in enumerate(net.mlp.layers):
        y = dense(layer, y if i == 0 else mish(y))
    return y


def signals(T):
    """α_t and their products, by the recursion over β_t."""
    alphas, products = [1.0], [1.0]
    for t in range(1, T + 1):
        beta = 1 - math.exp(-0.1 / T - 0.5 * 9.9 * (2 * t - 1) / T**2)
        alphas.append(1 - beta)
        products.append(products[-1] * (1 - beta))
    return alphas, products


def sampled(net, s, x, z, T, posterior):
    alphas, products = signals(T)
    for i, t in enumerate(range(T, 0, -1)):
        e = predicted_noise(net, x, torch.full((B,), float(t), dtype=x.dtype), s)
        clean = (x - math.sqrt(1 - products[t]) * e) / math.sqrt(products[t])
        if posterior:  # the mean of the product of two normal densities of x_{t-1}
            a, b = math.sqrt(products[t - 1]), math.sqrt(alphas[t])
            precision = b**2 / (1 - alphas[t])
            mean = b * x / (1 - alphas[t])
            if t > 1:
                precision += 1 / (1 - products[t - 1])
                mean = mean + a * clean.clamp(-1, 1) / (1 - products[t - 1])
                clean = mean / precision
            else:  # the second density is a point
                clean = clean.clamp(-1, 1)
        x = clean if t == 1 else clean + math.sqrt(1 - alphas[t]) * z[:, i]
        x = x if posterior else x.clamp(-1, 1)
    return x.detach()


def diffusion(agent, data, eps, guidance, posterior):
    T, s = 4, data.observations
    z, start = eps["next_ddpm_z"], eps["next_action_noise"][:, 0]
    a = sampled(agent.policy, data.next_observations, start, z, T, posterior)
    critic = critic_term(agent, data, policy_value(agent, data, a))
    A, total = data.actions.reshape(B, D), 0.0
    for row in range(B):  # each by itself
        t = 1 + math.floor(float(eps["denoise_t"][row, 0]) * T)
        product, one = signals(T)[1][t], slice(row, row + 1)
        noise_of_row = eps["denoise_eps"][one]
        x = math.sqrt(product) * A[one] + math.sqrt(1 - product) * noise_of_row
        x.requires_grad_(True)
        q = critics(agent.target_critic, s[one], x).mean()
        gradient = torch.autograd.grad(q, x)[0]
        e = predicted_noise(agent.policy, x.detach(), torch.tensor([float(t)]).double(), s[one])
        own = agent.config.alpha * ((noise_of_row - e) ** 2).mean()
        own = own + guidance(gradient, e, product)
        # A window of weight 0 has the constant 1 for each of the two errors.
        total = total + (own if data.valid[row] else own.new_tensor(agent.config.alpha + 1))
    return critic + total / B


def qsm(agent, data, eps):
    tau = agent.config.inverse_temperature
    return diffusion(agent, data, eps, lambda g, e, _: ((-tau * g - e) ** 2).mean(), False)


def dac(agent, data, eps):
    def guidance(gradient, e, product):
        return (math.sqrt(1 - product) * gradient * e).mean()

    return diffusion(agent, data, eps, guidance, True)


REFERENCES = {"rql": rql, "qsm": qsm, "dac": dac}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", REFERENCES)
def test_loss_and_gradient_are_those_of_the_formulas(name, seed):
    check_formula(name, REFERENCES[name], seed)


def test_lengths_are_free_for_one_half_and_on_the_grid_for_the_other():
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = reverse_lengths(uniform, 4)
    assert torch.equal(lengths[:10_000], uniform[:10_000])
    values, counts = (4 * lengths[10_000:]).unique(return_counts=True)
    assert values.tolist() == [0, 1, 2, 3, 4]
    assert (counts / 2000 - 1).abs().max() < 0.15
    nearly_one = torch.full((2,), 1 - 2**-24, dtype=torch.float32)
    for steps in range(1, 50):
        assert reverse_lengths(nearly_one, steps).max() == 1


@pytest.mark.slow
def test_the_reverse_flow_leads_back_to_the_action():
    """Forward from its end by many Euler steps, on the same flow."""
    agent, data = make("rql", shake=0.3), batch()
    s, actions = data.observations, agent.flatten(data.actions)
    lengths = torch.linspace(0, 1, B, dtype=torch.float64)
    steps = 4000
    with torch.no_grad():
        x = reverse_flow(agent.policy, s, actions, lengths, steps)
        assert torch.equal(x[0], actions[0])  # of length 0
        assert (x[1:] - actions[1:]).abs().max() > 0.1
        for k in range(steps):
            t = 1 - lengths + k * lengths / steps
            x = x + (lengths / steps)[:, None] * agent.policy(x, t, {"observation": s})
    torch.testing.assert_close(x, actions, rtol=0, atol=1e-3)


def test_critics_take_a_number_or_times_and_one_by_default():
    agent, data = make("rql"), batch()
    s, actions = data.observations, agent.flatten(data.actions)
    for t in (0.3, 1.0):
        times = torch.full((B,), t, dtype=torch.float64)
        expected = timed(agent.critic, s, actions, times)
        for given in (t, times, torch.tensor(t)):
            torch.testing.assert_close(agent.critic(s, actions, given), expected, atol=1e-7, rtol=0)
    assert torch.equal(agent.critic(s, actions), agent.critic(s, actions, 1.0))


def test_it_explores_by_the_policy_and_is_evaluated_by_the_target_policy():
    agent, s = make("rql", shake=0.5), batch().observations
    draw = agent.act_noise(B, torch.Generator().manual_seed(0))
    for mode, network in ((True, agent.policy), (False, agent.target_policy)):
        expected = euler(network, s, draw["noise"][:, 0], 4)
        acted = agent.train(mode).act(s, draw).flatten(1)
        torch.testing.assert_close(acted, expected)
    eps = noise(agent)
    losses = [agent.train(mode).loss(batch(), eps)[0] for mode in (True, False)]
    assert torch.equal(*losses)


def test_the_target_policy_has_a_rate_of_its_own():
    agent = make("rql", target_rate=0.2, target_policy_rate=0.4)
    for rate, name in ((0.2, "critic"), (0.4, "policy")):
        network, target = getattr(agent, name), getattr(agent, f"target_{name}")
        before = frozen(target)
        agent.update_targets()
        for p, q, r in zip(
            network.parameters(), target.parameters(), before.parameters(), strict=True
        ):
            torch.testing.assert_close(q, rate * p + (1 - rate) * r)


def test_critics_are_not_told_the_action_of_the_next_observation():
    """A target takes noise for the action, so the policy does not enter the critics' loss at s'."""
    agent, data = make("rql"), batch()
    eps = noise(agent)
    eps["reverse_length"] = torch.zeros_like(eps["reverse_length"])  # x_f is the action
    before = agent.losses(data, eps)["critic"][0]
    with torch.no_grad():
        for p in agent.policy.parameters():
            p.add_(1.0)
    assert torch.equal(before, agent.losses(data, eps)["critic"][0])
    agent.config = replace(agent.config, rho=0.0)
    assert not torch.equal(before, agent.losses(data, eps)["critic"][0])


# ----- diffusions --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "posterior"), [("qsm", False), ("dac", True)])
def test_a_diffusion_acts_by_its_sampler(name, posterior):
    agent, s = make(name, shake=0.5), batch().observations
    draw = agent.act_noise(B, torch.Generator().manual_seed(0))
    expected = sampled(agent.policy, s, draw["noise"][:, 0], draw["ddpm_z"], 4, posterior)
    torch.testing.assert_close(agent.act(s, draw).flatten(1), expected)


def test_steps_of_the_noise_are_all_as_likely():
    uniform = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(20_000, 1)
    _, t, deviation = noised(zeros, {"denoise_t": uniform, "denoise_eps": zeros}, 4)
    values, counts = t.unique(return_counts=True)
    assert values.tolist() == [1, 2, 3, 4]
    assert (counts / 5000 - 1).abs().max() < 0.05
    assert deviation.min() > 0
    last = {"denoise_t": torch.full((1, 1), 1 - 2**-24), "denoise_eps": torch.zeros(1, 1)}
    for steps in range(2, 50):
        assert noised(torch.zeros(1, 1), last, steps)[1] == steps


def test_a_perfect_prediction_leads_to_the_action_by_both_samplers():
    """Of a single action the noise in x_t is known, and each sampler ends in the action."""
    T, goal = 6, torch.tensor([[0.3, -0.8]], dtype=torch.float64)

    def perfect(x, t, observations):
        product = signals(T)[1][int(t[0])]
        return (x - math.sqrt(product) * goal) / math.sqrt(1 - product)

    g = torch.Generator().manual_seed(0)
    draw = {
        "noise": torch.randn(5, 1, 2, generator=g, dtype=torch.float64),
        "ddpm_z": torch.randn(5, T - 1, 2, generator=g, dtype=torch.float64),
    }
    for posterior in (False, True):
        found = ddpm_action(perfect, None, draw, T, posterior=posterior)
        torch.testing.assert_close(found, goal.expand(5, 2))


def test_a_window_of_weight_0_is_a_constant():
    predicted = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    eps, valid = torch.zeros(3, 2, dtype=torch.float64), torch.tensor([1.0, 0, 1]).double()
    loss, metrics = denoising_loss(predicted, eps, -predicted.square().sum(1), valid, 5.0)
    loss.backward()
    assert not predicted.grad[1].any()
    assert predicted.grad[[0, 2]].all()
    expected = (predicted.square().mean(1)[[0, 2]].sum() + 1) / 3
    torch.testing.assert_close(metrics["actor/denoising_loss"], expected)


def test_the_minimum_of_dac_is_guidance_at_the_temperature_it_says():
    """One dimension, noise and critics' gradient known: the prediction at the loss's minimum."""
    alpha, deviation, gradient = 0.7, 0.6, 1.3
    eps = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    predicted = (eps.mean() - deviation * gradient / (2 * alpha)).requires_grad_(True)
    rows = predicted.expand(1000, 1)
    guidance = (deviation * gradient * rows).mean(1)
    denoising_loss(rows, eps, guidance, torch.ones(1000).double(), alpha)[0].backward()
    assert predicted.grad.abs() < 1e-12


def test_the_minimum_of_qsm_is_a_mean_of_noise_and_gradient():
    alpha, step = 3.0, torch.tensor(0.4, dtype=torch.float64)  # τ times the gradient
    eps = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    predicted = ((alpha * eps.mean() - step) / (alpha + 1)).requires_grad_(True)
    rows = predicted.expand(1000, 1)
    guidance = (-step - rows).square().mean(1)
    denoising_loss(rows, eps, guidance, torch.ones(1000).double(), alpha)[0].backward()
    assert predicted.grad.abs() < 1e-12


def test_layer_norm_is_of_the_prediction():
    agent = make("qsm", actor_layer_norm=True)
    assert len(agent.policy.mlp.norms) == 2
    assert not len(agent.policy.time.norms)
