r"""Adjoint matching on one page of PyTorch: a flow is tilted toward a reward, and certified.

    python examples/adjoint_matching.py

A flow with velocity v_base(x, t) = E[X_1 - X_0 | X_t = x], X_t = t X_1 + (1 - t) X_0, carries noise
at t = 0 to data X_1 ~ p at t = 1.  Training looks for the velocity v of the tilt

    p*(x) = p(x) exp(r(x)) / Z.

1. Chain.  The memoryless step from t to s, with x̂_1 = x + (1 - t) v and x̂_0 = x - t v, is

       x_s = s x̂_1 + (1 - s) ρ x̂_0 + σ ε = A x + B v + σ ε,   ρ = t (1 - s) / (s (1 - t)),

   and has the noise that the exact transition has on average: with g = s (1 - ρ²),
   σ² = (1 - s)² (1 - ρ²) + g² mmse(t), where mmse(t) = E‖X_1 - x̂_1‖²/d is measured once.
   Base and model share A, B and σ, and differ in v alone.
2. Lean adjoint, here c = a / t.  It starts as c_K = -∇r(x_K) and runs backward by one
   vector-Jacobian product of the base a step: c_k = α c_{k+1} + β (∂v_base/∂x)ᵀ c_{k+1}, where
   α = s²/t + (1 - s)²/(1 - t) and β = s² (1 - t)/t - t (1 - s)²/(1 - t).
3. Loss.  The velocity is regressed onto v_base - (1 - t) c at the states of the chain,
   Σ_k w_k ‖v - v_base + (1 - t) c_k‖², and the optimal velocity is its only critical point.
4. Certificate.  With u_k = B (v - v_base)(x_k, t_k) / σ, the whitened change of the drift,
   log w = r(x_K) - Σ_k (½ ‖u_k‖² + u_k·ε_k) has E[w] = Z for every model.  At the exact tilt log w
   is the constant log Z: its standard deviation says how far the model is from it.

Source: Domingo-Enrich et al., "Adjoint matching" (arXiv 2409.08861), algorithm 1, with the chain
and adjoint that adjoint/chain derives (kernel ``moment_matched``) in place of Euler-Maruyama's.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

Velocity = Callable[[Tensor, Tensor], Tensor]
MEANS, STD = torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.5  # data: two Gaussians, equally likely
SLOPE = torch.tensor([1.0, -0.5])


def base(x: Tensor, t: Tensor) -> Tensor:
    """Return E[X_1 - X_0 | X_t = x] of the mixture, (B, 2), in closed form."""
    variance = (t * STD) ** 2 + (1 - t) ** 2  # of X_t around t times a mean
    offset = x[:, None] - t * MEANS.to(x)  # (B, components, 2)
    likely = torch.softmax(-offset.square().sum(2) / (2 * variance), 1)
    each = MEANS.to(x) + (t * STD**2 - (1 - t)) / variance * offset
    return (likely[:, :, None] * each).sum(1)


def reward(x: Tensor) -> Tensor:
    """Return the reward r(x) = λ·x of each sample, (B,)."""
    return x @ SLOPE.to(x)


class Model(nn.Module):
    """The velocity v_base plus a small network, which is zero before training."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        self.last = nn.Linear(64, 2)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity (B, 2) at states x (B, 2) and one time t."""
        return base(x, t) + self.last(self.net(torch.cat([x, t.expand(len(x), 1)], 1)))


class Chain(NamedTuple):
    """The coefficients of K steps, a tensor (K,) each; the names are those of the equations."""

    t: Tensor
    t_adjoint: Tensor  # t, but a small time in place of 0, by which α and β divide
    A: Tensor
    B: Tensor
    sigma: Tensor
    alpha: Tensor
    beta: Tensor
    weight: Tensor


def make_chain(steps: int, data: Tensor, noise: Tensor) -> Chain:
    """Return the chain of K equal steps, with mmse(t) measured at data (N, 2) and noise (N, 2)."""
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    t, s = grid[:-1], grid[1:]
    path = [(tau, tau * data + (1 - tau) * noise) for tau in t]
    errors = [(base(x, tau) - (data - noise)).square().mean() for tau, x in path]
    rho = t * (1 - s) / (s * (1 - t))
    A, B = s + (1 - s) * rho, s * (1 - t) - (1 - s) * rho * t
    mmse = (1 - t) ** 2 * torch.stack(errors)
    sigma = ((1 - s) ** 2 * (1 - rho**2) + (s * (1 - rho**2)) ** 2 * mmse).sqrt()
    r = t.clone()
    r[0] = (s[0] / 2).clamp(max=0.02)
    alpha = s**2 / r + (1 - s) ** 2 / (1 - r)
    beta = s**2 * (1 - r) / r - r * (1 - s) ** 2 / (1 - r)
    weight = (B / sigma) ** 2  # of a change of v in the path measure; capped, with mean 1
    weight = weight.clamp(max=5 * weight.median())
    return Chain(t, r, A, B, sigma, alpha, beta, weight / weight.mean())


@torch.no_grad()
def rollout(model: Velocity, chain: Chain, x: Tensor, noise: Tensor) -> Tensor:
    """Return the states (K+1, B, 2) of the chain from x (B, 2) with step noise (K, B, 2)."""
    xs = [x]
    for t, A, B, sigma, eps in zip(chain.t, chain.A, chain.B, chain.sigma, noise, strict=True):
        xs.append(A * xs[-1] + B * model(xs[-1], t) + sigma * eps)
    return torch.stack(xs)


def lean_adjoint(chain: Chain, xs: Tensor) -> Tensor:
    """Return the adjoints c (K+1, B, 2) along the states xs (K+1, B, 2)."""
    end = xs[-1].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(end).sum(), end)
    adjoints = [-gradient]
    for k in reversed(range(len(chain.t))):
        x = xs[k].detach().requires_grad_()
        (product,) = torch.autograd.grad(base(x, chain.t_adjoint[k]), x, adjoints[-1])
        adjoints.append(chain.alpha[k] * adjoints[-1] + chain.beta[k] * product)
    return torch.stack(adjoints[::-1])


def matching_loss(model: Velocity, chain: Chain, xs: Tensor, adjoints: Tensor) -> Tensor:
    """Return Σ_k w_k ‖v - v_base + (1 - t) c_k‖², the mean over the batch."""
    terms = []
    for k, t in enumerate(chain.t):
        residual = model(xs[k], t) - base(xs[k], t) + (1 - t) * adjoints[k]
        terms.append(chain.weight[k] * residual.square().sum(1).mean())
    return torch.stack(terms).sum()


@torch.no_grad()
def log_weights(model: Velocity, chain: Chain, xs: Tensor, noise: Tensor) -> Tensor:
    """Return log w (B,) of trajectories of the model, from their states and step noise."""
    log_w = reward(xs[-1])
    for k, t in enumerate(chain.t):
        u = chain.B[k] / chain.sigma[k] * (model(xs[k], t) - base(xs[k], t))
        log_w = log_w - (u.square() / 2 + u * noise[k]).sum(1)
    return log_w


def main(updates: int = 300, batch: int = 256, steps: int = 20) -> None:
    """Train the model, and print its certificate along the way."""
    torch.manual_seed(0)
    n, model = 4096, Model()
    data = MEANS[torch.randint(2, (n,))] + STD * torch.randn(n, 2)
    chain = Chain(*(column.float() for column in make_chain(steps, data, torch.randn(n, 2))))
    exact = torch.logsumexp(MEANS @ SLOPE, 0) - math.log(2) + SLOPE.square().sum() * STD**2 / 2
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for update in range(updates + 1):
        if update % 100 == 0:
            noise = torch.randn(steps, n, 2)
            log_w = log_weights(
                model, chain, rollout(model, chain, torch.randn(n, 2), noise), noise
            )
            log_z = torch.logsumexp(log_w, 0) - math.log(n)
            print(f"update {update:3}: log w has std {log_w.std():.3f};", end=" ")
            print(f"log Z is {log_z:.3f}, exactly {exact:.3f}")
        xs = rollout(model, chain, torch.randn(batch, 2), torch.randn(steps, batch, 2))
        loss = matching_loss(model, chain, xs, lean_adjoint(chain, xs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
