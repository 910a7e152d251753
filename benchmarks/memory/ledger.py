"""Bytes of live tensors, counted operation by operation, and a device simulated on the CPU.

`Ledger` sees every operation, of the backward pass as well, and follows each new storage from its
creation until it is freed.  Unlike the memory of the process this does not depend on an allocator,
and every run gives the same number.  Scratch space within an operation is not counted.

`simulated_device` makes one CPU act as a device and a host: tensors moved to `HOST` are on the
host, all others on the device.  The ledger counts both separately and refuses operations between
them, as a real device does.
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
"""Name of the simulated host; the real CPU acts as the device."""


class HostTensor(Tensor):
    """A tensor whose ``device`` is `HOST`."""

    device = HOST
    at_work: ClassVar[int] = 0
    """Number of running functions of such tensors; the tensors they create are on the host."""

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the function with ``at_work`` raised by one."""
        HostTensor.at_work += 1
        try:
            return super().__torch_function__(func, types, args, kwargs or {})
        finally:
            HostTensor.at_work -= 1


class Ledger(TorchDispatchMode):
    """Count live bytes, on device and host, while the context is entered.

    Attributes:
        peak: most bytes on the device at once, of storages created inside the context.
        host_peak: most bytes on `HOST` at once, likewise.
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
        """Put the results of the operations inside on the host, or on the device."""
        self._target = to_host
        try:
            yield
        finally:
            self._target = None

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and count the storages of its results."""
        kwargs = kwargs or {}
        inputs = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        target = self._target
        if target is None:
            # Scalars (dimension 0) and indices may come from either place.
            floating = [a for a in inputs if a.is_floating_point()]
            places = {self.place(a) for a in [a for a in floating if a.ndim] or floating}
            if len(places) > 1:
                raise RuntimeError(f"{func} has tensors on the device and on the host")
            target = places == {True} if places else HostTensor.at_work > 0
        out = func(*args, **kwargs)
        old = {
            a.untyped_storage()._cdata for a in inputs
        }  # storages of views and of in-place results
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in old:
                self._enter(tensor, target)
        return out

    def place(self, tensor: Tensor) -> bool:
        """Return whether the tensor is on the host."""
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
    """Copy to the host or to the device; the gradient is copied back."""

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
    """Yield a ledger of a simulated device and `HOST`; ``Tensor.to`` moves between the two."""
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
        del Tensor.to  # `Tensor.to` is inherited again
