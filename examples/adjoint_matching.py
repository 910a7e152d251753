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

import torch
from torch import Tensor, nn

MEANS, STD = torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.5  # data: two Gaussians, equally likely
SLOPE = torch.tensor([1.0, -0.5])  # of the reward r(x) = λ·x
Chain = list[tuple[Tensor, ...]]  # (t, r, A, B, σ, α, β, w) of each step


def base(x: Tensor, t: Tensor) -> Tensor:
    """Return E[X_1 - X_0 | X_t = x] of the mixture, (B, 2), in closed form."""
    variance = (t * STD) ** 2 + (1 - t) ** 2  # of X_t around t times a mean
    offset = x[:, None] - t * MEANS.to(x)  # (B, components, 2)
    likely = torch.softmax(-offset.square().sum(2) / (2 * variance), 1)
    each = MEANS.to(x) + (t * STD**2 - (1 - t)) / variance * offset
    return (likely[:, :, None] * each).sum(1)


def velocity(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """Return v_base plus a network, (B, 2), at states x (B, 2) and one time t."""
    return base(x, t) + net(torch.cat([x, t.expand(len(x), 1)], 1))


def make_chain(steps: int, data: Tensor, noise: Tensor) -> Chain:
    """Return the coefficients of K equal steps; mmse(t) is measured at data and noise (N, 2).

    The lean adjoint takes v_base at r: t, but a small time in place of 0, by which α and β divide.
    """
    grid = torch.linspace(0, 1, steps + 1).to(data)
    t, s, r = grid[:-1], grid[1:], grid[:-1].clamp(min=min(0.02, 0.5 / steps))
    errors = [base(tau * data + (1 - tau) * noise, tau) - (data - noise) for tau in t]
    mmse = (1 - t) ** 2 * torch.stack([error.square().mean() for error in errors])
    rho = t * (1 - s) / (s * (1 - t))
    A, B = s + (1 - s) * rho, s * (1 - t) - (1 - s) * rho * t
    sigma = ((1 - s) ** 2 * (1 - rho**2) + (s * (1 - rho**2)) ** 2 * mmse).sqrt()
    alpha = s**2 / r + (1 - s) ** 2 / (1 - r)
    beta = s**2 * (1 - r) / r - r * (1 - s) ** 2 / (1 - r)
    w = (B / sigma) ** 2  # of a change of v in the path measure; capped, with mean 1
    w = w.clamp(max=5 * w.median())
    return list(zip(t, r, A, B, sigma, alpha, beta, w / w.mean(), strict=True))


@torch.no_grad()
def rollout(net: nn.Module, chain: Chain, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return states (K+1, B, 2) from x (B, 2) with step noise (K, B, 2), and log w (B,)."""
    xs, log_w = [x], torch.zeros(len(x)).to(x)
    for (t, _, A, B, sigma, *_), eps in zip(chain, noise, strict=True):
        v = velocity(net, xs[-1], t)
        u = B / sigma * (v - base(xs[-1], t))
        log_w -= (u.square() / 2 + u * eps).sum(1)
        xs.append(A * xs[-1] + B * v + sigma * eps)
    return torch.stack(xs), log_w + xs[-1] @ SLOPE.to(x)


def lean_adjoint(chain: Chain, xs: Tensor) -> Tensor:
    """Return the adjoints c (K+1, B, 2) along the states xs (K+1, B, 2)."""
    adjoints = [-SLOPE.to(xs).expand_as(xs[-1])]  # -∇r at the end
    for (_, r, *_, alpha, beta, _), state in zip(chain[::-1], xs[:-1].flip(0), strict=True):
        x = state.requires_grad_()
        (product,) = torch.autograd.grad(base(x, r), x, adjoints[-1])
        adjoints.append(alpha * adjoints[-1] + beta * product)
    return torch.stack(adjoints[::-1])


def matching_loss(net: nn.Module, chain: Chain, xs: Tensor, adjoints: Tensor) -> Tensor:
    """Return Σ_k w_k ‖v - v_base + (1 - t) c_k‖², the mean over the batch."""
    loss = torch.zeros(()).to(xs)
    for (t, *_, w), x, c in zip(chain, xs[:-1], adjoints[:-1], strict=True):
        loss += w * (velocity(net, x, t) - base(x, t) + (1 - t) * c).square().sum(1).mean()
    return loss


def main(updates: int = 300, batch: int = 256, steps: int = 20, n: int = 4096) -> None:
    """Train the network, which is zero at first, and print its certificate along the way."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    for parameter in net[-1].parameters():
        nn.init.zeros_(parameter)
    data = MEANS[torch.randint(2, (n,))] + STD * torch.randn(n, 2)
    chain = make_chain(steps, data, torch.randn(n, 2))
    exact = torch.exp(MEANS @ SLOPE).mean().log() + SLOPE.square().sum() * STD**2 / 2
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for update in range(updates + 1):
        if update % 100 == 0:
            _, log_w = rollout(net, chain, torch.randn(n, 2), torch.randn(steps, n, 2))
            print(f"update {update:3}: log w has std {log_w.std():.3f};", end=" ")
            print(f"log Z is {log_w.exp().mean().log():.3f}, exactly {exact:.3f}")
        xs, _ = rollout(net, chain, torch.randn(batch, 2), torch.randn(steps, batch, 2))
        optimizer.zero_grad()
        matching_loss(net, chain, xs, lean_adjoint(chain, xs)).backward()
        optimizer.step()


if __name__ == "__main__":
    main()
