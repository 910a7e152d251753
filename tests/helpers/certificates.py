"""Kernels and certificates of mixtures whose tilts are known."""

import torch

from adjoint import certify, make_kernel, measure_mmse
from adjoint.chain.kernels import KERNELS
from flows import grid as grids


def kernel_for(base, name, steps, seed=0):
    grid = grids.uniform(steps)
    mmse = covariance = None
    if "mmse" in KERNELS[name].needs:
        generator = torch.Generator().manual_seed(seed)
        x1 = base.sample(50_000, generator=generator)
        mmse = measure_mmse(base, grid, x1, generator=generator)
    if name == "covariance_matched":
        covariance = base.covariance()
    return make_kernel(name, grid, mmse=mmse, covariance=covariance)


def certificate(field, base, reward, name, steps, n=4096, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(n, base.means.shape[1], generator=generator, dtype=torch.float64)
    return certify(field, base, reward, kernel_for(base, name, steps), x0, generator=generator)
