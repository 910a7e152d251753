"""No part of an update waits for the device, or sends it anything.

On the device "meta" tensors have no values, so that reading one is an error, and what is sent from
the CPU is seen as an operation on two devices.
"""

import pytest
import torch
from helpers.tiny import options
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from applications.rl.agents import AGENTS, make_agent
from applications.rl.data.replay import Batch, Replay

KERNELS = ("euler_published", "euler_consistent", "ancestral_pair", "ancestral", "moment_matched")
AGENTS_AND_KERNELS = [(name, {}) for name in AGENTS] + [
    ("qam", {"kernel": k, **o}) for k in KERNELS for o in ({}, {"kl_budget": 1.0})
]
OBS, ACT, B = 4, 2, 8


class Transfers(TorchDispatchMode):
    """Notes what moves between devices; numbers of no dimension are arguments of kernels."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = pytree.tree_leaves((args, kwargs, out))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        moves = any(name in str(func) for name in ("copy", "index"))
        if moves and len({t.device.type for t in tensors}) > 1:
            self.seen.append(str(func))
        return out


def randn(*shape):
    return torch.randn(shape, device="meta")


def ids(pair):
    return "-".join([pair[0], *map(str, pair[1].values())])


@pytest.mark.slow
@pytest.mark.parametrize("pair", AGENTS_AND_KERNELS, ids=ids)
def test_an_update(pair):
    name, changes = pair
    agent = make_agent(options(name, **changes), OBS, ACT).to("meta")
    h = agent.config.horizon
    batch = Batch(
        *(randn(B, OBS), randn(B, h, ACT)), *(randn(B), randn(B), randn(B)), randn(B, OBS)
    )
    noise = {name: randn(*shape) for name, shape in agent.noise_shapes(B).items()}
    if hasattr(agent, "kernel"):
        agent.kernel.on(torch.device("meta"))  # is sent once
    with Transfers() as transfers:
        loss, metrics = agent.loss(batch, noise)
        loss.backward()
        agent.follow(metrics)
        agent.update_targets()
    assert {m.device.type for m in metrics.values()} == {"meta"}
    assert transfers.seen == []


def test_a_batch():
    replay = Replay(50, OBS, ACT, "meta")
    replay.online, replay.position = 50, 7
    with Transfers() as transfers:
        starts = torch.randint(0, 40, (B,), device="meta")
        replay.windows(starts, horizon=3, discount=0.99)
    assert transfers.seen == []


def test_waiting_would_be_seen():
    x = randn(3)
    with pytest.raises(RuntimeError):
        bool(x.sum() > 0)
    with Transfers() as transfers:
        x + torch.tensor([1.0, 2.0, 3.0]).to(x.device)
    assert transfers.seen
