"""Memoryless transition kernels: the table, and one file for each scheme that fills it in.

Sources: Domingo-Enrich et al. 2409.08861 (memoryless SDE, lean adjoint, loss) and those that the
files of the schemes name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adjoint.chain.kernels.ancestral import Ancestral, AncestralPair, own_time_kernel
from adjoint.chain.kernels.covariance import CovarianceMatched
from adjoint.chain.kernels.euler import EulerConsistent, EulerPublished
from adjoint.chain.kernels.kernel import Kernel, StateNoise, check_table, table_fingerprint
from adjoint.chain.kernels.matched import MomentMatched, measure_mmse
from adjoint.chain.kernels.scheme import MEASURED, Moments, Scheme
from flows.grid import check_grid

__all__ = [
    "KERNELS",
    "CovarianceMatched",
    "Kernel",
    "MomentMatched",
    "Moments",
    "Scheme",
    "StateNoise",
    "find_scheme",
    "gaussian_kernel",
    "make_kernel",
    "measure_mmse",
    "own_time_kernel",
    "table_fingerprint",
]

_SCHEMES: tuple[Scheme, ...] = (
    EulerPublished(),
    EulerConsistent(),
    AncestralPair(),
    Ancestral(),
    MomentMatched(),
    CovarianceMatched(),
)

KERNELS: dict[str, Scheme] = {scheme.name: scheme for scheme in _SCHEMES}
"""The schemes of this package by name."""


def find_scheme(kernel: str | Scheme) -> Scheme:
    """Return the scheme of that name, or ``kernel`` itself if it is a scheme.

    Raises:
        TypeError: ``kernel`` is neither a name nor a `Scheme`.
        ValueError: an unknown name; a scheme that needs what is not measured, or that has the name
            of one of this package.
    """
    if isinstance(kernel, str):
        if kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
        return KERNELS[kernel]
    if not isinstance(kernel, Scheme):
        raise TypeError(
            f"kernel must be of type Scheme, got {kernel!r}; or a name of adjoint.KERNELS"
        )
    if not isinstance(getattr(kernel, "name", None), str):
        raise ValueError(f"name of a scheme must be text, got none in {type(kernel).__name__}")
    unknown = sorted(set(kernel.needs) - set(MEASURED))
    if unknown:
        raise ValueError(f"needs of a scheme must be of {', '.join(MEASURED)}, got {unknown}")
    own = KERNELS.get(kernel.name)
    if own is not None and type(own) is not type(kernel):
        raise ValueError(
            f"name of a scheme must be its own, got {kernel.name!r} of adjoint.KERNELS"
        )
    return kernel


def make_kernel(
    kernel: str | Scheme,
    grid: Tensor,
    *,
    mmse: Tensor | None = None,
    covariance: Tensor | None = None,
) -> Kernel:
    """Return the table of a scheme on a time grid.

    Arguments:
        kernel: a name of ``KERNELS`` or a scheme.
        grid: (K+1,) strictly increasing from 0 to 1.
        mmse: (K,) mean squared error per dimension of x̂₁ at grid[:-1], where the scheme needs it.
        covariance: (d, d) covariance of the base's samples, where the scheme needs it.

    Raises:
        TypeError: ``kernel`` is neither a name nor a scheme.
        ValueError: unknown name; a grid that is not increasing from 0 to 1; mmse or covariance
            missing, of another shape, not positive, or given to a scheme that does not use it; a
            scheme whose table does not fit, see `adjoint.chain.kernels.kernel.check_table`.
    """
    scheme = find_scheme(kernel)
    grid = check_grid(grid).to(torch.float64)
    if len(grid) < 3 or grid[0] != 0 or grid[-1] != 1:
        raise ValueError(
            "grid of a memoryless chain must run from 0 to 1 in at least 2 steps, got "
            f"{len(grid) - 1} from {float(grid[0])} to {float(grid[-1])}"
        )
    for name, value in (("mmse", mmse), ("covariance", covariance)):
        if (value is not None) != (name in scheme.needs):
            users = ", ".join(s.name for s in KERNELS.values() if name in s.needs)
            raise ValueError(
                f"{name} goes with kernels that need it, such as {users}; kernel "
                f"{scheme.name!r} needs {sorted(scheme.needs) or 'nothing'}"
            )
    if mmse is not None:
        mmse = mmse.to(grid)
        if mmse.shape != grid[:-1].shape or not bool((mmse > 0).all()):
            raise ValueError(
                f"mmse must hold {len(grid) - 1} positive numbers, one a step, got {mmse.tolist()}"
            )
    if covariance is not None and (
        covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]
    ):
        raise ValueError(f"covariance must be (d, d), got shape {tuple(covariance.shape)}")
    table = scheme(grid, Moments(mmse, covariance))
    check_table(table, grid)
    return table


def gaussian_kernel(
    kernel: str | Scheme, grid: Tensor, *, dim: int = 1, variance: float = 1.0
) -> Kernel:
    """Return the table of a scheme for a Gaussian base N(m, s² I), whose moments are known.

    It shows what is wrong with a scheme before any base is measured.

    Arguments:
        kernel: a name of ``KERNELS`` or a scheme.
        grid: (K+1,) strictly increasing from 0 to 1.
        dim: dimension d of a sample.
        variance: s².

    Raises:
        TypeError, ValueError: as `make_kernel`; or the scheme does not serve this dimension.
    """
    scheme = find_scheme(kernel)
    if scheme.max_dim is not None and dim > scheme.max_dim:
        raise ValueError(
            f"kernel {scheme.name!r} serves up to {scheme.max_dim} dimensions, got {dim}; use "
            "'moment_matched'"
        )
    t = grid[:-1].to(torch.float64)
    mmse = variance * (1 - t) ** 2 / (t**2 * variance + (1 - t) ** 2)
    covariance = None
    if "covariance" in scheme.needs:
        covariance = variance * torch.eye(dim, dtype=torch.float64)
    return make_kernel(
        scheme, grid, mmse=mmse if "mmse" in scheme.needs else None, covariance=covariance
    )
