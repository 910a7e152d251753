"""Losses and gradients of FAWAC, FBRAC and CGQL against the formulas, written out in float64."""

import math
from functools import partial

import pytest
import torch
from helpers.agent_problems import HORIZON, B, batch, make, noise
from helpers.formulas import (
    D,
    behaviour_term,
    check_formula,
    critic_term,
    critics,
    euler,
    flow,
    gradients,
    lower,
    perceptron,
    policy_value,
)

from applications.rl.agents.cgql_linex import noisy_linex_loss
from applications.rl.agents.cgql_mse import noisy_mse_loss
from applications.rl.agents.guidance import NoisyValues, noisy_values


def fawac(agent, data, eps):
    s, A, w = data.observations, data.actions.reshape(B, D), data.valid
    a = euler(agent.policy, data.next_observations, eps["next_action_noise"], 4)
    critic = critic_term(agent, data, policy_value(agent, data, a))
    v = perceptron(agent.value.mlp, s)[:, 0]
    value = torch.stack([w * (q.detach() - v) ** 2 for q in critics(agent.target_critic, s, A)])
    advantages = (critics(agent.critic, s, A).mean(0) - v).detach()
    weights = [min(math.exp(agent.config.inverse_temperature * float(x)), 100) for x in advantages]
    t, x0 = eps["bc_t"], eps["bc_x0"]
    error = ((flow(agent.policy, s, (1 - t) * x0 + t * A, t) - (A - x0)) ** 2).sum(1) / D
    imitation = sum(w[i] * weights[i] * error[i] for i in range(B)) / B
    return critic + value.mean() + imitation


def fbrac(agent, data, eps):
    s, A = data.observations, data.actions.reshape(B, D)
    a = euler(agent.policy, data.next_observations, eps["next_action_noise"][:, 0], 4)
    critic = critic_term(agent, data, policy_value(agent, data, a))
    t, x0 = eps["bc_t"], eps["bc_x0"]
    error = flow(agent.policy, s, (1 - t) * x0 + t * A, t) - (A - x0)
    imitation = (data.valid * (error**2).mean(1)).mean()
    x = eps["bptt_noise"]
    for k in range(4):  # with gradient
        x = x + flow(agent.policy, s, x, k / 4) / 4
    inside = torch.where(x > 1, 1.0, torch.where(x < -1, -1.0, x))
    q = critics(agent.critic, s, inside, constant=True)
    return critic + imitation - q.mean() / agent.config.alpha


def timed(net, s, x, t, *, constant=False):
    """Values (E, B) of actions at a time: it is one more input of the critics."""
    time = torch.full((len(x), 1), t, dtype=x.dtype) if isinstance(t, float) else t
    return critics(net.critics, s, torch.cat([x, time], 1), constant=constant)


def guided(agent, s, x, noisy):
    """Euler steps of the guided flow, the first of them unguided."""
    theta, tau = agent.config.guidance, agent.config.inverse_temperature
    for k in range(4):
        t, v = k / 4, flow(agent.target_behaviour, s, x, k / 4)
        if k > 0:
            y = x.detach().requires_grad_(True)
            q = timed(agent.critic, s, y, t if noisy else 1.0).mean(0).sum()
            (slope,) = torch.autograd.grad(q, y)
            v = v + theta * (x + (1 - t) * tau * slope) / t
        x = (x + v / 4).detach()
    return x.clamp(-1, 1)


def cgql(agent, data, eps, error=None):
    s, A, following = data.observations, data.actions.reshape(B, D), data.next_observations
    a = guided(agent, following, eps["next_action_noise"][:, 0], error is not None)
    value = lower(timed(agent.target_critic, following, a, 1.0), agent.config.rho)
    y = data.rewards + agent.config.discount**HORIZON * data.masks * value.detach()
    critic = (data.valid * (timed(agent.critic, s, A, 1.0) - y) ** 2).mean()
    total = critic + behaviour_term(agent, data, eps)
    if error is None:
        return total
    t = eps["noisy_t"]
    q = timed(agent.critic, s, (1 - t) * eps["noisy_eps"] + t * A, t)
    target = timed(agent.target_critic, s, A, 1.0).detach()
    losses = [
        data.valid[b] * error(q[e, b], target[e, b], agent.config.inverse_temperature)
        for e in range(len(q))
        for b in range(B)
    ]
    return total + agent.config.noisy_weight * torch.stack(losses).mean()


def squared(q, target, tau):
    return (q - target) ** 2


def linex(q, target, tau):
    delta = tau * (target - q)
    return torch.exp(delta) + tau * q if delta <= 5 else delta


REFERENCES = {
    "fawac": fawac,
    "fbrac": fbrac,
    "cgql": cgql,
    "cgql-mse": partial(cgql, error=squared),
    "cgql-linex": partial(cgql, error=linex),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in REFERENCES),
        ("fawac", {"inverse_temperature": 30.0}),
        ("cgql-linex", {"inverse_temperature": 20.0}),
    ],
)
def test_loss_and_gradient_are_those_of_the_formulas(name, options, seed):
    check_formula(name, REFERENCES[name], seed, **options)


def test_weights_of_fawac_are_bounded_and_have_no_gradient():
    agent, data = make("fawac", inverse_temperature=1e4), batch()
    terms = agent.losses(data, noise(agent))
    weight = terms["policy"][1]["actor/weight"]
    assert 0 < weight <= 100
    assert float(weight) * B / 100 == pytest.approx(round(float(weight) * B / 100))  # 0 or 100
    reached = gradients(terms["policy"][0], agent)
    assert {name.split(".")[0] for name, g in reached.items() if g is not None} == {"policy"}


def test_components_outside_of_the_box_have_no_gradient_in_fbrac():
    agent, data = make("fbrac"), batch()
    z = 3 * noise(agent)["bptt_noise"]
    own = agent.propose(data.observations, {"noise": z.requires_grad_(True)})
    outside = own.abs() == 1
    assert outside.any()
    assert (~outside).any()
    assert not torch.autograd.grad(own[outside].sum(), z, retain_graph=True)[0].any()
    assert torch.autograd.grad(own[~outside].sum(), z)[0].any()


def test_the_linear_exponential_error_has_both_branches_in_the_comparison():
    agent, data = make("cgql-linex", inverse_temperature=20.0), batch()
    s, actions = data.observations, agent.flatten(data.actions)
    noisy = noisy_values(agent.critic, agent.target_critic, s, actions, noise(agent))
    delta = 20.0 * (noisy.targets - noisy.values)[:, data.valid == 1]
    assert (delta > 5).any()
    assert (delta <= 5).any()


def test_the_error_of_large_exponents_is_finite_with_its_gradient():
    values = torch.tensor([[-1e6, 0.0]], requires_grad=True)
    noisy = NoisyValues(values, torch.zeros(1, 2))
    loss, _ = noisy_linex_loss(noisy, torch.ones(2), 10.0, 0.5)
    (gradient,) = torch.autograd.grad(loss, values)
    assert loss.item() == pytest.approx(0.5 * (1e7 + 1) / 2)
    torch.testing.assert_close(gradient, torch.tensor([[-2.5, 0.0]]))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (lambda noisy: noisy_mse_loss(noisy, torch.ones(2), 1.0)[0], 0.5),
        (
            lambda noisy: noisy_linex_loss(noisy, torch.ones(2), 2.0, 1.0)[0],
            math.log((1 + math.exp(2)) / 2) / 2,
        ),
    ],
    ids=["mean", "exponential mean"],
)
def test_critics_at_noisy_actions_learn_a_mean_of_the_values(error, expected):
    """Of two actions with values 0 and 1 that one noisy action may have been made from."""
    targets = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    value = torch.tensor(expected, dtype=torch.float64, requires_grad=True)
    error(NoisyValues(value.expand(1, 2), targets)).backward()
    assert abs(float(value.grad)) < 1e-12


def test_without_guidance_cgql_acts_by_its_target_behaviour():
    agent, s = make("cgql", guidance=0.0, shake=0.5), batch().observations
    draw = agent.act_noise(B, torch.Generator().manual_seed(0))
    expected = euler(agent.target_behaviour, s, draw["noise"][:, 0], 4)
    torch.testing.assert_close(agent.act(s, draw).flatten(1), expected)


def test_the_critics_gradient_leads_to_larger_values():
    """Compared with nearly no τ, where the term in x is all that is left of the guidance."""
    s = batch().observations
    agents = [make("cgql", inverse_temperature=tau, guidance=0.01) for tau in (1e-9, 2.0)]
    draw = agents[0].act_noise(B, torch.Generator().manual_seed(0))
    draw["noise"] *= 0.1  # stays in the box
    plain, led = (agent.critic(s, agent.act(s, draw).flatten(1)).mean(0) for agent in agents)
    assert led.mean() > plain.mean()
