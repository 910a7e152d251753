"""Bytes of live tensors, counted operation by operation; and a device simulated on the CPU.

`Ledger` sees every operation, of the backward pass as well, and follows each storage that one
creates until it is freed.  Unlike the memory of the process this does not depend on an allocator,
and every run gives the same number.  The scratch space within an operation goes unseen.

`simulated_device` makes a CPU play two places: what is moved to `HOST` is on the other one.  The
ledger counts the two separately and refuses operations between them, as a real device does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST = torch.device("meta")
"""What stands for the CPU where the CPU stands for a device."""


class HostTensor(Tensor):
    """A tensor that says it is on `HOST`."""

    device = HOST
    at_work: ClassVar[int] = 0
    """Functions of such tensors that are running; what they create is on the host."""

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the function, and say for how long."""
        HostTensor.at_work += 1
        try:
            return super().__torch_function__(func, types, args, kwargs or {})
        finally:
            HostTensor.at_work -= 1


class Ledger(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        peak: most bytes on the device at once, of storages created since it was made.
        host_peak: the same on `HOST`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = {False: 0, True: 0}
        self.most = {False: 0, True: 0}
        self._places: dict[int, bool] = {}  # storage → whether it is on the host
        self._target: bool | None = None

    @property
    def peak(self) -> int:
        """Most bytes on the device at once."""
        return self.most[False]

    @property
    def host_peak(self) -> int:
        """Most bytes on the host at once."""
        return self.most[True]

    @contextmanager
    def moving(self, to_host: bool) -> Iterator[None]:
        """Operations inside put their results on the host, or on the device."""
        self._target = to_host
        try:
            yield
        finally:
            self._target = None

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and enter the storages of its results."""
        kwargs = kwargs or {}
        inputs = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        target = self._target
        if target is None:
            # Numbers, of dimension 0, and indices may come from anywhere.
            floating = [a for a in inputs if a.is_floating_point()]
            places = {self.place(a) for a in [a for a in floating if a.ndim] or floating}
            if len(places) > 1:
                raise RuntimeError(f"{func} has tensors on the device and on the host")
            target = places == {True} if places else HostTensor.at_work > 0
        out = func(*args, **kwargs)
        old = {a.untyped_storage()._cdata for a in inputs}  # of views, and of results in place
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in old:
                self._enter(tensor, target)
        return out

    def place(self, tensor: Tensor) -> bool:
        """Whether it is on the host."""
        return self._places.get(tensor.untyped_storage()._cdata, False)

    def _enter(self, tensor: Tensor, on_host: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._places:
            return
        self._places[key] = on_host
        self.live[on_host] += size
        self.most[on_host] = max(self.most[on_host], self.live[on_host])
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.live[self._places.pop(key)] -= size


class _Move(torch.autograd.Function):
    """A copy at the other place, whose gradient is copied back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ledger: Ledger, to_host: bool) -> Tensor:
        ctx.ledger, ctx.to_host = ledger, to_host
        with ledger.moving(to_host):
            return x.as_subclass(Tensor).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        with ctx.ledger.moving(not ctx.to_host):
            return gradients[0].clone(), None, None


@contextmanager
def simulated_device() -> Iterator[Ledger]:
    """A ledger of two places: the CPU as the device, and `HOST`; ``Tensor.to`` moves between."""
    ledger, move = Ledger(), Tensor.to

    def to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        places = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.device)]
        if not places:
            return move(x, *args, **kwargs)
        to_host = places[0] == HOST
        if ledger.place(x) != to_host:
            x = _Move.apply(x, ledger, to_host)
            x = x.as_subclass(HostTensor) if to_host else x
        dtypes = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
        return move(x, dtypes[0]) if dtypes else x

    Tensor.to = to  # type: ignore[assignment,method-assign]
    try:
        with ledger:
            yield ledger
    finally:
        del Tensor.to  # what it was is inherited
