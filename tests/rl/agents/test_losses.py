"""Every loss and its gradient against the formulas, written out again here in float64.

The references are those of `helpers.formulas`, which share no code with the agents.  Agents that
are not here have a file of their own, test_derived_*.py, with a dictionary of the same name.
"""

import copy
import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.agent_problems import HORIZON, OPTIONS, batch, make, noise
from helpers.formulas import (
    D,
    behaviour_term,
    check_formula,
    critic_term,
    critics,
    editor,
    euler,
    flow,
    gradients,
    lower,
    one_step,
    perceptron,
    policy_value,
)

from applications.rl.agents.losses import chain_adjoint, td_target

# ----- the terms ---------------------------------------------------------------------------------


def one_step_term(agent, s, z, alpha):
    g = one_step(agent.one_step, s, z)
    target = euler(agent.policy if hasattr(agent, "policy") else agent.behaviour, s, z, 4)
    q = critics(agent.critic, s, g.clamp(-1, 1), constant=True)
    return alpha * ((g - target) ** 2).mean() - q.mean()


def matching_term(agent, data, eps):
    """The published pair, from its formulas (MATH of the kernel's docstring)."""
    K, s, x = 4, data.observations, eps["sde_x0"]
    h, tau = 1 / K, agent.config.inverse_temperature
    xs = [x]
    for k in range(K - 1):
        t = k * h
        sigma = math.sqrt(2 * (1 - t + h) / (t + h))
        drift = 2 * flow(agent.policy, s, x, t) - x / (t + h)
        x = (x + h * drift + math.sqrt(h) * sigma * eps["sde_eps"][k]).detach()
        xs.append(x)
    x = (x + h * flow(agent.target_behaviour, s, x, 1 - h)).detach()
    end = x.requires_grad_(True)
    q = critics(agent.target_critic, s, end.clamp(-1, 1)).mean(0).sum()
    a = -tau * torch.autograd.grad(q, end)[0]
    total = 0.0
    for k in reversed(range(K)):
        t = k * h
        sigma = math.sqrt(2 * (1 - t + h) / (t + h))
        x = xs[k].clone().requires_grad_(True)
        drift = 2 * flow(agent.target_behaviour, s, x, t + h) - x / (t + h)
        a = a + h * torch.autograd.grad((drift * a).sum(), x)[0]
        difference = (
            flow(agent.policy, s, xs[k], t) - flow(agent.target_behaviour, s, xs[k], t).detach()
        )
        total = total + ((2 / sigma * difference + sigma * a) ** 2).sum(1)
    return total.mean()


# ----- the agents --------------------------------------------------------------------------------


def bc(agent, data, eps):
    return behaviour_term(agent, data, eps)


def qam(agent, data, eps):
    a = euler(agent.policy, data.next_observations, eps["next_action_noise"][:, 0], 4)
    critic = critic_term(agent, data, policy_value(agent, data, a))
    return critic + behaviour_term(agent, data, eps) + matching_term(agent, data, eps)


def qam_f(agent, data, eps):
    g = one_step(agent.one_step, data.next_observations, eps["next_action_noise"][:, 0])
    critic = critic_term(agent, data, policy_value(agent, data, g.clamp(-1, 1)))
    tilt = behaviour_term(agent, data, eps) + matching_term(agent, data, eps)
    s, z = data.observations, eps["extra_base_noise"]
    return critic + tilt + one_step_term(agent, s, z, agent.config.alpha)


def qam_e(agent, data, eps):
    scale, s = agent.config.edit_scale, data.observations

    u = euler(agent.policy, data.next_observations, eps["next_action_noise"][:, 0], 4)
    e, _ = editor(agent.editor, data.next_observations, u, eps["next_edit_eps"][:, 0])
    value = policy_value(agent, data, (u + scale * e).clamp(-1, 1))
    tilt = behaviour_term(agent, data, eps) + matching_term(agent, data, eps)

    u = euler(agent.policy, s, eps["extra_base_noise"], 4)
    e, log_p = editor(agent.editor, s, u, eps["edit_eps"])
    q = critics(agent.critic, s, (u + scale * e).clamp(-1, 1), constant=True)
    alpha = agent.log_alpha.exp()
    edit = -q.mean() + alpha.detach() * log_p.mean()
    temperature = alpha * (-log_p.mean().detach() + 0.5 * D)
    return critic_term(agent, data, value) + tilt + edit + temperature


def fql(agent, data, eps):
    g = one_step(agent.one_step, data.next_observations, eps["next_action_noise"][:, 0])
    critic = critic_term(agent, data, policy_value(agent, data, g.clamp(-1, 1)))
    own = one_step_term(agent, data.observations, eps["distill_noise"], agent.config.alpha)
    return critic + behaviour_term(agent, data, eps) + own


def ifql(agent, data, eps):
    kappa, s = agent.config.expectile, data.observations
    A = data.actions.reshape(len(data.actions), D)
    critic = critic_term(agent, data, perceptron(agent.value.mlp, data.next_observations)[:, 0])
    q = lower(critics(agent.target_critic, s, A), agent.config.rho)
    d = q.detach() - perceptron(agent.value.mlp, s)[:, 0]
    value = torch.stack([kappa * x**2 if x >= 0 else (1 - kappa) * x**2 for x in d]).mean()
    return critic + value + behaviour_term(agent, data, eps)


def bam(agent, data, eps):
    policy, acting, reference = agent.policy, agent.policy, agent.target_behaviour
    if reference is None:  # the behaviour itself, its weights held constant
        reference = copy.deepcopy(agent.behaviour).requires_grad_(False)
    if agent.config.residual:
        policy, acting = (agent.policy, reference), (agent.policy, agent.behaviour)
    a = euler(acting, data.next_observations, eps["next_action_noise"][:, 0], 4)
    critic = critic_term(agent, data, policy_value(agent, data, a))
    K, s, x = 4, data.observations, eps["sde_x0"]
    h, penalty = 1 / K, 0.0
    for k in range(K - 1):
        t = k * h
        variance = 2 * (1 - t + h) / (t + h)
        v, base = flow(policy, s, x, t), flow(reference, s, x, t)
        penalty = penalty + 2 * ((v - base) ** 2).sum(1) / variance
        noise = math.sqrt(h * variance) * eps["sde_eps"][k]
        x = x + h * (2 * v - x / (t + h)) + noise
    x = x + h * flow(reference, s, x, 1 - h)
    q = lower(critics(agent.critic, s, x, constant=True), agent.config.rho)
    own = penalty.mean() - agent.config.inverse_temperature * q.mean()
    return critic + behaviour_term(agent, data, eps) + own


REFERENCES = {
    "bc": bc,
    "qam": qam,
    "qam-e": qam_e,
    "qam-f": qam_f,
    "fql": fql,
    "ifql": ifql,
    "bam": bam,
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in REFERENCES),
        ("bam", {"residual": True}),
        ("bam", {"target_behaviour": False}),
        ("bam", {"target_behaviour": False, "residual": True}),
    ],
)
def test_loss_and_gradient_are_those_of_the_formulas(name, options, seed):
    check_formula(name, REFERENCES[name], seed, **options)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "bc"])
def test_losses_of_actors_leave_critics_alone_and_the_reverse(name):
    agent, data = make(name), batch()
    eps = noise(agent)
    terms = agent.losses(data, eps)
    critic = sum(terms.pop(name)[0] for name in [*terms] if name.startswith("critic"))
    actor = sum(loss for loss, _ in terms.values())
    of_actor, of_critic = gradients(actor, agent), gradients(critic, agent)
    for parameter in of_actor:
        trained_by_critic = parameter.startswith("critic.")
        assert (of_actor[parameter] is None) == trained_by_critic, parameter
        assert (of_critic[parameter] is None) != trained_by_critic, parameter


@pytest.mark.parametrize("name", OPTIONS)
def test_target_copies_never_receive_gradients(name):
    agent = make(name)
    agent.loss(batch(), noise(agent))[0].backward()
    targets = {n for n, p in agent.named_parameters() if not p.requires_grad}
    assert targets == {n for n, p in agent.named_parameters() if p.grad is None}
    assert {n.split(".")[0].partition("_")[0] for n in targets} <= {"target"}


@pytest.mark.parametrize("name", OPTIONS)
def test_invalid_windows_bear_no_loss_of_critic_and_behaviour(name):
    agent, data = make(name), batch()
    eps = noise(agent)
    moved = data.actions.clone()
    moved[data.valid == 0] = -moved[data.valid == 0]
    _, before = agent.loss(data, eps)
    _, after = agent.loss(data._replace(actions=moved), eps)
    for metric in ("critic/loss", "actor/flow_loss"):
        if metric in before:
            assert before[metric] == after[metric]


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_pessimism_lowers_the_target(rho):
    agent, data = make("qam", rho=rho), batch()
    eps = noise(agent)
    a = euler(agent.policy, data.next_observations, eps["next_action_noise"][:, 0], 4)
    q = critics(agent.target_critic, data.next_observations, a)
    expected = q.mean(0) - rho * q.std(0, correction=0)
    next_actions = agent.rollouts(data, eps).next_actions
    found = td_target(agent.target_critic, data, next_actions, agent.config.window_discount, rho)
    discount = agent.config.discount**HORIZON
    torch.testing.assert_close(found, data.rewards + discount * data.masks * expected)


@pytest.mark.parametrize(
    ("name", "option"), [("qam-e", {"edit_scale": 0.0}), ("qam-f", {"alpha": 0.0})]
)
def test_without_their_addition_qam_e_and_qam_f_are_qam(name, option):
    agent, plain = make(name, **option), make("qam")
    plain.load_state_dict(agent.state_dict())
    eps = noise(agent)
    assert eps.keys() == noise(plain).keys()
    assert agent.loss(batch(), eps)[0] == plain.loss(batch(), eps)[0]
    s = batch().observations
    draw = {"noise": torch.randn(len(s), 1, D, dtype=s.dtype)}
    assert torch.equal(agent.act(s, draw), plain.act(s, draw))


def test_options_of_adjoint_matching_change_what_they_say():
    """Each option against the published setting, on the terminal adjoint or the trajectory."""
    agent, data = make("qam", shake=0.5), batch()
    s, eps = data.observations, noise(agent)

    def terminal(**options):
        other = make("qam", shake=0.5)
        other.config = replace(other.config, **options)
        chain = other.rollouts(data, eps).chain
        adjoint = chain_adjoint(other.flow, chain, s, other.reward)
        return chain.xs[-1], adjoint.values[-1], other

    end, published, _ = terminal()
    outside = end.abs() > 1
    assert outside.any()
    assert (~outside).any()
    assert not published[outside].any()
    _, unclipped, _ = terminal(clip_terminal=False)
    assert unclipped[outside].all()
    _, online, other = terminal(target_gradient=False)
    x = end.clone().requires_grad_(True)
    q = critics(other.critic, s, x.clamp(-1, 1)).mean(0).sum()
    torch.testing.assert_close(online, -0.8 * torch.autograd.grad(q, x)[0])
    _, hotter, _ = terminal(inverse_temperature=1.6)
    torch.testing.assert_close(hotter, 2 * published)


def test_residual_policy_adds_the_behaviour():
    agent, data = make("qam", residual=True), batch()
    s, x = data.observations, torch.randn(len(data.observations), D, dtype=torch.float64)
    t = torch.tensor(0.3, dtype=torch.float64)
    cond = {"observation": s}
    own = flow(agent.policy, s, x, 0.3)
    torch.testing.assert_close(
        agent.flow.velocity(x, t, cond), own + flow(agent.target_behaviour, s, x, 0.3)
    )
    torch.testing.assert_close(
        agent.flow.acting_velocity(x, t, cond), own + flow(agent.behaviour, s, x, 0.3)
    )


def test_every_agent_is_compared():
    files = Path(__file__).parent.glob("test_derived_*.py")
    others = [runpy.run_path(str(file))["REFERENCES"] for file in files]
    assert set(OPTIONS) == set(REFERENCES).union(*others)
