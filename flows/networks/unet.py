"""A small UNet velocity field on images, with time and, if wanted, class labels.

Each resolution has residual blocks of two convolutions; between resolutions a convolution with
stride 2 goes down and its transpose up, where a 1×1 convolution joins the skip connection:

    h_i = blocks(...),  h_{i+1} = blocks(down(h_i)),  ...,  h_i <- blocks(join(h_i, up(h_{i+1}))).

As in ``flows.networks.mlp``, time scales and shifts the middle of every block (FiLM) instead of
entering once; the embedded label of a class is added to the features of time before.  Convolutions
do not see where a pixel lies, so two more channels of the input say it; images among the conditions
are further channels.

There are no normalisation layers, which on small images cost as much as the convolutions.  So the
weights start at He's scale, which keeps the activations at the scale where SiLU bends (with
PyTorch's default they fade from layer to layer), and the second convolution of a block, whose
output is added to its input, at half of it.  Learning rates above a few 1e-3 are too high.

Classifier-free guidance also needs a velocity without a label: the label ``classes`` stands for no
label.  Train with some labels replaced by it, and guide by
``Guided(field, weight, {"label": torch.tensor([classes])})``.

Sources: Ronneberger et al., "U-Net" (arXiv 1505.04597); Liu et al., "CoordConv" (arXiv 1807.03247);
He et al., "Delving deep into rectifiers" (arXiv 1502.01852), eq. 10.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from flows.autodiff import transforming
from flows.field import Cond
from flows.networks.mlp import TimeEmbedding


class Block(nn.Module):
    """A residual block h + conv(SiLU((1 + a) conv(SiLU(h)) + b)), modulated by an embedding.

    The scale a and the shift b are linear in the embedding.

    Arguments:
        channels: channels of the images (B, channels, H, W).
        embedding: size of the embedding (1 or B, embedding).
    """

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * channels)
        set_scale(self.first)
        set_scale(self.second, 0.5)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Return images of the shape of ``h``."""
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        z = torch.addcmul(shift, self.first(functional.silu(h)), 1 + scale)
        return h + self.second(functional.silu(z))


class UNetVelocity(nn.Module):
    """A convolutional UNet v(x, t, cond) on images x of shape (B, channels, H, W).

    Arguments:
        channels: channels of the image.
        widths: channels of the network at each resolution, the finest first; H and W are halved
            between two of them.
        blocks: residual blocks at each resolution, on the way down and again on the way up.
        classes: number of classes; ``cond["label"]`` must be (B,) integers, 0 to ``classes``, the
            last of which stands for no label.  Their range is checked on a CPU, outside of compiled
            functions and transforms; on a GPU the check would have to wait, and a label out of
            range fails an assertion of CUDA.  0 makes a network without labels.
        images: name and channels of each image among the conditions; ``cond[name]`` must be
            (B, channels, H, W).
        time_dim: size of the embedding of time and label, even.
        zero_init: start with v = 0 everywhere, as a correction to a base should.

    Raises:
        ValueError: a number is out of range, or ``widths`` is empty.
    """

    def __init__(
        self,
        channels: int,
        *,
        widths: Sequence[int] = (32, 64),
        blocks: int = 1,
        classes: int = 0,
        images: Mapping[str, int] | None = None,
        time_dim: int = 32,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.images = dict(images or {})
        if min(self.images.values(), default=1) < 1 or "label" in self.images:
            raise ValueError(
                "images must have at least one channel each, and none be called 'label', "
                f"got {self.images}"
            )
        if not widths or min(channels, blocks, *widths) < 1 or classes < 0:
            raise ValueError(
                "channels, blocks and widths must be positive, widths not empty and classes at "
                f"least 0, got channels={channels}, blocks={blocks}, widths={tuple(widths)}, "
                f"classes={classes}"
            )
        self.channels, self.classes, self.factor = channels, classes, 2 ** (len(widths) - 1)

        def level(width: int) -> nn.ModuleList:
            return nn.ModuleList(Block(width, time_dim) for _ in range(blocks))

        self.time = TimeEmbedding(time_dim)
        self.embed = nn.Linear(time_dim, time_dim)
        if classes:
            self.label = nn.Embedding(classes + 1, time_dim)
        pairs = list(itertools.pairwise(widths))
        inputs = channels + sum(self.images.values()) + 2
        self.stem = nn.Conv2d(inputs, widths[0], 3, padding=1)
        self.before = nn.ModuleList(level(width) for width in widths)
        self.down = nn.ModuleList(nn.Conv2d(m, n, 2, stride=2) for m, n in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(n, m, 2, stride=2) for m, n in pairs)
        self.join = nn.ModuleList(nn.Conv2d(2 * m, m, 1) for m, _ in pairs)
        self.after = nn.ModuleList(level(m) for m, _ in pairs)
        self.last = nn.Conv2d(widths[0], channels, 3, padding=1)
        for layer in (self.stem, *self.down, *self.up, *self.join):
            set_scale(layer)
        if zero_init:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(cast(Tensor, self.last.bias))

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the velocity at ``x`` and ``t`` (scalar or (B,)), of the shape of ``x``.

        Raises:
            TypeError: the labels are not integers.
            ValueError: ``x`` has another number of channels, or a height or width that cannot be
                halved often enough; ``t`` is neither scalar nor (B,); a condition is missing or
                unknown, the labels are not (B,) or out of range, or an image has another shape.
        """
        if x.ndim != 4 or x.shape[1] != self.channels or any(n % self.factor for n in x.shape[2:]):
            raise ValueError(
                f"x must have shape (B, {self.channels}, H, W) with H and W multiples of "
                f"{self.factor}, got {tuple(x.shape)}"
            )
        e = self._embedding(x, t, cond or {})
        # Convolutions of few channels are faster with channels innermost.
        h = torch.cat([x, *self._shown(x, cond or {}), position(x)], dim=1)
        h = h.contiguous(memory_format=torch.channels_last)
        h = self.stem(h)
        h = apply(self.before[0], h, e)
        skips = []
        for down, blocks in zip(self.down, self.before[1:], strict=True):
            skips.append(h)
            h = apply(blocks, down(h), e)
        ways = list(zip(self.up, self.join, self.after, strict=True))
        for up, join, blocks in reversed(ways):
            h = apply(blocks, join(torch.cat([skips.pop(), up(h)], dim=1)), e)
        return self.last(functional.silu(h)).contiguous()

    def _embedding(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return features of time and label, (1 or B, time_dim)."""
        batch = x.shape[0]
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        if t.numel() != 1 and t.shape != (batch,):
            raise ValueError(f"t must be a scalar or ({batch},), got shape {tuple(t.shape)}")
        names = sorted([*self.images, *(["label"] if self.classes else [])])
        if sorted(cond) != names:
            raise ValueError(f"cond must name {names}, got {sorted(cond)}")
        e = self.embed(self.time(t.reshape(-1)))
        if self.classes:
            e = e + self.label(self._labels(cond["label"], batch))
        return functional.silu(e)

    def _labels(self, label: Tensor, batch: int) -> Tensor:
        """Return the labels as int64, with a check of their range where that needs no waiting."""
        if label.shape != (batch,):
            raise ValueError(f"cond['label'] must have shape ({batch},), got {tuple(label.shape)}")
        if label.is_floating_point() or label.is_complex():
            raise TypeError(f"cond['label'] must be integers, got {label.dtype}")
        if label.device.type == "cpu" and not transforming():
            wrong = label[(label < 0) | (label > self.classes)]
            if len(wrong):
                raise ValueError(
                    f"cond['label'] must be from 0 to {self.classes}, got {wrong[0].item()}"
                )
        return label.long()

    def _shown(self, x: Tensor, cond: Cond) -> list[Tensor]:
        """Return the images among the conditions, in their order and in the dtype of ``x``."""
        for name, channels in self.images.items():
            shape = (x.shape[0], channels, *x.shape[2:])
            if cond[name].shape != shape:
                raise ValueError(
                    f"cond[{name!r}] must have shape {shape}, got {tuple(cond[name].shape)}"
                )
        return [cond[name].to(x.dtype) for name in self.images]


def set_scale(layer: nn.Module, factor: float = 1.0) -> None:
    """Draw He's initial weights times ``factor`` for a convolution or a transposed one.

    An output of a transposed convolution of size and stride 2 is a sum over channels only.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    inputs = len(weight) if isinstance(layer, nn.ConvTranspose2d) else weight[0].numel()
    nn.init.normal_(weight, std=factor * math.sqrt(2 / inputs))


def position(x: Tensor) -> Tensor:
    """Return the row and column in [-1, 1] of each pixel of ``x`` (B, C, H, W), (B, 2, H, W)."""
    axes = [torch.linspace(-1, 1, n, dtype=x.dtype, device=x.device) for n in x.shape[2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(len(x), -1, -1, -1)


def apply(blocks: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
    """Apply the blocks of one level to ``h``."""
    for block in blocks:  # type: ignore[attr-defined]
        h = block(h, embedding)
    return h
