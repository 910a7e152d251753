"""Losses and gradients of agents with Gaussian actors against the formulas, again in float64."""

import pytest
import torch
from helpers.agent_problems import batch, make, noise
from helpers.formulas import (
    D,
    behaviour_term,
    check_formula,
    critic_term,
    critics,
    editor,
    euler,
    lower,
    perceptron,
    policy_value,
)


def temperature_term(agent, log_p, *, entropy=0.5):
    """The price of the entropy for the actor, and the loss of its temperature."""
    alpha = agent.log_alpha.exp()
    return alpha.detach() * log_p.mean() - alpha * (log_p.mean().detach() - entropy * D)


def fedit(agent, data, eps):
    scale, s, following = agent.config.edit_scale, data.observations, data.next_observations
    u = euler(agent.behaviour, following, eps["next_action_noise"][:, 0], 4)
    e, _ = editor(agent.editor, following, u, eps["next_edit_eps"][:, 0])
    value = policy_value(agent, data, (u + scale * e).clamp(-1, 1))

    u = euler(agent.behaviour, s, eps["base_noise"], 4)
    e, log_p = editor(agent.editor, s, u, eps["edit_eps"])
    q = critics(agent.critic, s, (u + scale * e).clamp(-1, 1), constant=True)
    edit = temperature_term(agent, log_p) - q.mean()
    return critic_term(agent, data, value) + behaviour_term(agent, data, eps) + edit


def gaussian(actor, x, eps):
    """Action of a tanh-Gaussian actor on x, and its log-probability."""
    return editor(actor, x, x[:, :0], eps)


def dsrl(agent, data, eps):
    scale, s, following = agent.config.latent_scale, data.observations, data.next_observations
    z, _ = gaussian(agent.actor, following, eps["next_latent_eps"][:, 0])
    value = policy_value(agent, data, euler(agent.target_behaviour, following, scale * z, 4))

    n = eps["distill_noise"]
    q = critics(agent.critic, s, euler(agent.target_behaviour, s, n, 4)).detach()
    latent_critic = ((critics(agent.latent_critic, s, n) - q) ** 2).mean()
    z, log_p = gaussian(agent.actor, s, eps["latent_eps"])
    actor = -critics(agent.latent_critic, s, scale * z, constant=True).mean()
    own = latent_critic + actor + temperature_term(agent, log_p)
    return critic_term(agent, data, value) + behaviour_term(agent, data, eps) + own


def rebrac(agent, data, eps):
    config, s, w = agent.config, data.observations, data.valid
    A = data.actions.reshape(len(s), D)
    xi = (0.2 * eps["next_action_noise"]).clamp(-0.25, 0.25)
    a = torch.tanh(perceptron(agent.target_actor.mlp, data.next_observations)) + xi
    critic = critic_term(agent, data, policy_value(agent, data, a.clamp(-1, 1)))

    mu = torch.tanh(perceptron(agent.actor.mlp, s))
    q = lower(critics(agent.critic, s, mu, constant=True), config.rho)
    weight = 1 / q.abs().mean().detach()
    return critic - weight * q.mean() + config.alpha * (w * ((mu - A) ** 2).sum(1)).mean()


def rlpd(agent, data, eps):
    config, s, A = agent.config, data.observations, data.actions.reshape(-1, D)
    e, _ = gaussian(agent.actor, data.next_observations, eps["next_action_noise"])
    critic = critic_term(agent, data, policy_value(agent, data, e))

    e, log_p = gaussian(agent.actor, s, eps["actor_noise"])
    q = lower(critics(agent.critic, s, e, constant=True), config.rho)
    mean, log_std = agent.actor(s)
    normal = torch.distributions.Normal(mean, log_std.exp())
    squashed = torch.distributions.TransformedDistribution(
        normal, torch.distributions.TanhTransform()
    )
    imitation = -(data.valid * squashed.log_prob(A).sum(1)).mean()
    return critic - q.mean() + temperature_term(agent, log_p) + config.bc_alpha * imitation


REFERENCES = {"fedit": fedit, "dsrl": dsrl, "rebrac": rebrac, "rlpd": rlpd}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", REFERENCES)
def test_loss_and_gradient_are_those_of_the_formulas(name, seed):
    check_formula(name, REFERENCES[name], seed)


def test_without_its_weight_there_is_no_imitation():
    agent, data = make("rlpd", bc_alpha=0.0), batch()
    assert agent.losses(data, noise(agent)).keys() == {"critic", "actor", "entropy"}


def test_actions_at_the_bounds_are_imitated_with_finite_gradients():
    agent = make("rlpd", dtype=torch.float32)
    data = batch(dtype=torch.float32)
    data = data._replace(actions=data.actions.sign())
    loss, metrics = agent.losses(data, noise(agent))["imitation"]
    loss.backward()
    assert all(p.grad.isfinite().all() for p in agent.actor.parameters())
    inside = data._replace(actions=data.actions * (1 - 1e-5))
    same = agent.losses(inside, noise(agent))["imitation"][1]["actor/bc_loss"]
    torch.testing.assert_close(metrics["actor/bc_loss"], same)
