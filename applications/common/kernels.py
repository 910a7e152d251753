"""Kernels of one's own in the applications: ``module:Name`` stands for a scheme."""

from __future__ import annotations

from adjoint import Scheme, find_scheme
from applications.common.objects import is_reference, load_object


def load_scheme(kernel: str | Scheme) -> Scheme:
    """Return the scheme of a name in `adjoint.KERNELS`, of ``module:Name``, or the scheme itself.

    What ``module:Name`` stands for is a scheme, or a class of schemes without arguments.

    Raises:
        ValueError: there is no such scheme; the message lists the names.
    """
    found = kernel
    if isinstance(kernel, str) and is_reference(kernel):
        found = load_object(kernel, "kernel")
        if isinstance(found, type):
            found = found()
    try:
        return find_scheme(found)
    except TypeError as error:
        raise ValueError(str(error)) from error
