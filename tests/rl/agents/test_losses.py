"""Every loss and its gradient against the formulas, written out again here in float64.

The reference shares no code with the agents: it evaluates each member of the critics by itself,
writes out activation, norm and log-probability, and marks by `detach` what a term holds constant.
So equal gradients also show that no term trains another's network.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers.agent_problems import ACT, HORIZON, OPTIONS, batch, make, noise

from applications.rl.agents.losses import chain_adjoint, td_target

D = HORIZON * ACT


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(x, scale, shift):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-6) * scale + shift


def dense(layer, x):
    return x @ layer.weight.T + layer.bias


def perceptron(mlp, x):
    for i, layer in enumerate(mlp.layers[:-1]):
        x = gelu(dense(layer, x))
        if len(mlp.norms):
            x = norm(x, mlp.norms[i].weight, mlp.norms[i].bias)
    return dense(mlp.layers[-1], x)


def critics(net, s, a, *, constant=False):
    """Values (E, B), one member after the other; ``constant`` weights."""
    values = []
    for e in range(net.members):

        def get(p, e=e):
            return p[e].detach() if constant else p[e]

        x = torch.cat([s, a], 1)
        for i in range(len(net.weights) - 1):
            x = gelu(x @ get(net.weights[i]) + get(net.biases[i]))
            x = norm(x, get(net.scales[i]), get(net.shifts[i]))
        values.append((x @ get(net.weights[-1]) + get(net.biases[-1]))[:, 0])
    return torch.stack(values)


def lower(values, rho):
    """mean - ρ times the population deviation."""
    mean = values.mean(0)
    return mean - rho * torch.sqrt(((values - mean) ** 2).mean(0))


def flow(actor, s, x, t):
    if isinstance(actor, tuple):  # a policy on its base
        return sum(flow(part, s, x, t) for part in actor)
    time = torch.full((len(x), 1), t, dtype=x.dtype) if isinstance(t, float) else t
    return perceptron(actor.mlp, torch.cat([s, x, time], 1))


def euler(actor, s, x, steps):
    for k in range(steps):
        x = x + flow(actor, s, x, k / steps) / steps
    return x.clamp(-1, 1).detach()


def one_step(actor, s, z):
    return perceptron(actor.mlp, torch.cat([s, z], 1))


def editor(actor, s, u, eps):
    """Edit e and its log-probability, by the density of a transformed normal."""
    x = torch.cat([s, u], 1)
    for layer in actor.trunk.layers:
        x = gelu(dense(layer, x))
    mean, log_std = dense(actor.mean.layers[0], x), dense(actor.log_std.layers[0], x)
    std = log_std.clamp(-20, 2).exp()
    e = torch.tanh(mean + std * eps)
    normal = torch.distributions.Normal(mean, std).log_prob(mean + std * eps)
    return e, (normal - torch.log(1 - e**2)).sum(1)


# ----- the terms ---------------------------------------------------------------------------------


def critic_term(agent, data, next_value):
    A = data.actions.reshape(len(data.actions), D)
    y = data.rewards + agent.config.discount**HORIZON * data.masks * next_value.detach()
    q = critics(agent.critic, data.observations, A)
    return (data.valid * (q - y) ** 2).mean()


def policy_value(agent, data, a):
    return lower(critics(agent.target_critic, data.next_observations, a), agent.config.rho)


def behaviour_term(agent, data, eps):
    A = data.actions.reshape(len(data.actions), D)
    t, x0 = eps["bc_t"], eps["bc_x0"]
    error = flow(agent.behaviour, data.observations, (1 - t) * x0 + t * A, t) - (A - x0)
    return (data.valid * (error**2).mean(1)).mean()


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


def gradients(loss, agent):
    named = [(name, p) for name, p in agent.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {name: g for (name, _), g in zip(named, found, strict=True)}


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
    agent, data = make(name, seed=seed, **options), batch(seed)
    eps = noise(agent, seed)
    loss, _ = agent.loss(data, eps)
    expected = REFERENCES[name](agent, data, eps)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    actual, wanted = gradients(loss, agent), gradients(expected, agent)
    for parameter, gradient in wanted.items():
        assert gradient is not None, f"the reference does not train {parameter}"
        assert actual[parameter] is not None, f"the loss does not train {parameter}"
        torch.testing.assert_close(
            actual[parameter],
            gradient,
            rtol=1e-8,
            atol=1e-9,
            msg=lambda m, p=parameter: f"{p}: {m}",
        )


@pytest.mark.parametrize("name", [name for name in REFERENCES if name != "bc"])
def test_losses_of_actors_leave_critics_alone_and_the_reverse(name):
    agent, data = make(name), batch()
    eps = noise(agent)
    terms = agent.losses(data, eps)
    critic, _ = terms.pop("critic")
    actor = sum(loss for loss, _ in terms.values())
    of_actor, of_critic = gradients(actor, agent), gradients(critic, agent)
    for parameter in of_actor:
        trained_by_critic = parameter.startswith("critic.")
        assert (of_actor[parameter] is None) == trained_by_critic, parameter
        assert (of_critic[parameter] is None) != trained_by_critic, parameter


@pytest.mark.parametrize("name", REFERENCES)
def test_target_copies_never_receive_gradients(name):
    agent = make(name)
    agent.loss(batch(), noise(agent))[0].backward()
    targets = {n for n, p in agent.named_parameters() if not p.requires_grad}
    assert targets == {n for n, p in agent.named_parameters() if p.grad is None}
    assert {n.split(".")[0] for n in targets} <= {"target_critic", "target_behaviour"}


@pytest.mark.parametrize("name", REFERENCES)
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
    assert set(REFERENCES) == set(OPTIONS)
