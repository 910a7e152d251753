"""Adjoint matching as a plain loop of PyTorch, which `benchmarks.tilt_speed` times."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from adjoint import ValueFunction
from adjoint.trajectory_source import compiled
from flows import VelocityField

LR, CLIP = 1e-3, 100.0
"""Learning rate and largest norm of the gradient, of both sides."""


class Plain:
    """Adjoint matching in PyTorch alone.

    Source: algorithm 1 of Domingo-Enrich et al. (2409.08861), with the coefficients of Li and
    Levine (2601.14234).

    Arguments:
        base, model: the frozen field, and the field that is trained.
        reward: (x, cond) → (B,).
        noise: () → start (B, *) and step noises (K, B, *).
    """

    def __init__(
        self,
        base: VelocityField,
        model: nn.Module,
        reward: ValueFunction,
        noise: Callable[[], tuple[Tensor, Tensor]],
        *,
        compile: bool = False,
    ) -> None:
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.weights, lr=LR, fused=True)
        self.base, self.model = (compiled(f) if compile else f for f in (base, model))
        self.reward, self.noise = reward, noise

    def update(self) -> Tensor:
        """Make one update and return its loss."""
        x, noise = self.noise()
        steps = len(noise)
        h, t = 1 / steps, torch.linspace(0, 1, steps + 1, device=x.device)
        sigma = [math.sqrt(2 * (1 - k * h + h) / (k * h + h)) for k in range(steps)]
        xs = [x]
        with torch.no_grad():
            for k in range(steps - 1):
                v = self.model(x, t[k])
                x = (1 - 1 / (k + 1)) * x + 2 * h * v + math.sqrt(h) * sigma[k] * noise[k]
                xs.append(x)
            xs.append(x + h * self.base(x, t[steps - 1]))

        x = xs[-1].requires_grad_(True)
        (a,) = torch.autograd.grad(-self.reward(x, None).sum(), x)
        adjoints = {}
        for k in reversed(range(steps)):
            x = xs[k].detach().requires_grad_(True)
            (pull,) = torch.autograd.grad(self.base(x, t[k + 1]), x, a)
            adjoints[k] = a = (1 - 1 / (k + 1)) * a + 2 * h * pull

        self.optimizer.zero_grad()
        loss = torch.zeros((), device=x.device)
        for k in range(steps):
            with torch.no_grad():
                v_base = self.base(xs[k], t[k])
            control = self.model(xs[k].detach(), t[k]) - v_base
            residual = 2 / sigma[k] * control + sigma[k] * adjoints[k]
            loss = loss + residual.square().flatten(1).sum(1).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimizer.step()
        return loss.detach()
