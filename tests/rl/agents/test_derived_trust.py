"""TRQAM, SQAM, trust region and value penalty against the formulas, written out in float64."""

import math

import pytest
import torch
from helpers.agent_problems import B, batch, make, measure, noise
from helpers.formulas import (
    D,
    behaviour_term,
    check_formula,
    critic_term,
    critics,
    euler,
    flow,
    gradients,
    policy_value,
)
from torch import nn

from adjoint import Reward, gaussian_kernel, make_kernel, rollout
from adjoint.certificate import path_log_ratio
from applications.rl.agents.losses import matching_loss
from applications.rl.agents.rollouts import PolicyChain, PolicyFlow
from applications.rl.agents.trust_region import TrustRegion, path_kl
from flows import uniform

K, H = 4, 1 / 4


def g(t):
    return math.sqrt(2 * (1 - t + H) / (t + H))


def terminal(agent, s, end):
    """-∇ mean Q̄ at the clipped end: no temperature."""
    end = end.clone().requires_grad_(True)
    q = critics(agent.target_critic, s, end.clamp(-1, 1)).mean(0).sum()
    return -torch.autograd.grad(q, end)[0]


def chain(agent, data, eps):
    """States and adjoints of the published chain, at its K times: [(t, x, a), ...], and its end."""
    s, x, xs = data.observations, eps["sde_x0"], []
    for k in range(K):
        xs.append(x)
        t = k * H
        if k < K - 1:
            drift = 2 * flow(agent.policy, s, x, t) - x / (t + H)
            x = (x + H * drift + math.sqrt(H) * g(t) * eps["sde_eps"][k]).detach()
    end = (x + H * flow(agent.target_behaviour, s, x, 1 - H)).detach()
    a, rows = terminal(agent, s, end), []
    for k in reversed(range(K)):
        t, x = k * H, xs[k].clone().requires_grad_(True)
        drift = 2 * flow(agent.target_behaviour, s, x, t + H) - x / (t + H)
        a = a + H * torch.autograd.grad((drift * a).sum(), x)[0]
        rows.append((t, xs[k], a))
    return rows, end


def bridge(agent, data, eps):
    s, end = data.observations, eps["sde_x0"]
    for k in range(K):
        end = (end + H * flow(agent.policy, s, end, k * H)).detach()
    slope, rows = terminal(agent, s, end), []
    for j in range(1, K + 1):
        t = j * H
        rows.append((t, (1 - t) * eps["sde_eps"][j - 1] + t * end, t * slope))
    return rows, end


def control(agent, s, t, x):
    return flow(agent.policy, s, x, t) - flow(agent.target_behaviour, s, x, t).detach()


def matching_term(agent, s, rows, temperature):
    total = 0.0
    for t, x, a in rows:
        sigma = g(t) / math.sqrt(temperature)
        total = total + ((2 / sigma * control(agent, s, t, x) + sigma * a) ** 2).sum(1)
    return total.mean()


def divergence(agent, s, rows):
    total = sum(2 * H / g(t) ** 2 * (control(agent, s, t, x) ** 2).sum(1) for t, x, _ in rows)
    return float(total.mean().detach()) / agent.config.horizon


def penalty_term(agent, data, end, weight):
    A, s = data.actions.reshape(B, D), data.observations
    at_policy = critics(agent.critic, s, end.clamp(-1, 1)).mean(0)
    return weight * (at_policy - critics(agent.critic, s, A).mean(0)).mean()


def tilt(agent, data, eps, states):
    a = euler(agent.policy, data.next_observations, eps["next_action_noise"][:, 0], K)
    rows, end = states(agent, data, eps)
    temperature = 3 * float(agent.trust_region.multiplier)
    matching = matching_term(agent, data.observations, rows, temperature)
    critic = critic_term(agent, data, policy_value(agent, data, a))
    penalty = penalty_term(agent, data, end, agent.config.value_penalty)
    return critic + behaviour_term(agent, data, eps) + matching + penalty


REFERENCES = {
    "trqam": lambda *problem: tilt(*problem, chain),
    "sqam": lambda *problem: tilt(*problem, bridge),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", REFERENCES)
def test_loss_and_gradient_are_those_of_the_formulas(name, seed):
    check_formula(name, REFERENCES[name], seed)


@pytest.mark.parametrize("adjoint", ["lean", "scalar"])
def test_options_of_qam_are_trqam_and_sqam(adjoint):
    options = {"kl_budget": 0.6, "value_penalty": 0.2, "adjoint": adjoint}
    options["inverse_temperature"] = 1.0
    check_formula("qam", REFERENCES["sqam" if adjoint == "scalar" else "trqam"], 0, **options)


@pytest.mark.parametrize(("name", "states"), [("trqam", chain), ("sqam", bridge)])
def test_the_dual_update(name, states):
    """Over three updates; the loss has the multiplier of before its update."""
    agent, data = make(name, shake=0.3, kl_budget=0.2), batch()
    average, multiplier, s = 0.0, 1.0, data.observations
    for update in range(3):
        eps = noise(agent, update)
        loss, metrics = agent.loss(data, eps)
        torch.testing.assert_close(loss, tilt(agent, data, eps, states))
        kl = divergence(agent, s, states(agent, data, eps)[0])
        average = 0.9 * average + 0.1 * min(kl, 2 * 0.2)
        multiplier = min(max(multiplier + 0.01 * (average - 0.2), 0.01), 100)
        expected = (kl, average, multiplier, 0.2)
        named = ("path_kl", "path_kl_average", "multiplier", "kl_budget")
        for key, value in zip(named, expected, strict=True):
            assert metrics[f"actor/{key}"] == pytest.approx(value, rel=1e-10), key
        agent.follow(metrics)
        assert agent.trust_region.multiplier == pytest.approx(multiplier, rel=1e-10)
        assert agent.trust_region.kl_average == pytest.approx(average, rel=1e-10)


@pytest.mark.parametrize(
    ("start", "kl", "expected"), [(0.0101, 0.0, 0.01), (99.999, 9.0, 100.0), (1.0, 0.0, 0.99)]
)
def test_the_multiplier_is_kept_in_bounds(start, kl, expected):
    kernel = make_kernel("euler_published", uniform(K))
    region = TrustRegion(1.0, 1).double()
    region.multiplier.fill_(start)
    region.kl_average.fill_(kl)
    moved = region.metrics(kernel, kl * torch.ones(K, B, D, dtype=torch.float64))
    assert moved["actor/multiplier"] == pytest.approx(expected)


def test_the_published_path_kl():
    """The noiseless last step counts as the others do."""
    kernel = make_kernel("euler_published", uniform(K))
    for k in range(K):
        step = torch.zeros(K, 1, 1, dtype=torch.float64)
        step[k] = 1.0
        assert path_kl(kernel, step) == pytest.approx(2 * H / g(k * H) ** 2)


KERNELS = (
    "euler_published",
    "euler_consistent",
    "ancestral_pair",
    "ancestral",
    "moment_matched",
    "helpers.own_schemes:Tempered",
)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_path_kl_of_any_kernel_is_that_between_its_chains(kernel):
    agent, data = make("qam", kernel=kernel, shake=0.4), batch()
    eps, cond = noise(agent), {"observation": data.observations}
    measure(agent, data, eps)
    table = agent.kernel.on(torch.device("cpu"))
    run = rollout(
        agent.flow.velocity, agent.flow.reference, table, eps["sde_x0"], eps["sde_eps"], cond
    )
    base = torch.stack(
        [agent.flow.reference(x, table.t[k], cond) for k, x in enumerate(run.xs[:-1])]
    )
    _, expected = path_log_ratio(run, base, table)
    own = run.v - base
    if table.noiseless_last:
        own[-1] = 0.0
    torch.testing.assert_close(path_kl(table, own), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["qam", "qam-e", "qam-f"])
def test_any_kernel_tilts_at_the_temperature(name, kernel):
    """The loss is Λ times that of the tilt by exp(τ Q/Λ), and so are its gradients."""
    held = make(name, kernel=kernel, kl_budget=0.4, inverse_temperature=1.5)
    held.trust_region.multiplier.fill_(0.7)
    plain = make(name, kernel=kernel, inverse_temperature=1.5 / 2.1)
    data, eps = batch(), noise(held)
    found = held.losses(data, eps)["matching"][0]
    expected = plain.losses(data, eps)["matching"][0] * 2.1
    torch.testing.assert_close(found, expected)
    own, wanted = gradients(found, held), gradients(expected, plain)
    for key, gradient in wanted.items():
        if gradient is not None:
            torch.testing.assert_close(own[key], gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["qam", "qam-e", "qam-f"])
@pytest.mark.parametrize("adjoint", ["lean", "scalar"])
def test_the_gradient_of_the_value_penalty(name, adjoint):
    """Critics alone are trained by it, at the clipped end of the chain or of the policy's ODE."""
    agent, data = make(name, value_penalty=0.3, adjoint=adjoint, best_of_n=2, shake=0.5), batch()
    plain = make(name, adjoint=adjoint, best_of_n=2, shake=0.5)
    eps = noise(agent)
    terms, others = agent.losses(data, eps), plain.losses(data, eps)
    states = bridge if adjoint == "scalar" else chain
    expected = penalty_term(agent, data, states(agent, data, eps)[1], 0.3)
    torch.testing.assert_close(terms["critic"][0] - others["critic"][0], expected)
    torch.testing.assert_close(0.3 * terms["critic"][1]["critic/value_gap"], expected.detach())
    own, before = gradients(terms["critic"][0], agent), gradients(others["critic"][0], plain)
    for key, gradient in gradients(expected, agent).items():
        assert (gradient is not None) == (own[key] is not None) == key.startswith("critic."), key
        if gradient is not None:
            torch.testing.assert_close(own[key] - before[key], gradient, rtol=1e-8, atol=1e-10)
    for key in terms.keys() - {"critic"}:  # nothing else changes
        torch.testing.assert_close(others[key][0], terms[key][0])


def test_a_scalar_adjoint_takes_no_kernel():
    with pytest.raises(ValueError, match=r"kernel must be euler_published, .* got 'ancestral'"):
        make("qam", adjoint="scalar", kernel="ancestral")


class Affine(nn.Module):
    """A velocity a_k x + b_k at the times k / K."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x, t, cond=None):
        k = (t * len(self.a)).round().long()
        a, b = self.a[k], self.b[k]
        return (a[:, None] * x + b[:, None]) if a.ndim else a * x + b


@pytest.mark.slow
def test_the_kl_of_a_gaussian_policy_settles_at_the_budget():
    """Behaviour N(m, s²) and Q = -κ (x - c)²/2: the tilt is normal, and its KL a formula."""
    budget, steps, m, variance, kappa, c = 0.6, 10, 0.3, 0.49, 6.0, 2.0
    t = torch.arange(steps, dtype=torch.float64) / steps
    at = t**2 * variance + (1 - t) ** 2
    slope = (t * variance - (1 - t)) / at
    base = Affine(slope, m * (1 - slope * t)).requires_grad_(False)
    policy = Affine(base.a, base.b)
    policy_flow = PolicyFlow(policy, base, base)
    kernel = gaussian_kernel("moment_matched", uniform(steps), variance=variance)
    region = TrustRegion(budget, 1).double()
    reward = Reward(lambda x, cond: -0.5 * kappa * (x - c).square().sum(1))
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    kls, temperatures = [], []
    for _ in range(2500):
        eps = torch.randn(steps + 1, 128, 1, generator=generator, dtype=torch.float64)
        xs = rollout(policy, base, kernel, eps[0], eps[1:]).xs
        chain = PolicyChain(kernel, xs)
        loss, metrics = matching_loss(policy_flow, chain, eps[0], reward, region)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        region.follow(metrics)
        kls.append(float(metrics["actor/path_kl"]))
        temperatures.append(float(region.temperature))
    assert sum(kls[-800:]) / 800 == pytest.approx(budget, rel=0.05)
    temperature = sum(temperatures[-800:]) / 800
    own = 1 / (1 / variance + kappa / temperature)
    mean = own * (m / variance + kappa * c / temperature)
    ratio = own / variance
    exact = 0.5 * (ratio - 1 - math.log(ratio) + (mean - m) ** 2 / variance)
    assert exact == pytest.approx(budget, rel=0.1)
