"""Rewards of decoded samples: r(decode(x / scale + shift)) for a flow on latents x.

A latent flow has its data x = (z - shift) · scale, with z what an autoencoder's decoder expects
(Rombach et al., "High-resolution image synthesis with latent diffusion models", arXiv 2112.10752),
while the reward looks at the image y = decode(z).  By the chain rule ∇_x r = Jᵀ ∇_y r with
J = ∂y/∂x, one vector-Jacobian product of the decoder.  ∇_y r is whatever the reward gives, so that
a gradient of its own, smoothing and cap of the reward act on images, and a reward that is not
differentiable serves as well if it gives its gradient.

Memory.  A decoder's activations are many times its input.  Three things bound them:
- the decoder is evaluated again for its product (`torch.utils.checkpoint`) and keeps nothing while
  the reward is evaluated: the peak is the larger of the two and not the sum;
- the samples of a batch can be taken in chunks, and the peak is that of one chunk;
- the decoder's parameters are constants, so that nothing is kept for their gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from adjoint.micro_batches import chunks, rows_of
from adjoint.rewards.reward import AbstractReward, Info, ValueFunction, as_reward, cap_norm
from flows.autodiff import pullback, transforming
from flows.field import Cond, check_cond


def decoded(
    reward: ValueFunction,
    decoder: Callable[[Tensor], Any] | Any,
    *,
    scale: float | Tensor | None = None,
    shift: float | Tensor | None = None,
    dtype: torch.dtype | None = None,
    chunk: int = 0,
    recompute: bool = True,
) -> Decoded:
    """Return the reward r(decode(x / scale + shift), cond) of latents x.

    Arguments:
        reward: of images (B, *), callable or `Reward`; its smoothing and cap act on images.
        decoder: differentiable callable z (B, *) -> images (B, *), or an autoencoder with a method
            ``decode``, such as those of diffusers.  A result with a field ``sample`` stands for
            that field.  It is shared, not copied; put it in evaluation mode.
        scale, shift: numbers, vectors with an entry a channel (the second dimension of x), or
            tensors that broadcast against x.  By default 1 and 0, and for an autoencoder what its
            ``config`` names: scaling_factor and shift_factor, or where it has moments of the
            latents by channel, scaling_factor / latents_std and latents_mean.
        dtype: in which the decoder computes; by default that of its parameters.  Images are handed
            to the reward in the dtype of x.
        chunk: samples that are decoded and evaluated at a time; 0 is all.
        recompute: evaluate the decoder twice instead of keeping its activations.

    Raises:
        TypeError: the decoder is neither callable nor has a method ``decode``.
        ValueError: a number is out of range, or an autoencoder's config names no factor.

    Example:
        >>> image = decoded(lambda y, cond: y.mean((1, 2)), nn.Upsample(scale_factor=2))
        >>> image(torch.ones(3, 1, 4))
        tensor([1., 1., 1.])
    """
    if chunk < 0:
        raise ValueError(f"chunk must be at least 0, got {chunk}")
    decode = _Decode(decoder, scale, shift, dtype)
    return Decoded(as_reward(reward), decode, chunk=chunk, recompute=recompute)


class Decoded(AbstractReward):
    """A reward of decoded samples; made by `decoded`."""

    def __init__(
        self, reward: AbstractReward, decode: _Decode, *, chunk: int, recompute: bool
    ) -> None:
        self.name = reward.name
        self.max_norm = None
        self.reward = reward
        self.decode = decode
        self.chunk = chunk
        self.recompute = recompute

    def _times(self, factor: float, cap_factor: float) -> Decoded:
        """Return a copy with its reward multiplied by ``factor``, its caps by ``cap_factor``."""
        clone = copy.copy(self)
        clone.reward = self.reward._times(factor, cap_factor)
        if self.max_norm is not None:
            clone.max_norm = self.max_norm * cap_factor
        return clone

    def value_and_info(self, x: Tensor, cond: Cond | None = None) -> tuple[Tensor, Info]:
        """Return the value (B,) at latents x (B, *), and the terms of the reward by name.

        Where gradients are recorded, each chunk keeps its latents only.
        """

        def evaluate(x: Tensor, cond: Cond | None) -> tuple[Tensor, Info]:
            return self.reward.value_and_info(self._images(x), cond)

        check_cond(cond, x)
        rows = chunks(len(x), self.chunk)
        parts = [self._kept(evaluate, x[i], rows_of(cond, i)) for i in rows]
        values, infos = zip(*parts, strict=True)
        return torch.cat(values), _concatenated(infos)

    def value_and_gradient(
        self, x: Tensor, cond: Cond | None = None, *, create_graph: bool = False
    ) -> tuple[Tensor, Tensor, Info]:
        """Return the value (B,), the capped gradient in the latents, and the terms.

        Raises:
            TypeError, ValueError: as for the reward itself; and ValueError if the images do not
                depend differentiably on the latents.
        """
        check_cond(cond, x)
        values, gradients, infos = [], [], []
        for i in chunks(len(x), self.chunk):
            image, pull = pullback(
                lambda z: self._kept(self._images, z), x[i], create_graph=create_graph
            )
            if pull is None:
                raise ValueError(
                    "decoder is not differentiable: its images do not depend on the latents "
                    "through torch operations; avoid no_grad, detach and numpy in it"
                )
            value, gradient, info = self.reward.value_and_gradient(
                image, rows_of(cond, i), create_graph=create_graph
            )
            values.append(value)
            gradients.append(pull(gradient.to(image.dtype)))
            infos.append(info)
        gradient = cap_norm(torch.cat(gradients), self.max_norm)
        return torch.cat(values), gradient, _concatenated(infos)

    def _images(self, x: Tensor) -> Tensor:
        """Return images in the dtype of x, with the decoder's parameters as constants."""
        constants = {name: p.detach() for name, p in self.decode.named_parameters()}
        return functional_call(self.decode, constants, (x,))

    def _kept(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Return the function's result, keeping its inputs instead of its activations.

        Transforms of `torch.func` know no checkpoints: there the activations are kept.
        """
        if self.recompute and torch.is_grad_enabled() and not transforming():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)


class _Decode(nn.Module):
    """The map x ↦ decode(x / scale + shift), computed in ``dtype``; arguments as for `decoded`."""

    def __init__(
        self,
        decoder: Any,
        scale: float | Tensor | None,
        shift: float | Tensor | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        function = getattr(decoder, "decode", decoder)
        if not callable(function):
            raise TypeError(
                f"decoder must be callable or have a method decode, got {type(decoder).__name__}"
            )
        if function is not decoder:
            known = _factors(decoder, needed=scale is None)
            scale = known[0] if scale is None else scale
            shift = known[1] if shift is None else shift
        self.scale = 1.0 if scale is None else scale
        self.shift = 0.0 if shift is None else shift
        size = torch.as_tensor(self.scale).abs()
        if not bool(((size > 0) & size.isfinite()).all()):
            raise ValueError(f"scale must be finite and not 0, got {self.scale}")
        self.function = function
        # A bound method hides its parameters, unless the module that it is bound to is registered.
        self.owner = getattr(function, "__self__", None)
        floating = [p.dtype for p in self.parameters() if p.is_floating_point()]
        self.dtype = dtype or (floating[0] if floating else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return images (B, *) in the dtype of x for latents x (B, *).

        Raises:
            TypeError: the decoder returns no floating-point tensor.
            ValueError: it returns another number of images than there are latents.
        """
        z = x / _aligned(self.scale, x) + _aligned(self.shift, x)
        images = self.function(z if self.dtype is None else z.to(self.dtype))
        images = getattr(images, "sample", images)
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"decoder must return a floating-point tensor, got {got}")
        if images.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"decoder returned shape {tuple(images.shape)} for latents of shape "
                f"{tuple(x.shape)}; expected leading size {x.shape[0]}"
            )
        return images.to(x.dtype)


def _concatenated(parts: Sequence[Info]) -> Info:
    """Return the terms of the batch from the terms of its chunks."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _aligned(value: float | Tensor, x: Tensor) -> Tensor:
    """Return ``value`` in the dtype and device of x, a vector along its second dimension."""
    value = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    return value.reshape(-1, *([1] * (x.ndim - 2))) if value.ndim == 1 else value


def _factors(autoencoder: Any, *, needed: bool) -> tuple[float | Tensor | None, ...]:
    """Return scale and shift from the autoencoder's config, None where it names none."""
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    config = getattr(autoencoder, "config", None)
    factor, shift, mean, std = (getattr(config, name, None) for name in names)
    if mean is not None and std is not None:
        return (factor or 1.0) / torch.tensor(std), torch.tensor(mean)
    if needed and factor is None:
        raise ValueError(
            f"scale must be given: the config of {type(autoencoder).__name__} names neither "
            "scaling_factor nor latents_mean and latents_std"
        )
    return factor, shift
