"""Kernels on a command line: names of `adjoint.KERNELS`, and schemes of one's own."""

from __future__ import annotations

from typing import Annotated

from adjoint import KERNELS, Scheme, TiltConfig, gaussian_kernel
from applications.common.objects import NAME_OR_OBJECT
from flows import shifted

KernelOption = Annotated[str | Scheme, NAME_OR_OBJECT]
"""An option that takes a name, ``module:Name``, or in Python a `Scheme`."""


def check_scheme(options: TiltConfig, dim: int) -> None:
    """Make the tables of a tilt for a Gaussian base, before a base is trained.

    Arguments:
        options: options of the tilt.
        dim: dimension of a sample.

    Raises:
        ValueError: the scheme makes no table, or one that a tilt cannot use.
    """
    try:
        for steps in {options.steps, options.chain_steps}:
            gaussian_kernel(options.kernel, shifted(steps, options.shift), dim=dim)
    except TypeError as error:
        raise ValueError(str(error)) from error


def by_name(scheme: Scheme) -> str | Scheme:
    """Return the name of a scheme of `adjoint.KERNELS`, by which checkpoints know it, or itself."""
    return scheme.name if KERNELS.get(scheme.name) is scheme else scheme
