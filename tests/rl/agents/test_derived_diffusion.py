"""Losses and gradients of RQL against the formulas, written out again in float64."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.agent_problems import HORIZON, B, batch, make, noise
from helpers.formulas import D, check_formula, critics, euler, flow, lower

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


REFERENCES = {"rql": rql}


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
