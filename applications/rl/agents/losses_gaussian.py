r"""Losses of tanh-Gaussian actors, whose entropy is held at a target by a learned temperature.

They are pure functions like those of `applications.rl.agents.losses`, whose symbols they share.
An action e of the actor has the log-density log p(e), so that -mean log p(e) estimates the entropy.

    entropy_loss     ᾱ mean log p(e) + α (-mean log p̄(e) - H),     α = exp(log α)
    edit_loss        -mean Q(s, a) + entropy_loss,     a = clip(u + scale e)

A bar marks what is held constant: the first term trains the actor alone, which gains entropy at the
price α, and the second term trains log α alone, whose gradient α (entropy - H) lowers the price
while the entropy is above its target H.

Source: Haarnoja et al., "Soft actor-critic algorithms and applications" (arXiv 1812.05905).
"""

from __future__ import annotations

import torch
from torch import Tensor

from applications.rl.agents.losses import Term
from applications.rl.agents.networks import Critics, TanhGaussianActor


def entropy_loss(log_prob: Tensor, log_alpha: Tensor, target_entropy: float) -> Term:
    """Compute the loss that raises the entropy of an actor, and the loss of its temperature.

    The temperature α = exp(log α) is not differentiated in the first, nor log p in the second.

    Arguments:
        log_prob: log p(e) (B,) in nats, with gradient.
        log_alpha: log α, a scalar parameter that is trained.
        target_entropy: entropy H that the temperature aims at, in nats.
    """
    negentropy = log_prob.mean()
    alpha = log_alpha.exp()
    excess = -negentropy.detach() - target_entropy
    return alpha.detach() * negentropy + alpha * excess, {
        "actor/entropy": -negentropy.detach(),
        "actor/alpha": alpha.detach(),
    }


def edited(
    editor: TanhGaussianActor, observations: Tensor, actions: Tensor, eps: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Edit actions u: return clip(u + scale e) (B, chunk_dim) and log p(e) (B,), e by noise eps."""
    edit, log_prob = editor.sample(torch.cat([observations, actions], dim=1), eps)
    return (actions + scale * edit).clamp(-1, 1), log_prob


def edit_loss(
    editor: TanhGaussianActor,
    log_alpha: Tensor,
    critic: Critics,
    observations: Tensor,
    flow_actions: Tensor,
    eps: Tensor,
    *,
    scale: float,
    target_entropy: float,
) -> Term:
    """Compute the loss of an editor that climbs the critics, and of its entropy's temperature.

    The log-density log p(e) is not corrected for the scale.

    Arguments:
        editor: the tanh-Gaussian actor on [s, u] that is trained.
        log_alpha: log α, a scalar parameter that is trained.
        critic: the online critics.
        observations: (B, observation_dim).
        flow_actions: the flow's actions u (B, chunk_dim), without gradient.
        eps: noise (B, chunk_dim) of the edit.
        scale: largest edit of a component.
        target_entropy: entropy H of e that the temperature aims at, in nats.
    """
    actions, log_prob = edited(editor, observations, flow_actions, eps, scale)
    q = critic(observations, actions, stop_weight_gradient=True).mean()
    entropy, metrics = entropy_loss(log_prob, log_alpha, target_entropy)
    return entropy - q, {
        "actor/q_loss": -q.detach(),
        "actor/edit_entropy": metrics["actor/entropy"],
        "actor/edit_alpha": metrics["actor/alpha"],
    }
