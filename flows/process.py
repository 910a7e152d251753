"""Settings of a whole process that make the same numbers come sooner on a CPU.

For the entry points of programs, not for functions that others call: both settings outlive the
call.
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
