"""Rewards: differentiable functions of a sample with their gradients, and sums of them.

The tilt is p*(x) ∝ p(x) exp(r(x)).  A reward is any callable ``r(x, cond) -> (B,)``.  The adjoint
needs only its gradient at the end of a trajectory, a_1 = -∇r(X_1); the certificate needs its value.
Three optional transformations, each of which defines a new reward or a new gradient:

- scale: r ← scale · r.  A temperature T is the scale 1/T.
- smoothing: r ← mean_j r(x + s ξ_j) with ``probes`` fixed antithetic Gaussian directions ξ_j, so
  that value and gradient stay those of one deterministic function.  It serves rewards that are
  rough; the published code for Stable Diffusion (soc-fine-tuning-sd) has it too.
- max_norm: caps ‖∇r‖ per sample.  The capped field is no longer the gradient of r: it keeps
  training stable where r is steep and biases the tilt there, which the certificate, computed with
  the uncapped value, will show.

Rewards add, subtract, and multiply with numbers, exactly: with g the gradient that
`value_and_gradient` returns, g(a r + b q) = a g(r) + b g(q).  So the cap of a term stays that of
the term, in proportion to its factor, whereas a temperature leaves the caps where they are.

A sum has named terms.  They are evaluated together with the gradient of their sum, so that a
training can log the mean of each term at no cost.
"""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from flows.autodiff import pullback, recording
from flows.field import Cond, check_cond

ValueFunction = Callable[[Tensor, Cond | None], Tensor]
GradientFunction = Callable[[Tensor, Cond | None], Tensor]
Info = dict[str, Tensor]
SomeReward = TypeVar("SomeReward", bound="AbstractReward")


class AbstractReward(ABC):
    """Interface of every reward, and the arithmetic that rewards share.

    A reward is also a plain function of (x, cond), its value.

    Attributes:
        name: name in logs and errors.
        max_norm: cap on the Euclidean norm of the gradient, per sample; None is none.
    """

    name: str
    max_norm: float | None

    @abstractmethod
    def value_and_info(self, x: Tensor, cond: Cond | None = None) -> tuple[Tensor, Info]:
        """Return the value (B,) at samples x (B, *), and the values (B,) of a sum's terms by name.

        The second is empty for a single reward.
        """

    @abstractmethod
    def value_and_gradient(
        self, x: Tensor, cond: Cond | None = None, *, create_graph: bool = False
    ) -> tuple[Tensor, Tensor, Info]:
        """Return the value (B,), the capped gradient (B, *), and the values of a sum's terms.

        All are detached unless ``create_graph``.

        Arguments:
            x: samples (B, *).
            cond: conditions with leading size B.
            create_graph: keep the results differentiable in x; see `flows.autodiff.pullback`.  A
                given gradient must be differentiable for that.

        Raises:
            TypeError, ValueError: as for a call; and ValueError if the value does not depend
                differentiably on x, or a given gradient has another shape than x.
        """

    @abstractmethod
    def _times(self: SomeReward, factor: float, cap_factor: float) -> SomeReward:
        """Return a copy with its scale multiplied by ``factor``, its caps by ``cap_factor``."""

    def __call__(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the value (B,) at samples x (B, *).

        Raises:
            TypeError: the value is not a floating-point tensor.
            ValueError: the value has another shape or lies on another device, or ``cond`` lacks
                a condition that the reward asks for.
        """
        return self.value_and_info(x, cond)[0]

    def terms(self, x: Tensor, cond: Cond | None = None) -> Info:
        """Return values (B,) of the terms of a sum by name; a single reward is its only term."""
        value, info = self.value_and_info(x, cond)
        return info or {self.name: value}

    def scaled(self: SomeReward, factor: float) -> SomeReward:
        """Return a copy whose scale is multiplied by ``factor``.

        Caps stay as they are: they bound the gradient that is used.
        """
        return self._times(factor, 1.0)

    def capped(self: SomeReward, max_norm: float | None) -> SomeReward:
        """Return a copy with the cap ``max_norm`` instead of its own.

        The cap of a sum bounds its total gradient, that of a decoded reward the gradient with
        respect to the latents; caps of the terms, and of the reward of the image, stay in force.
        """
        _check_cap(max_norm)
        clone = copy.copy(self)
        clone.max_norm = max_norm
        return clone

    def __mul__(self: SomeReward, factor: float) -> SomeReward:
        """Return ``factor`` times the reward; its caps are multiplied by the size of the factor."""
        if not isinstance(factor, int | float):
            return NotImplemented
        if not math.isfinite(factor):
            raise ValueError(f"a reward can be multiplied by a finite number, got {factor}")
        return self._times(factor, abs(factor))

    __rmul__ = __mul__

    def __truediv__(self: SomeReward, divisor: float) -> SomeReward:
        """Return the reward divided by a number."""
        return self * (1 / divisor)

    def __neg__(self: SomeReward) -> SomeReward:
        """Return the negative reward: samples that had a high reward are avoided."""
        return self * -1.0

    def __add__(self, other: ValueFunction) -> Sum:
        """Return the sum with another reward or plain callable; see `Sum`."""
        return Sum(self, as_reward(other)) if callable(other) else NotImplemented

    def __radd__(self: SomeReward, other: int) -> SomeReward:
        """Return the reward itself where the function ``sum`` starts with 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: ValueFunction) -> Sum:
        """Return the difference from another reward or plain callable; see `Sum`."""
        return self + -as_reward(other) if callable(other) else NotImplemented


class Reward(AbstractReward):
    """A reward made of a function, with its gradient.

    Arguments:
        value: differentiable ``r(x, cond)``; x has shape (B, *), the result has shape (B,).
        gradient: ``∇r(x, cond)`` of the shape of x where it is known in closed form or where the
            value is not differentiable; autograd otherwise.
        scale: multiplies value and gradient (1 / temperature).
        max_norm: cap on the Euclidean norm of the scaled gradient, per sample.
        smoothing: standard deviation s of the Gaussian smoothing; 0 is none.
        probes: number of smoothing directions, even.
        name: what logs and errors call it; by default the name of the function or class.

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
        name: str | None = None,
    ) -> None:
        if not callable(value):
            raise TypeError(f"reward must be a callable (x, cond) -> (B,), got {value!r}")
        try:
            called = value.forward if isinstance(value, nn.Module) else value
            if not torch.compiler.is_compiling():  # PyTorch 2.6 cannot trace it
                inspect.signature(called).bind(None, None)
        except TypeError as error:
            raise TypeError(f"reward must take two arguments (x, cond): {error}") from error
        except ValueError:  # a builtin without a signature: let the first call decide
            pass
        _check_cap(max_norm)
        if not smoothing >= 0:
            raise ValueError(f"smoothing must be at least 0, got {smoothing}")
        if probes < 2 or probes % 2:
            raise ValueError(f"probes must be an even number of at least 2, got {probes}")
        own = getattr(value, "__name__", type(value).__name__)
        self.name = name or ("reward" if own == "<lambda>" else own)
        self._value = value
        self._gradient = gradient
        self.scale = scale
        self.max_norm = max_norm
        self.smoothing = smoothing
        self.probes = probes

    def _times(self, factor: float, cap_factor: float) -> Reward:
        """Return a copy whose scale is multiplied by ``factor`` and whose cap by ``cap_factor``."""
        clone = _with_cap_times(self, cap_factor)
        clone.scale = self.scale * factor
        return clone

    def _directions(self, x: Tensor) -> Tensor:
        """Return fixed antithetic smoothing directions, shape (probes, 1, *)."""
        generator = torch.Generator().manual_seed(0)
        half = torch.randn(self.probes // 2, 1, *x.shape[1:], generator=generator)
        return torch.cat([half, -half]).to(x) * self.smoothing

    def _smoothed(self, function: ValueFunction, x: Tensor, cond: Cond | None) -> Tensor:
        """Return the mean of ``function`` over the smoothing directions, if there are any.

        Raises:
            ValueError: the function asks for a condition that is not there.
        """
        check_cond(cond, x)
        try:
            if not self.smoothing:
                return function(x, cond)
            return torch.stack([function(x + step, cond) for step in self._directions(x)]).mean(0)
        except (KeyError, TypeError, AttributeError) as error:
            absent = isinstance(error, KeyError) and not set(error.args) <= set(cond or {})
            if absent or (cond is None and "NoneType" in str(error)):
                raise ValueError(
                    f"reward {self.name!r} needs a condition that it is not given: {error}; "
                    f"cond names {sorted(cond or {})}, and a tilt draws it by cond_sampler="
                ) from error
            raise

    def value_and_info(self, x: Tensor, cond: Cond | None = None) -> tuple[Tensor, Info]:
        """Return the scaled value (B,) at samples x (B, *), and no terms."""
        value = self._smoothed(self._value, x, cond)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"reward must return a floating-point tensor, got {got}")
        if value.shape != x.shape[:1]:
            raise ValueError(
                f"reward returned shape {tuple(value.shape)} for x of shape {tuple(x.shape)}; "
                f"expected one value per sample, shape {tuple(x.shape[:1])}"
            )
        if value.device != x.device:
            raise ValueError(f"reward returned a tensor on {value.device} for x on {x.device}")
        return self.scale * value, {}

    def value_and_gradient(
        self, x: Tensor, cond: Cond | None = None, *, create_graph: bool = False
    ) -> tuple[Tensor, Tensor, Info]:
        """Return the scaled value (B,), the capped gradient, and no terms."""
        if self._gradient is not None:
            with torch.set_grad_enabled(create_graph and recording(x)):
                value = self(x, cond)
                gradient = self.scale * self._smoothed(self._gradient, x, cond)
            if gradient.shape != x.shape:
                raise ValueError(
                    f"gradient returned shape {tuple(gradient.shape)}, expected that of x, "
                    f"{tuple(x.shape)}"
                )
        else:
            value, pull = pullback(lambda x: self(x, cond), x, create_graph=create_graph)
            if pull is None:
                raise ValueError(
                    "reward is not differentiable: its value does not depend on x through "
                    "torch operations; pass gradient= or avoid detach, numpy and argmax"
                )
            gradient = pull(torch.ones_like(value))
        return value, cap_norm(gradient, self.max_norm), {}


class Sum(AbstractReward):
    """The sum of rewards, each with its own scale, smoothing, cap and gradient.

    ``max_norm`` caps the gradient of the sum.

    Arguments:
        parts: rewards; a sum among them that has no cap of its own is taken apart.
    """

    def __init__(self, *parts: AbstractReward) -> None:
        self.name = "sum"
        self.max_norm = None
        self.parts: tuple[AbstractReward, ...] = ()
        for part in parts:
            inner = part.parts if isinstance(part, Sum) and part.max_norm is None else (part,)
            self.parts += inner

    def _times(self, factor: float, cap_factor: float) -> Sum:
        """Return a copy with its terms multiplied by ``factor``, its caps by ``cap_factor``."""
        clone = _with_cap_times(self, cap_factor)
        clone.parts = tuple(part._times(factor, cap_factor) for part in self.parts)
        return clone

    def value_and_info(self, x: Tensor, cond: Cond | None = None) -> tuple[Tensor, Info]:
        """Return the sum (B,) of the terms, and the terms by name."""
        values, infos = zip(*(part.value_and_info(x, cond) for part in self.parts), strict=True)
        return _total(values), self._named(values, infos)

    def value_and_gradient(
        self, x: Tensor, cond: Cond | None = None, *, create_graph: bool = False
    ) -> tuple[Tensor, Tensor, Info]:
        """Return the sum (B,) of the terms, the capped sum of gradients, and the terms by name."""
        found = [p.value_and_gradient(x, cond, create_graph=create_graph) for p in self.parts]
        values, gradients, infos = zip(*found, strict=True)
        return (
            _total(values),
            cap_norm(_total(gradients), self.max_norm),
            self._named(values, infos),
        )

    def _named(self, values: Iterable[Tensor], infos: Iterable[Info]) -> Info:
        """Return the terms of all parts under distinct names: a name met again gets _2, _3, ..."""
        result: Info = {}
        for part, value, info in zip(self.parts, values, infos, strict=True):
            for name, term in (info or {part.name: value}).items():
                copies, unique = 1, name
                while unique in result:
                    copies += 1
                    unique = f"{name}_{copies}"
                result[unique] = term
        return result


def _total(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape."""
    first, *others = terms
    return sum(others, first)


def _with_cap_times(reward: SomeReward, factor: float) -> SomeReward:
    """Return a copy of ``reward`` whose own cap is multiplied by ``factor``."""
    clone = copy.copy(reward)
    if reward.max_norm is not None:
        clone.max_norm = reward.max_norm * factor
    return clone


def cap_norm(gradient: Tensor, max_norm: float | None) -> Tensor:
    """Return ``gradient`` (B, *) with the Euclidean norm of each sample capped."""
    if max_norm is None:
        return gradient
    flat = gradient.flatten(1)
    # Of the largest entry first: its square may overflow, and the norm be infinite.
    largest = flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
    unit = flat / largest
    norm = unit.norm(dim=1, keepdim=True).clamp_min(1.0)
    capped = torch.where(largest * norm <= max_norm, flat, unit * (max_norm / norm))
    return capped.reshape(gradient.shape)


def _check_cap(max_norm: float | None) -> None:
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be positive or None, got {max_norm}")


def as_reward(reward: ValueFunction) -> AbstractReward:
    """Return a callable (x, cond) → (B,) as a reward; a reward stays as it is."""
    return reward if isinstance(reward, AbstractReward) else Reward(reward)
