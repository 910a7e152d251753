r"""Several processes train one model: communication by ``torch.distributed``.

``torchrun`` starts the same program in every process, and code written for one process then trains
in all of them together: a total (trajectories an update, samples of a certificate) is split into
equal shares, each process draws its share from a generator of its own, gradients and metrics are
averaged, and what needs the whole batch gets it by `gather`.  With the loss of a share l_r(θ),

    ∇ (1/R) Σ_r l_r  =  (1/R) Σ_r ∇ l_r,        r = 0, ..., R - 1,

so that R processes take the step that one takes with the joined batch, up to rounding.  In one
process every function here returns what it was given.

Why not DistributedDataParallel.  It averages gradients in hooks that its own forward pass arms, so
that a loss is right only if it calls the wrapper, and never the field inside it or a part of that:
otherwise gradients stay those of one process, without a word.  It also sends buffers at each of the
K evaluations of a rollout, averages at every one of ``accumulate`` losses, stops where a parameter
has no gradient, and renames weights and hides the methods of the field.  (Evaluations that are
repeated in the backward pass it does bear.)  Here gradients are averaged once an update, after the
backward pass, in flat buckets; what is lost is that communication does not overlap with
computation.  A wrapped module is unwrapped, and the wrapper's hooks then stay silent.

Sharded modules.  ``fully_shard`` (FSDP2) makes parameters DTensors and averages their gradients by
itself.  `whole` and `sharded_like` convert between them and plain tensors one at a time, so that a
checkpoint is the same file however many processes wrote it.  (``torch.distributed.checkpoint``
renames the state of the optimiser, and so would make it another.)
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flows.training.sharding import is_sharded

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others, where this module started the group."""

BUCKET = 2**26
"""Bytes of gradients sent at once, of which a copy is made."""


class ProcessLost(RuntimeError):  # noqa: N818  (it names the event, as TrainingDiverged does)
    """Another process has ended, or did not come to the same point within the time limit."""


def start() -> None:
    """Join the processes of ``torchrun``, if it started this one and the group does not exist yet.

    Each process gets the GPU of its number on the machine, which is "cuda" from then on.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()) or dist.is_initialized():
        return
    if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():  # else a job on CPUs
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(timeout=TIMEOUT)
    atexit.register(leave)


def leave() -> None:
    """Leave the group of processes, except after an error, when leaving could wait forever.

    Before PyTorch 2.8 this joins the threads of gloo without giving up Python's lock, for which the
    last of them may wait to free what it sent: so they are given time for that first.
    """
    if dist.is_initialized() and not hasattr(sys, "last_value"):
        time.sleep(0.1)
        dist.destroy_process_group()


def size() -> int:
    """Return the number of processes; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process; process 0 writes the files."""
    return dist.get_rank() if size() > 1 else 0


def share(total: int) -> int:
    """Return the samples that each process takes of ``total``, rounded up to equal shares."""
    return -(-total // size())


def seed_of(seed: int, *more: int) -> int:
    """Return the seed of this process, which is ``seed`` itself in the first process.

    In the others, and where ``more`` numbers are given, it is a digest of all of them, so that
    neither neighbouring processes nor neighbouring seeds share a stream.
    """
    if not rank() and not more:
        return seed
    digest = hashlib.sha256(repr((seed, rank(), *more)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # a positive int64


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside ``DistributedDataParallel``, if it is wrapped."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


# --- communication: every process must call these, in the same order -----------------------------


@torch.no_grad()
def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with their values in the first process; shards are left alone."""
    if size() == 1:
        return
    for tensor in tensors:
        if not is_sharded(tensor) and tensor.numel():
            sent = tensor.detach().contiguous().flatten().view(torch.uint8)
            sent = sent.to(_carrier(tensor))
            with _together("sending weights"):
                dist.broadcast(sent, src=0)
            tensor.copy_(sent.to(tensor.device).view(tensor.dtype).reshape(tensor.shape))


@torch.no_grad()
def average_(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors, of equal shapes everywhere, with their means over the processes."""
    if size() == 1:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in bucket]).to(_carrier(bucket[0]))
        with _together("averaging gradients or metrics"):
            dist.all_reduce(flat.div_(size()))
        parts = flat.to(bucket[0].device).split([tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Average the gradients of plain parameters over the processes; shards are averaged already.

    A parameter that has a gradient in some processes only counts as zero in the others.
    """
    plain = [parameter for parameter in parameters if not is_sharded(parameter)]
    if size() == 1 or not plain:
        return
    found = torch.tensor([float(parameter.grad is not None) for parameter in plain])
    average_([found])
    used = [p for p, anywhere in zip(plain, found.tolist(), strict=True) if anywhere]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    average_([parameter.grad for parameter in used if parameter.grad is not None])


def gather(part: Tensor) -> Tensor:
    """Join the parts (n, *) of all processes to a tensor (R n, *), in order.

    If ``part`` has a gradient, so has its place in the result, times R: a loss that every process
    computes of the joined tensor has, averaged over them, the gradient in all parts.
    """
    if size() == 1:
        return part
    sent = part.detach().to(_carrier(part)).contiguous()
    received = [torch.empty_like(sent) for _ in range(size())]
    with _together("joining a batch"):
        dist.all_gather(received, sent)
    parts = [other.to(part.device) for other in received]
    if part.requires_grad:
        parts[rank()] = part.detach() + size() * (part - part.detach())
    return torch.cat(parts)


def own(joined: Tensor) -> Tensor:
    """Return the part of this process of a joined tensor (R n, *)."""
    return joined.chunk(size())[rank()]


def to_first(value: T) -> list[T]:
    """Return the values of all processes in the first one, and an empty list in the others."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size() if rank() == 0 else []
    with _together("collecting the states of the processes"):
        dist.gather_object(value, values or None, dst=0)
    return values


def first_of(value: str | None) -> str | None:
    """Return the first string that a process has, in all processes; None where none has one."""
    if size() == 1:
        return value
    average_([found := torch.tensor([float(value is not None)])])
    if not found:
        return None
    values: list[str | None] = [None] * size()
    with _together("agreeing to stop"):
        dist.all_gather_object(values, value)
    return next(value for value in values if value is not None)


def from_first(function: Callable[[], T]) -> T:
    """Call ``function`` in the first process; return its result, or raise its error, in all."""
    if size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:  # all processes must hear of it, or they would wait in vain
            outcome[1] = error
    with _together("waiting for the first process"):
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


# --- modules sharded by fully_shard --------------------------------------------------------------


def whole(value: Any) -> Any:
    """Join the shards in nested dicts on the CPU of the first process; others get empty tensors."""
    if isinstance(value, dict):
        made = {key: whole(item) for key, item in value.items()}
        return made if any(made[key] is not item for key, item in value.items()) else value
    if not is_sharded(value):
        return value
    with _together("joining shards"):
        full = value.detach().full_tensor()
    return full.cpu() if rank() == 0 else full.new_empty(0)


def sharded_like(full: Tensor, target: Tensor) -> Tensor:
    """Distribute the tensor ``full``, which all processes hold, as ``target`` is distributed."""
    if not is_sharded(target) or full.ndim == 0:
        return full
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
    with _together("distributing shards"):
        return distribute_tensor(full.to(target.device), mesh, placements)


def load_whole(
    module: nn.Module, weights: Mapping[str, Tensor], kept: Mapping[str, Tensor]
) -> None:
    """Load a state dict of whole tensors into a module; the entries ``kept`` stay as they are."""
    if is_sharded(module):
        targets = module.state_dict()
        weights = {
            n: sharded_like(w, targets[n]) if n in targets else w for n, w in weights.items()
        }
    module.load_state_dict({**weights, **kept})


@contextmanager
def _together(what: str) -> Iterator[None]:
    """Turn the errors of the backends into one that says what happened."""
    try:
        yield
    except RuntimeError as error:
        reason = re.split(r"\.? *\n|\. ", str(error).strip())[0]
        raise ProcessLost(
            f"process {rank()} of {size()} lost the others in {what}: one of them was killed (out "
            "of memory?), raised an error (see its own output) or hangs; start the job again with "
            f"resume=True to go on from the last checkpoint ({reason})"
        ) from error


def _carrier(tensor: Tensor) -> torch.device:
    """Return a device whose tensors the group can send, that of ``tensor`` if possible."""
    served = dist.get_backend_config()
    if f"{tensor.device.type}:" in served:
        return tensor.device
    return torch.device("cpu" if "cpu:" in served else "cuda")


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group neighbouring tensors of one dtype and device, up to ``BUCKET`` bytes together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        kind = [(t.dtype, t.device) for t in (tensor, *bucket[:1])]
        full = sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET
        if bucket and (full or kind[0] != kind[-1]):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
