"""Losses and gradients of agents with Gaussian actors against the formulas, again in float64."""

import pytest
import torch
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


REFERENCES = {"fedit": fedit, "dsrl": dsrl, "rebrac": rebrac}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", REFERENCES)
def test_loss_and_gradient_are_those_of_the_formulas(name, seed):
    check_formula(name, REFERENCES[name], seed)
