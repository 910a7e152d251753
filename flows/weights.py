"""Weights that are not trained: shared by copies, left out of checkpoints, known by a fingerprint.

A large model is tilted by training a few weights beside many that stay as they are.  Copies of the
module (the average of a trainer, the base of a low-rank tilt) then hold the tensors that stay
themselves, and a checkpoint need not repeat what the caller has in any case, so long as a resume
with other weights is refused.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def copy_sharing(module: Module, shared: Iterable[Tensor]) -> Module:
    """A deep copy of ``module`` in which the tensors ``shared`` are those of ``module`` itself."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def frozen_weights(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of ``module`` that require no gradient, under the names of its state dict."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: parameter.detach() for name, parameter in named if not parameter.requires_grad}


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits that tell weights apart, the same on every device.

    A digest of the names, shapes and dtypes, and of the sum modulo 2⁶⁴ of each tensor's bits read
    as integers: one pass over the weights.  Entries that change places within a tensor go unseen.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].detach()
        real = torch.view_as_real(weight) if weight.is_complex() else weight
        bits = real.flatten().view(INTEGERS[real.element_size()]).sum(dtype=torch.int64)
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {int(bits)}\n".encode())
    return digest.hexdigest()[:16]
