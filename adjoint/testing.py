"""The contract of a kernel, as a function that the author of a new scheme runs.

    from adjoint.testing import check_kernel
    check_kernel(MyScheme())

It holds the scheme against a Gaussian base N(m, s²) in one dimension, where everything is known in
closed form: the velocity, the mean squared error of its estimate of the data, and the tilt by a
linear reward r(x) = λ x, which is N(m + λ s², s²).  The lean adjoint of such a problem is the same
on every trajectory, so that the solution of the regression can be read off the table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adjoint.chain.adjoints import lean_adjoint
from adjoint.chain.kernels import Kernel, Scheme, find_scheme, gaussian_kernel
from adjoint.chain.rollout import draw_noise, rollout
from flows import grid as grids
from flows.field import Cond, VelocityField, batch_time
from flows.mixture import GaussianMixture

MEAN, VARIANCE, SLOPE = 0.5, 0.49, 1.0
"""Mean m and variance s² of the base, and slope λ of the reward."""

STEPS = (20, 80, 320)
"""Numbers of steps on which the error of a scheme must fall."""

LARGEST_ERROR = 0.05
"""Largest relative error of the moments and of the tilt on the finest grid."""


def check_kernel(scheme: str | Scheme) -> None:
    """Check a scheme against the contract that rollout, adjoint, loss and certificate rely on.

    - Its table has the right shapes, is float64 and finite, and its flags are true of its columns.
    - A noiseless step follows the base.
    - Where it claims so, its adjoint is the Jacobian of its own mean.
    - With more steps the moments of its chain, and its tilt by a linear reward, become those of the
      Gaussian in closed form, on a uniform grid and on a shifted one.
    - Tables move between devices, and states keep their dtype.

    Arguments:
        scheme: the scheme, or a name of `adjoint.KERNELS`.

    Raises:
        AssertionError: a rule is broken; the message says which one and by how much.
    """
    scheme = find_scheme(scheme)
    for name in ("name", "summary"):
        text = getattr(scheme, name, None)
        _require(isinstance(text, str) and text, f"{name} must be text, got {text!r}")
    _require("\n" not in scheme.summary, f"summary must be one line, got {scheme.summary!r}")
    for grid in (grids.uniform(2), grids.uniform(7), grids.shifted(12, 3.0)):
        kernel = _on_gaussian(scheme, grid)
        _check_noiseless_step(kernel)
        if kernel.is_exact_adjoint and kernel.state_noise is None:
            _check_adjoint(kernel)
    for shift in (1.0, 3.0):
        _check_exactness(scheme, shift)
    _check_moves(_on_gaussian(scheme, grids.uniform(5)))


def _require(holds: object, message: str) -> None:
    """Raise an AssertionError with ``message`` unless a rule holds."""
    if not holds:
        raise AssertionError(message)


def _base() -> GaussianMixture:
    """Return the Gaussian base N(m, s²), float64."""
    mean = torch.full((1, 1), MEAN, dtype=torch.float64)
    return GaussianMixture.isotropic(mean, VARIANCE**0.5)


def _on_gaussian(scheme: Scheme, grid: Tensor) -> Kernel:
    """Return the table of the scheme for the Gaussian base, with its exact moments."""
    try:
        return gaussian_kernel(scheme, grid, variance=VARIANCE)
    except (TypeError, ValueError) as error:
        raise AssertionError(str(error)) from error


def _check_noiseless_step(kernel: Kernel) -> None:
    """Check that a noiseless last step is a step of the base, whatever the field is."""
    if not kernel.noiseless_last:
        return
    base, (x0, noise) = _base(), _start(kernel, 4)

    def away(x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        return base(x, t) + 1

    trajectory = rollout(away, base, kernel, x0, noise)
    before, after = trajectory.xs[-2:]
    expected = kernel.mean_x[-1] * before + kernel.mean_v[-1] * base(before, kernel.t[-2])
    _require(torch.allclose(after, expected), "a noiseless step must follow the base")


def _check_adjoint(kernel: Kernel) -> None:
    """Check the adjoint against the gradient through the unrolled chain."""
    base, (x0, noise) = _bent, _start(kernel, 4)
    xs = rollout(base, base, kernel, x0, noise).xs
    found = lean_adjoint(base, kernel, xs, -torch.ones_like(x0)).values
    for first in range(1, kernel.steps):
        x = start = xs[first].clone().requires_grad_(True)
        for k in range(first, kernel.steps):
            x = kernel.mean_x[k] * x + kernel.mean_v[k] * base(x, kernel.t[k])
            x = x + kernel.std[k] * noise[k]
        (a,) = torch.autograd.grad(-x.sum(), start)
        off = float((found[first] * kernel.adjoint_scale[first] - a).abs().max())
        _require(
            off < 1e-9 * (1 + float(a.abs().max())),
            f"the adjoint must be the Jacobian of the chain's own mean, as own_time claims; at "
            f"step {first} of {kernel.steps} it is off by {off:.2g}",
        )


def _bent(x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
    """Return a velocity with a Jacobian that depends on state and time."""
    return (1 - batch_time(t, x)) * torch.sin(2 * x) - x


def _check_exactness(scheme: Scheme, shift: float) -> None:
    """Check that moments of the chain, and its tilt, approach the closed form on a shifted grid."""
    base = _base()
    errors: dict[str, list[float]] = {"mean": [], "variance": [], "tilt": []}
    for steps in STEPS:
        kernel = _on_gaussian(scheme, grids.shifted(steps, shift))
        mean, variance = _moments(kernel, base)
        tilted, _ = _moments(kernel, _solution(kernel, base))
        errors["mean"].append(abs(mean / MEAN - 1))
        errors["variance"].append(abs(variance / VARIANCE - 1))
        errors["tilt"].append(abs((tilted - mean) / (SLOPE * VARIANCE) - 1))
    for name, found in errors.items():
        coarse, fine = found[0], found[-1]
        _require(
            fine < LARGEST_ERROR and fine <= coarse + 1e-9,
            f"the relative error of the {name} must fall below {LARGEST_ERROR} as the number of "
            f"steps grows, got {', '.join(f'{e:.3g}' for e in found)} in {STEPS} steps of "
            f"a grid of shift {shift:g}",
        )


def _solution(kernel: Kernel, base: VelocityField) -> VelocityField:
    """Return the velocity with a residual of zero, the base plus a constant at each time."""
    xs = torch.zeros(kernel.steps + 1, 1, 1, dtype=torch.float64)
    noise = torch.zeros(kernel.steps, 1, 1, dtype=torch.float64)
    terminal = torch.full((1, 1), -SLOPE, dtype=torch.float64)
    adjoint = lean_adjoint(base, kernel, xs, terminal, noise=noise).values
    adjoint = adjoint[1:] if kernel.residual_at_next else adjoint[:-1]
    shift = {
        float(t): 0.0 if v == 0 else float(-a * value / v)
        for t, v, a, value in zip(
            kernel.t[:-1], kernel.residual_v, kernel.residual_a, adjoint.flatten(), strict=True
        )
    }

    def field(x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        return base(x, t) + shift[float(t)]

    return field


def _moments(kernel: Kernel, field: VelocityField) -> tuple[float, float]:
    """Return the mean and variance of the end of the chain, whose steps are affine in the state."""
    mean, variance = 0.0, 1.0
    probes = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    base = _base()
    for k in range(kernel.steps):
        follows_base = kernel.noiseless_last and k == kernel.steps - 1
        v = (base if follows_base else field)(probes, kernel.t[k])
        at = kernel.mean_x[k] * probes + kernel.mean_v[k] * v
        offset, slope = float(at[0]), float(at[1] - at[0])
        mean = offset + slope * mean
        variance = slope**2 * variance + float(kernel.std[k]) ** 2
    return mean, variance


def _check_moves(kernel: Kernel) -> None:
    """Check that tables move between devices and that states keep their dtype there."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        moved, base = kernel.to(device), _base().to(device)
        _require(moved.t.device.type == device, f"a table must move to {device}")
        for dtype in (torch.float32, torch.float64):
            x0, noise = (z.to(device, dtype) for z in _start(kernel, 4))
            trajectory = rollout(base, base, moved, x0, noise)
            adjoint = lean_adjoint(base, moved, trajectory.xs, x0, noise=noise)
            for tensor in (trajectory.xs, trajectory.v, adjoint.values, adjoint.v_base):
                _require(
                    tensor.dtype == dtype and tensor.device.type == device,
                    f"states must stay {dtype} on {device}, got {tensor.dtype} on {tensor.device}",
                )
                _require(tensor.isfinite().all(), f"states must be finite in {dtype}")


def _start(kernel: Kernel, n: int) -> tuple[Tensor, Tensor]:
    """Return starts (n, 1) and step noises (K, n, 1), float64."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return x0, draw_noise(kernel, x0, generator=generator)
