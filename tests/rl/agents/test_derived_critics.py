"""Losses and gradients of FAWAC and FBRAC against the formulas, written out again in float64."""

import math

import pytest
import torch
from helpers.agent_problems import B, batch, make, noise
from helpers.formulas import (
    D,
    check_formula,
    critic_term,
    critics,
    euler,
    flow,
    gradients,
    perceptron,
    policy_value,
)


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


REFERENCES = {"fawac": fawac, "fbrac": fbrac}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in REFERENCES), ("fawac", {"inverse_temperature": 30.0})],
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
