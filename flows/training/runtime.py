"""Settings of a whole process: faster numbers on a CPU, and the choice of the device.

`prepare_process` is for the entry points of programs, not for functions that others call: its
settings outlive the call.
"""

from __future__ import annotations

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's malloc.h."""


def prepare_process() -> None:
    """Flush denormal numbers to zero, and keep freed memory for the next allocation.

    Denormals make Adam slow where gradients vanish.  Memory that glibc returns to the system after
    each update must be asked for again and comes back page by page, which costs a few percent of an
    update; elsewhere than on Linux with glibc nothing is changed.
    """
    torch.set_flush_denormal(True)
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def choose_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is a GPU where there is one.

    Raises:
        ValueError: the name is no device, or this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be cpu, cuda or auto, got {name!r}: {reason}") from None
    return device
