"""Frozen weights: copies share them, checkpoints leave them out, a fingerprint identifies them.

A large model is tilted by training a few weights beside many that stay as they are.  Copies of the
module (the average of a trainer, the base of a low-rank tilt) then share the frozen tensors, and a
checkpoint need not repeat weights that the caller has in any case, so long as a resume with other
weights is refused.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

HOOKS = {
    "_diffusers_hook": "diffusers (layerwise casting or group offloading)",
    "_hf_hook": "accelerate (cpu offloading)",
}
"""Attributes of modules with hooks, and what makes them."""

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def copy_sharing(module: Module, shared: Iterable[Tensor]) -> Module:
    """Return a deep copy of ``module`` that shares the tensors ``shared`` with it.

    Raises:
        ValueError: a part of it has hooks of diffusers or accelerate, which do not survive a copy.
    """
    refuse_hooks(module)
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def refuse_hooks(module: nn.Module) -> None:
    """Refuse a module whose layers are cast or moved by hooks: a copy's hooks act on the original.

    Raises:
        ValueError: naming the part and the hooks.
    """
    for name, part in module.named_modules():
        for attribute, maker in HOOKS.items():
            hook = getattr(part, attribute, None)
            if hook is not None and getattr(hook, "hooks", True):  # a registry may be empty
                raise ValueError(
                    f"the part {name or type(part).__name__!r} has hooks of {maker}, which do not "
                    "survive the copy that a tilt makes: remove them, and give the module on its "
                    "device and in the dtype to compute in"
                )


def frozen_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that require no gradient, under their names in the state dict."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: parameter.detach() for name, parameter in named if not parameter.requires_grad}


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return 16 hexadecimal digits that identify weights, equal on every device.

    They are a digest of the names, shapes and dtypes, and of the sum modulo 2⁶⁴ of each tensor's
    bits read as integers: one pass over the weights.  Entries that change places within a tensor
    are not noticed.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].detach()
        real = torch.view_as_real(weight) if weight.is_complex() else weight
        bits = real.flatten().view(INTEGERS[real.element_size()]).sum(dtype=torch.int64)
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {int(bits)}\n".encode())
    return digest.hexdigest()[:16]
