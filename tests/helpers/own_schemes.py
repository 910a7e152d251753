"""Kernels as a user writes them, outside of the package."""

import torch

from adjoint import Kernel, Scheme


class Tempered(Scheme):
    """The ancestral chain with ``level`` times its noise."""

    name = "tempered"
    summary = "the ancestral kernel with its noise times a level"

    def __init__(self, level=1.0):
        self.level = level

    def __call__(self, grid, moments):
        t, s = grid[:-1], grid[1:]
        rho = t * (1 - s) / (s * (1 - t))
        g = s * (1 - rho**2)
        return Kernel.consistent(
            self.name,
            grid,
            mean_x=rho * (1 - s) / (1 - t) + g,
            mean_v=g * (1 - t),
            std=self.level * (1 - s) * (1 - rho**2).sqrt(),
        )


class WrongAdjoint(Tempered):
    """A chain whose adjoint is not the Jacobian of its mean, although it says so."""

    name = "wrong_adjoint"

    def __call__(self, grid, moments):
        kernel = super().__call__(grid, moments)
        return Kernel(**{**vars(kernel), "adjoint_v": 0.5 * kernel.adjoint_v})


class NotMemoryless(Tempered):
    """A chain with twice the noise, which is not that of the flow."""

    name = "not_memoryless"

    def __init__(self):
        super().__init__(2.0)


class Infinite(Tempered):
    """A chain with a residual that divides by the last noise, which is zero."""

    name = "infinite"

    def __call__(self, grid, moments):
        kernel = super().__call__(grid, moments)
        return Kernel(**{**vars(kernel), "residual_v": kernel.mean_v / kernel.std})


class UniformOnly(Scheme):
    """A chain that takes all steps to be equally long."""

    name = "uniform_only"
    summary = "the Euler-Maruyama chain with steps of length 1 / K"

    def __call__(self, grid, moments):
        steps = len(grid) - 1
        h, s = torch.full((steps,), 1 / steps, dtype=grid.dtype), grid[1:]
        std = (h * 2 * (1 - s + h) / s).sqrt()
        mean_x, mean_v = 1 - h / s, 2 * h
        std[-1], mean_x[-1], mean_v[-1] = 0.0, 1.0, h[-1]
        return Kernel.consistent(self.name, grid, mean_x=mean_x, mean_v=mean_v, std=std)


class SaysNoisy(Tempered):
    """A chain that ends noiseless without saying so."""

    name = "says_noisy"

    def __call__(self, grid, moments):
        return Kernel(**{**vars(super().__call__(grid, moments)), "noiseless_last": False})


class Halfway(Tempered):
    """A chain whose table is in float32."""

    name = "halfway"

    def __call__(self, grid, moments):
        kernel = super().__call__(grid, moments)
        return Kernel(**{**vars(kernel), "std": kernel.std.to(torch.float32)})
