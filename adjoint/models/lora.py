r"""Low-rank adapters: tilt a large model by training a few weights beside its own.

LoRA (Hu et al. 2106.09685) adds to the weight W of a layer a product of two thin matrices,

    W + (alpha / rank) B A,     A (rank, in) random,  B (out, rank) zero at the start,

and trains A and B only; for a convolution A is one of its own shape with ``rank`` outputs and B one
of size 1.  With B = 0 the model starts at its base exactly.  The layers are those of the package
peft (extra ``lora``).

One copy of the weights.  Model and base are two copies of the structure of one field, not of its
weights: both hold the parameters of the field itself, and only the model has adapters.  So the base
never sees them, whatever is in training, in a backward pass, or recomputed in one (gradient
checkpointing), which switching adapters off and on again could not promise.

    model, base = lora(field, rank=16, targets=("to_q", "to_v"))
    tilted = tilt(base, reward, shape=..., model=model)
    field.load_state_dict(merge(tilted.field), assign=True)  # for the field's own pipeline

``assign`` gives the field new weights; without it they would be written over those that it shares
with the base and the tilted field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from flows.field import Cond
from flows.pretrained.adapter import Pretrained
from flows.pretrained.convention import is_class
from flows.training.checkpoint import CheckpointError, replacing
from flows.weights import copy_sharing

ADAPTER = "default"
"""What peft calls the only adapter."""

UNETS = ("UNet2DConditionModel", "UNet2DModel", "UNet3DConditionModel", "UNetMotionModel")
"""Classes of diffusers that are the ``unet`` of a pipeline; others are its ``transformer``."""

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that can be adapted."""


class SharedBase(nn.Module):
    """A field in evaluation mode, whose copies share its parameters.

    Arguments:
        field: velocity field; its parameters stop requiring gradients.
    """

    shares_weights = True  # see `flows.field.frozen`

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> SharedBase:
        """Keep the field in evaluation mode."""
        return super().train(False)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the velocity of the field, of the shape of ``x``."""
        return self.field(x, t, cond)


def lora(
    field: nn.Module,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[nn.Module, SharedBase]:
    """Return the field with adapters, to be trained, and the field without, as the base.

    Both share the parameters of ``field``, which stop requiring gradients; buffers are copied.
    Move the field to its device before.  Adapters of weights in half precision are in float32.

    Arguments:
        field: velocity field, a module.
        rank: of the adapters.
        alpha: the product B A is multiplied by alpha / rank; alpha is the rank if None.
        targets: names of the layers to adapt, or the ends of their names after a dot ("to_q" for
            "blocks.0.attn.to_q"); every linear layer and ungrouped convolution if None.
        dropout: probability with which an input of A is dropped while training.
        seed: of A.

    Raises:
        ImportError: peft is not installed.
        TypeError: ``field`` is not a module.
        ValueError: an option out of range; a target that names no layer, or one that cannot be
            adapted; a field without layers to adapt, or with adapters already.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "low-rank adapters need the package peft: pip install 'adjoint-matching[lora]'"
        ) from error
    if not isinstance(field, nn.Module):
        raise TypeError(f"field must be a module, got {type(field).__name__}")
    present = sorted({name for layer in _adapters(field).values() for name in layer.scaling})
    if present:
        raise ValueError(
            f"field must have no adapters, got {present}: fold them in first, by merge, or in a "
            "pipeline by pipe.fuse_lora(); pipe.unload_lora_weights()"
        )
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    alpha = float(rank) if alpha is None else alpha
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    names = _find_layers(field, targets)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),  # any number serves
        lora_dropout=dropout,
        target_modules="|".join(re.escape(name) for name in names),
    )
    base = SharedBase(copy_sharing(field, field.parameters()))
    model = copy_sharing(field, field.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for weight in _weights(model)[0].values():
        weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))
    return model, base


def _find_layers(field: nn.Module, targets: Sequence[str] | None = None) -> list[str]:
    """Return the full names of the layers of ``field`` that ``targets`` mean; see `lora`.

    Raises:
        ValueError: see `lora`.
    """
    modules = dict(field.named_modules())
    # nn.MultiheadAttention reads the weights of its layer out_proj and never calls it, and in
    # evaluation mode nn.TransformerEncoderLayer does so with its two linear layers.
    readers = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    unused = tuple(f"{n}." for n, m in modules.items() if isinstance(m, readers))
    layers = {
        name: layer
        for name, layer in modules.items()
        if isinstance(layer, LAYERS) and getattr(layer, "groups", 1) == 1
        if name and not (unused and name.startswith(unused))
    }
    if not layers:
        raise ValueError("field has no linear layer or ungrouped convolution to adapt")
    if targets is None:
        return list(layers)
    ends = {t: [n for n in modules if n == t or n.endswith(f".{t}")] for t in targets}
    unknown = [target for target, found in ends.items() if not found]
    if unknown or not ends:
        known = sorted({name.rsplit(".", 1)[-1] for name in layers})
        raise ValueError(
            f"targets must name layers of field, got {unknown or 'none'}; ends of names: {known}"
        )
    other = sorted({name for found in ends.values() for name in found} - layers.keys())
    if other:
        kind = type(modules[other[0]]).__name__
        raise ValueError(
            "targets must name linear layers or ungrouped convolutions that are called as such, "
            f"got {other[0]!r}, a {kind}"
        )
    return [name for name in layers if any(name in found for found in ends.values())]


def adapter_scales(model: nn.Module) -> str | None:
    """Return the factors alpha / rank of the adapters as text; None if there are none."""
    scales = sorted({float(s) for m in _adapters(model).values() for s in m.scaling.values()})
    return ", ".join(map(repr, scales)) or None


def merge(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the field with its adapters folded in, W + (alpha / rank) B A.

    For ``load_state_dict(..., assign=True)`` of the field given to `lora`, in its own precision.
    The model is left as it is; tensors that no adapter changes are shared with it.

    Raises:
        ValueError: ``model`` has no adapters.
    """
    layers, merged = _adapters(model), {}
    if not layers:
        raise ValueError("model has no adapters to merge")
    for name, value in model.state_dict().items():
        owner, _, rest = name.rpartition(".base_layer.")
        if owner in layers:
            adapters = layers[owner].active_adapters if rest == "weight" else ()
            change = sum(layers[owner].get_delta_weight(name).detach() for name in adapters)
            merged[f"{owner}.{rest}"] = (value + change).to(value.dtype)
        elif not any(name.startswith(f"{layer}.lora_") for layer in layers):
            merged[name] = value
    return merged


def save_adapters(model: nn.Module, path: str | Path) -> None:
    """Write the adapters of ``model`` to a safetensors file, atomically.

    Names are those of peft's own files, with the scale alpha / rank of each layer in the metadata.
    Of a network of diffusers, or a field made of one, it is a file that its pipeline reads by
    ``pipe.load_lora_weights``: names begin with the network's place in the pipeline, and the
    matrices B are multiplied by the scale, which diffusers takes to be 1.

    Raises:
        ValueError: ``model`` has no adapters.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    weights, scales, prefix = _file_layout(model)
    plain = {}
    for name, weight in weights.items():
        factor = _folded_scale(name, scales) if prefix else 1.0
        plain[prefix + name] = (factor * weight.detach().cpu()).contiguous()
    with replacing(path, "path") as file:
        file.write(save(plain, metadata={"format": "pt", **scales}))


def load_adapters(model: nn.Module, path: str | Path) -> None:
    """Read the file of `save_adapters` into the adapters of ``model``, in place.

    Raises:
        CheckpointError: the file is damaged, or its layers, ranks, shapes or scales are not those
            of the model; the model is left as it is.
        FileNotFoundError: there is no such file.
        ValueError: ``model`` has no adapters.
    """
    from safetensors import SafetensorError, safe_open

    weights, scales, prefix = _file_layout(model)
    try:
        with safe_open(str(path), framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
    expected = {name: tuple(weight.shape) for name, weight in weights.items()} | scales
    found = {name.removeprefix(prefix): weight for name, weight in found.items()}
    given = {name: tuple(weight.shape) for name, weight in found.items()}
    given |= {name: value for name, value in metadata.items() if name != "format"}
    for name in sorted({*expected, *given}):
        if given.get(name) != expected.get(name):
            raise CheckpointError(
                f"{path} does not fit the adapters of the model: {name} is "
                f"{given.get(name, 'absent')} in the file, expected {expected.get(name, 'absent')}"
            )
    with torch.no_grad():
        for name, weight in weights.items():
            factor = _folded_scale(name, scales) if prefix else 1.0
            weight.copy_(found[name] / factor)


def prepare_dropout(model: nn.Module) -> None:
    """Put ``model`` into evaluation mode but for the dropout of adapters that are trained."""
    model.eval()
    for layer in _adapters(model).values():
        if hasattr(layer, "lora_dropout") and any(p.requires_grad for p in layer.parameters()):
            layer.lora_dropout.train()


def _adapters(model: nn.Module) -> dict[str, Any]:
    """Return the layers of ``model`` with an adapter, by name."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "get_delta_weight")}


def _file_layout(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Return weights and scales, see `_weights`, and the place of the network in its pipeline.

    The place is "transformer." or "unet." for a network of diffusers, else "".
    """
    network = model.network if isinstance(model, Pretrained) else model
    weights, scales = _weights(network)
    if not is_class(network, ("ModelMixin",), "diffusers"):
        return (*_weights(model), "")
    return weights, scales, "unet." if is_class(network, UNETS) else "transformer."


def _folded_scale(name: str, scales: dict[str, str]) -> float:
    """Return the factor of the weight ``name`` in a file: the scale of its layer for matrices B."""
    layer, _, part = name.rpartition(".lora_")
    return float(scales[f"{layer}.scale"]) if part.startswith("B") else 1.0


def _weights(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the weights of the adapters and, as text, the scale of each layer, by name.

    Raises:
        ValueError: ``model`` has no adapters.
    """
    layers = _adapters(model)
    if not layers:
        raise ValueError("model has no adapters; make them by lora")
    weights = {
        f"{name}.{part}.weight": getattr(layer, part)[ADAPTER].weight
        for name, layer in layers.items()
        for part in ("lora_A", "lora_B")
    }
    scales = {f"{name}.scale": repr(float(m.scaling[ADAPTER])) for name, m in layers.items()}
    return weights, scales
