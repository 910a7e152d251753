"""Arguments of pictures: arrays or tensors, checked and turned into float64 numpy arrays.

A density or reward map on the plane has shape (R, R), the first index along x and the second along
y; its cells tile the window [-extent, extent]².  Where only samples are known, `density_of`
estimates such a map: a histogram blurred by a Gaussian of width b,

    p̂ = N_b * (1/N) Σ_i δ_{x_i},

a kernel density estimate whose cost does not depend on the number of samples.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

Array = np.ndarray | torch.Tensor


def checked(value: Array, name: str, shape: tuple[int | str, ...]) -> np.ndarray:
    """Turn ``value`` into a finite float64 array of the given shape.

    Arguments:
        value: Array or tensor, on any device.
        name: Name of the argument, for messages.
        shape: Exact sizes, or letters for free ones; equal letters stand for equal sizes.

    Raises:
        ValueError: the shape differs, a size is zero, or a value is not finite.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().double().numpy()
    array = np.asarray(value, dtype=np.float64)
    sizes: dict[str, int] = {}
    fits = array.ndim == len(shape) and array.size > 0
    for size, wanted in zip(array.shape, shape, strict=False):
        fits &= size == (sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted)
    if not fits:
        expected = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({expected}), got {array.shape}")
    bad = int(np.count_nonzero(~np.isfinite(array)))
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} of {array.size} values that are not")
    return array


def checked_density(
    value: Array, name: str, shape: tuple[int | str, ...] = ("R", "R")
) -> np.ndarray:
    """Check as `checked` does, and that no value is negative and not all are zero."""
    array = checked(value, name, shape)
    if array.min() < 0 or array.max() == 0:
        raise ValueError(
            f"{name} must be >= 0 with some mass, got values from {array.min()} to {array.max()}"
        )
    return array


def check_extent(extent: float) -> float:
    """Return ``extent``, the half-width of a window, if it is positive."""
    if not 0 < extent < float("inf"):
        raise ValueError(f"extent must be a positive half-width of the window, got {extent}")
    return float(extent)


def density_of(
    samples: Array, extent: float, *, resolution: int = 200, bandwidth: float | None = None
) -> np.ndarray:
    """Estimate the density (R, R) of ``samples`` (N, 2) on the window [-extent, extent]².

    Arguments:
        samples: Points; those outside of the window count for the total mass only.
        extent: Half-width of the window.
        resolution: R.
        bandwidth: Standard deviation of the kernel; unless given, a fiftieth of ``extent`` for 4000
            samples, falling with their number as N^(-1/6) (Scott's rule in the plane).

    Raises:
        ValueError: ``samples`` has another shape or is not finite, or ``extent`` is not positive.
    """
    x = checked(samples, "samples", ("N", 2))
    e = check_extent(extent)
    edges = np.linspace(-e, e, resolution + 1)
    counts, _, _ = np.histogram2d(x[:, 0], x[:, 1], bins=(edges, edges))
    cell = 2 * e / resolution
    width = (e / 50 * (4000 / len(x)) ** (1 / 6) if bandwidth is None else bandwidth) / cell
    return gaussian_filter(counts, width, mode="constant") / (len(x) * cell**2)
