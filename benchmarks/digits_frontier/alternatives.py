"""Best-of-n, gradient guidance and reward backpropagation, written without this package.

`best_of`           the sample with the highest reward among n.
`RewardGuidance`    every velocity of the sampler gets the gradient of the reward at the predicted
                    clean sample: v + w (1-t)/t ∇_x r(x + (1-t) v(x, t)).  With w = 1/T it would be
                    the tilt at temperature T if log E[exp(r/T) | x_t] were r(E[x_1 | x_t]) / T, as
                    in "Diffusion posterior sampling" (Chung et al., arXiv 2209.14687).
`backpropagate`     the weights ascend the reward of samples through the sampler, through all of its
                    steps or the last one only, as in "Directly fine-tuning diffusion models on
                    differentiable rewards" (Clark et al., arXiv 2309.17400).  Nothing holds the
                    model at its base but the number of updates, whose choices make its frontier.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

Cond = Mapping[str, Tensor]
Field = Callable[[Tensor, Tensor, Cond | None], Tensor]
Reward = Callable[[Tensor, Cond | None], Tensor]

EARLIEST = 0.02
"""Smallest t in (1-t)/t: at t = 0 the predicted clean sample is constant, and the term is 0/0."""


def best_of(rewards: Tensor, n: int) -> Tensor:
    """Return the indices (N // n,) of the highest of each ``n`` consecutive rewards (N,)."""
    groups = rewards[: len(rewards) // n * n].reshape(-1, n)
    return torch.arange(len(groups)) * n + groups.argmax(1)


class RewardGuidance:
    """The velocity v + w (1-t)/t ∇_x r(x + (1-t) v) of gradient guidance, for any ODE solver.

    Arguments:
        field: velocity field.
        reward: differentiable (x, cond) -> (B,).
        strength: weight w of the guidance.
    """

    def __init__(self, field: Field, reward: Reward, strength: float) -> None:
        self.field, self.reward, self.strength = field, reward, strength

    def __call__(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the velocity, of the shape of ``x``, at a scalar ``t``.

        The velocity has a graph only if ``x`` requires a gradient, as in the likelihood of the ODE.
        """
        differentiable = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad():
            if not differentiable:
                x = x.detach().requires_grad_(True)
            v = self.field(x, t, cond)
            clean = x + (1 - t) * v
            total = self.reward(clean, cond).sum()
            (slope,) = torch.autograd.grad(total, x, create_graph=differentiable)
        guided = v + self.strength * (1 - t) / t.clamp_min(EARLIEST) * slope
        return guided if differentiable else guided.detach()


def backpropagate(
    field: nn.Module,
    reward: Reward,
    draw: Callable[[int, torch.Generator], tuple[Tensor, Cond | None]],
    *,
    last_only: bool,
    stops: Sequence[int],
    steps: int = 20,
    batch_size: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
) -> Iterator[tuple[int, nn.Module]]:
    """Yield (updates, trained copy of ``field``) after each number of updates in ``stops``.

    Arguments:
        draw: (n, generator) -> noise (n, *) and conditions.
        last_only: differentiate the last Euler step only.
        stops: increasing numbers of updates.
        steps: Euler steps of the sampler.
    """
    model = copy.deepcopy(field).requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    times = torch.linspace(0, 1, steps + 1)
    for update in range(1, max(stops) + 1):
        x, cond = draw(batch_size, generator)
        for k in range(steps):
            with torch.set_grad_enabled(k == steps - 1 or not last_only):
                x = x + model(x, times[k], cond) / steps
        loss = -reward(x, cond).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update in stops:
            yield update, model
