"""Weights that are not trained: what shares them, and what tells them apart."""

import copy

import pytest
import torch
from torch import nn

from flows.field import Residual, frozen
from flows.networks.mlp import MLPVelocity
from flows.weights import copy_sharing, fingerprint, frozen_weights


def network():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    module[0].requires_grad_(False)
    return module


def test_a_copy_shares_the_tensors_that_are_named_and_no_others():
    module = network()
    clone = copy_sharing(module, [module[0].weight])
    assert clone[0].weight is module[0].weight
    others = [
        (a, b)
        for a, b in zip(module.state_dict().values(), clone.state_dict().values(), strict=True)
        if a.data_ptr() != module[0].weight.data_ptr()
    ]
    assert len(others) == len(module.state_dict()) - 1
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in others)


def test_frozen_weights_have_the_names_of_the_state_dict():
    module = network()
    assert set(frozen_weights(module)) == {"0.weight", "0.bias"}
    module[2].weight = nn.Parameter(torch.ones(3, 4), requires_grad=False)
    module.tied = module[0]
    assert set(frozen_weights(module)) == {
        "0.weight",
        "0.bias",
        "2.weight",
        "tied.weight",
        "tied.bias",
    }
    assert frozen_weights(module).keys() <= module.state_dict().keys()


def dtypes(*names):
    return [getattr(torch, name) for name in names]


@pytest.mark.parametrize(
    "dtype", dtypes("float32", "float64", "bfloat16", "float16", "uint8", "int64", "complex64")
)
def test_a_fingerprint_changes_with_every_bit(dtype):
    weight = torch.arange(-6, 6).reshape(3, 4).to(dtype)
    found = fingerprint({"w": weight})
    assert found == fingerprint({"w": weight.clone().T.contiguous().T})  # not with the strides
    bits = weight.clone()
    bits.view(torch.uint8)[1, 3] ^= 1
    changed = [
        {"w": bits},
        {"v": weight},
        {"w": weight[:2]},
        {"w": weight.reshape(4, 3)},
        {"w": weight, "v": weight},
        {},
    ]
    assert len({found, *(fingerprint(weights) for weights in changed)}) == 7
    assert len(found) == 16


def test_a_fingerprint_does_not_depend_on_the_order_of_the_names():
    a, b = torch.ones(2), torch.zeros(3)
    assert fingerprint({"a": a, "b": b}) == fingerprint({"b": b, "a": a})
    assert fingerprint({"a": a.half()}) != fingerprint({"a": a.bfloat16()})


def test_a_frozen_copy_shares_what_says_that_it_is_shared_at_any_depth():
    inner = MLPVelocity(2, hidden=(4,))
    inner.shares_weights = True
    outer = Residual(lambda x, t, cond=None: x, nn.ModuleList([inner, MLPVelocity(2, hidden=(4,))]))
    before = copy.deepcopy(outer.state_dict())
    clone = frozen(outer)
    first, second = (list(module.correction[0].parameters()) for module in (outer, clone))
    assert all(a is b for a, b in zip(first, second, strict=True))
    first, second = (list(module.correction[1].parameters()) for module in (outer, clone))
    assert not any(a is b for a, b in zip(first, second, strict=True))
    assert not any(p.requires_grad for p in clone.parameters())
    assert all(p.requires_grad for p in outer.correction[1].parameters())
    again = frozen(clone)
    assert again.correction[0].last.weight is inner.last.weight
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())
