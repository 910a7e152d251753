"""What a reward is: a differentiable function of a sample, its gradient, its scale and its limits.

The tilt is p*(x) ∝ p(x) exp(r(x)).  A reward is any callable ``r(x, cond) -> (B,)``.  The adjoint
needs only its gradient at the end of a trajectory, a_1 = -∇r(X_1); the certificate needs its value.
Three optional transformations, each of which defines a new reward or a new gradient:

- scale: r ← scale · r.  A temperature T is the scale 1/T.
- smoothing: r ← mean_j r(x + s ξ_j) with ``probes`` fixed antithetic Gaussian directions ξ_j, so
  that value and gradient stay those of one deterministic function.
- max_norm: caps ‖∇r‖ per sample.  The capped field is no longer the gradient of r: it keeps
  training stable where r is steep and biases the tilt there, which the certificate, computed with
  the uncapped value, will show.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flows.field import Cond

ValueFunction = Callable[[Tensor, Cond | None], Tensor]
GradientFunction = Callable[[Tensor, Cond | None], Tensor]


class Reward:
    """A reward with its gradient.

    Arguments:
        value: differentiable ``r(x, cond)``; x has shape (B, *), the result has shape (B,).
        gradient: ``∇r(x, cond)`` of the shape of x where it is known in closed form or where the
            value is not differentiable; autograd otherwise.
        scale: multiplies value and gradient (1 / temperature).
        max_norm: cap on the Euclidean norm of the scaled gradient, per sample.
        smoothing: standard deviation s of the Gaussian smoothing; 0 is none.
        probes: number of smoothing directions, even.

    Raises:
        TypeError: ``value`` does not take the two arguments (x, cond).
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        value: ValueFunction,
        *,
        gradient: GradientFunction | None = None,
        scale: float = 1.0,
        max_norm: float | None = None,
        smoothing: float = 0.0,
        probes: int = 8,
    ) -> None:
        if not callable(value):
            raise TypeError(f"reward must be a callable (x, cond) -> (B,), got {value!r}")
        try:
            called = value.forward if isinstance(value, nn.Module) else value
            inspect.signature(called).bind(None, None)
        except TypeError as error:
            raise TypeError(f"reward must take two arguments (x, cond): {error}") from error
        except ValueError:  # a builtin without a signature: let the first call decide
            pass
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive or None, got {max_norm}")
        if not smoothing >= 0:
            raise ValueError(f"smoothing must be at least 0, got {smoothing}")
        if probes < 2 or probes % 2:
            raise ValueError(f"probes must be an even number of at least 2, got {probes}")
        self._value = value
        self._gradient = gradient
        self.scale = scale
        self.max_norm = max_norm
        self.smoothing = smoothing
        self.probes = probes

    def scaled(self, factor: float) -> Reward:
        """The same reward, of the same class, with its scale multiplied by ``factor``."""
        clone = copy.copy(self)
        clone.scale = self.scale * factor
        return clone

    def _directions(self, x: Tensor) -> Tensor:
        """Fixed antithetic smoothing directions, shape (probes, 1, *)."""
        generator = torch.Generator().manual_seed(0)
        half = torch.randn(self.probes // 2, 1, *x.shape[1:], generator=generator)
        return torch.cat([half, -half]).to(x) * self.smoothing

    def _smoothed(self, function: ValueFunction, x: Tensor, cond: Cond | None) -> Tensor:
        """Mean of ``function`` over the smoothing directions; the function itself without them."""
        if not self.smoothing:
            return function(x, cond)
        return torch.stack([function(x + step, cond) for step in self._directions(x)]).mean(0)

    def __call__(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        """Scaled reward of shape (B,).

        Raises:
            TypeError: the value is not a floating-point tensor.
            ValueError: the value has another shape.
        """
        value = self._smoothed(self._value, x, cond)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"reward must return a floating-point tensor, got {got}")
        if value.shape != x.shape[:1]:
            raise ValueError(
                f"reward returned shape {tuple(value.shape)} for x of shape {tuple(x.shape)}; "
                f"expected one value per sample, shape {tuple(x.shape[:1])}"
            )
        return self.scale * value

    def value_and_gradient(self, x: Tensor, cond: Cond | None = None) -> tuple[Tensor, Tensor]:
        """Scaled value (B,) and capped gradient of the shape of x, both detached.

        Raises:
            TypeError, ValueError: as for a call; and ValueError if the value does not depend
                differentiably on x, or a given gradient has another shape than x.
        """
        if self._gradient is not None:
            with torch.no_grad():
                value = self(x, cond)
                gradient = self.scale * self._smoothed(self._gradient, x, cond)
            if gradient.shape != x.shape:
                raise ValueError(
                    f"gradient returned shape {tuple(gradient.shape)}, expected that of x, "
                    f"{tuple(x.shape)}"
                )
        else:
            with torch.enable_grad():
                x = x.detach().requires_grad_(True)
                value = self(x, cond)
                if not value.requires_grad:
                    raise ValueError(
                        "reward is not differentiable: its value does not depend on x through "
                        "torch operations; pass gradient= or avoid detach, numpy and argmax"
                    )
                (found,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
            gradient = torch.zeros_like(x) if found is None else found
        if self.max_norm is not None:
            norm = gradient.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
            shrink = (self.max_norm / norm).clamp_max(1.0)
            gradient = gradient * shrink.reshape(-1, *([1] * (x.ndim - 1)))
        return value.detach(), gradient.detach()


def as_reward(reward: Reward | ValueFunction) -> Reward:
    """``reward`` itself, or a plain callable wrapped as one."""
    return reward if isinstance(reward, Reward) else Reward(reward)


def check_reward(reward: Reward, x: Tensor, cond: Cond | None = None) -> None:
    """Evaluate value and gradient once on ``x`` and refuse what training could not survive.

    Raises:
        TypeError, ValueError: wrong shape or type, not differentiable, or not finite on ``x``.
    """
    value, gradient = reward.value_and_gradient(x, cond)
    for name, tensor in (("reward", value), ("the reward's gradient", gradient)):
        bad = int((~torch.isfinite(tensor)).flatten(1 if tensor.ndim > 1 else 0).sum())
        if bad:
            raise ValueError(
                f"{name} is not finite on samples of the base: {bad} of {tensor.numel()} entries "
                "are NaN or infinite; expected finite numbers wherever the base has mass"
            )
