"""The parts of the agents' formulas in plain torch, and the comparison of an agent with a formula.

The references share no code with the agents: each member of the critics is evaluated by itself,
activation, norm and log-probability are written out, and `detach` marks what a term holds constant.
So equal gradients also show that no term trains another's network.
"""

import math

import torch

from helpers.agent_problems import ACT, HORIZON, batch, make, noise

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


def gradients(loss, agent):
    named = [(name, p) for name, p in agent.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {name: g for (name, _), g in zip(named, found, strict=True)}


def check_formula(name, reference, seed, **options):
    """Compare loss and gradients of an agent with ``reference(agent, batch, noise)``."""
    agent, data = make(name, seed=seed, **options), batch(seed)
    eps = noise(agent, seed)
    loss, _ = agent.loss(data, eps)
    expected = reference(agent, data, eps)
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
