r"""A model to train that sees the reward: guidance with a learned gain, and a network beside it.

The velocity of the exact tilt is, with V_t(x) = E[exp r(X_1) | X_t = x] under the base,

    v*(x, t) = v(x, t) + (1 - t)/t ∇ log V_t(x)

for X_0 independent of X_1.  What a network has to learn is ∇ log V_t.  One that sees x and t only
must rebuild base and reward in itself; but where the posterior of X_1 is narrow, V_t(x) ≈ exp
r(x̂_1) with the conditional mean x̂_1 = x + (1 - t) v(x, t), and then

    ∇ log V_t(x) ≈ s(x, t) = (∂x̂_1/∂x)ᵀ ∇r(x̂_1),    ∂x̂_1/∂x = I + (1 - t) ∇v,

which is what guidance by a reward adds to a flow (Chung et al., arXiv 2209.14687).  For a Gaussian
base and a linear reward it is exact at all times; in general it becomes so as t → 1 only, and a
guidance of some strength samples no known distribution.  Here it is an ingredient:

    v_θ(x, t) = v(x, t) + (1 - t) g_θ(t) s(x, t) + N_θ(x, t, x̂_1, s).

The gain g_θ is a number, linear in the features of the time; the correction N_θ is a network that
sees the estimate x̂_1 and the slope s besides the state.  With g_θ = 0 and N_θ = 0 the model starts
at the base, like any other, and adjoint matching finds both: nothing is assumed of the guidance.
Near t = 0, where the exact gain 1/t is out of reach of g_θ, the correction has to do the work.
Path integral samplers give their networks the score of the target (Zhang and Chen, arXiv
2111.15141).

The price: base and reward are evaluated and differentiated at every step of the sampler too,
samples can be drawn only where the reward is, and the loss evaluates them at all states at once, or
at ``micro_batch`` of them; ``reward_batch`` has no effect on this model.  With micro-batches, base
and reward are evaluated again in the backward pass.  `benchmarks.digits` measures gain and price on
handwritten digits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn

from adjoint.rewards.reward import AbstractReward, ValueFunction, as_reward
from flows.autodiff import pullback
from flows.field import Cond, Corrected, VelocityField, batch_time
from flows.networks.mlp import MLPVelocity, TimeEmbedding

FEATURES = ("estimate", "slope")
"""Names under which a correction finds x̂_1 and s among its conditions."""


class RewardInformed(Corrected):
    """A velocity field ``base + (1 - t) gain(t) s + correction``; see the module docstring.

    Arguments:
        base: velocity field on the canonical path, copied (so not sharded) and frozen.
        reward: of samples, a `Reward` or callable (x, cond) -> (B,), with its temperature: give
            ``reward / T`` for a tilt at temperature T.  It is shared by all copies of the model, no
            part of its weights, and must be where the model is.
        correction: module called as (x, t, cond), where ``cond`` holds besides the conditions of
            the flow ``estimate`` (x̂_1) and ``slope`` (s), each of the shape of x; it should start
            at zero.  See `reward_informed` for vectors, and ``images`` of
            `flows.networks.unet.UNetVelocity`.  Gain and correction must have the dtype and device
            of the state: use ``.to`` where it is not float32 on the CPU.
        time_dim: size of the time embedding of the gain, even.

    Differentiable in x, also by the transforms of `torch.func`, so that divergences and likelihoods
    are right; as the second derivative of base and reward, they cost accordingly.
    """

    def __init__(
        self,
        base: VelocityField,
        reward: ValueFunction,
        correction: nn.Module,
        *,
        time_dim: int = 32,
    ) -> None:
        super().__init__(base, correction)
        self.time = TimeEmbedding(time_dim)
        self.gain = nn.Linear(time_dim, 1, bias=False)
        nn.init.zeros_(self.gain.weight)
        self._reward = _Shared(as_reward(reward))

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the velocity of the shape of ``x``.

        Raises:
            ValueError: ``cond`` names a feature, or lacks what base, reward or correction ask for.
        """
        taken = sorted(set(FEATURES) & set(cond or {}))
        if taken:
            raise ValueError(
                f"cond must not name {taken}, which this model adds for its correction"
            )
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        time = batch_time(t, x)
        v, pull = pullback(lambda z: self.base(z, t, cond).to(z.dtype), x, create_graph=True)
        estimate = x + (1 - time) * v
        slope = self._slope(estimate, cond, flat=t.ndim == 2)  # states (S, B, *), times (S, 1)
        if pull is not None:
            slope = slope + (1 - time) * pull(slope)
        features: Mapping[str, Tensor] = {"estimate": estimate, "slope": slope}
        correction = self.correction(x, t, {**(cond or {}), **features})
        gain = batch_time(self.gain(self.time(t.reshape(-1))), x)
        return v + (1 - time) * gain * slope + correction

    def _slope(self, x: Tensor, cond: Cond | None, *, flat: bool) -> Tensor:
        """Return ∇r at ``x``, (B, *), or (S, B, *) if it is to be made ``flat``."""
        states = x
        if flat:
            states = x.flatten(0, 1)
            cond = cond and {n: repeat(c, "b ... -> (s b) ...", s=len(x)) for n, c in cond.items()}
        gradient = self._reward.held.value_and_gradient(states, cond, create_graph=True)[1]
        return gradient.to(x.dtype).reshape(x.shape)


class _Shared:
    """Holds a reward that the copies of a module share."""

    def __init__(self, held: AbstractReward) -> None:
        self.held = held

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        """Return this object: a reward may hold networks of any size, which never change."""
        return self


def reward_informed(
    base: VelocityField,
    reward: ValueFunction,
    dim: int,
    *,
    hidden: Sequence[int] = (256, 256, 256),
    cond_dims: Mapping[str, int] | None = None,
    seed: int = 0,
) -> RewardInformed:
    """Return a `RewardInformed` model of a flow of vectors, with a perceptron as its correction.

    Arguments:
        base, reward: see `RewardInformed`.
        dim: number of entries of a sample.
        hidden: widths of the perceptron's hidden layers.
        cond_dims: name and size of each condition of the flow that the perceptron is to see; it
            must be given them all.
        seed: of the perceptron's weights.

    Raises:
        ValueError: a size that is not positive, or a condition with the name of a feature.
    """
    taken = sorted(set(FEATURES) & set(cond_dims or {}))
    if taken:
        raise ValueError(f"cond_dims must not name {taken}, which the model adds itself")
    dims = {**(cond_dims or {}), **dict.fromkeys(FEATURES, dim)}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        correction = MLPVelocity(dim, hidden=hidden, cond_dims=dims, zero_init=True)
        return RewardInformed(base, reward, correction)
