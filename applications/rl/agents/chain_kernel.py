r"""The Gaussian kernel of an agent's chain, and the running denoiser error that one kernel needs.

All schemes but one are constants.  ``moment_matched`` (`adjoint.make_kernel`) needs, at each time
of its grid,

    mmse(t) = E‖A - x̂_1‖² / d = (1 - t)² E‖v(x_t, t | s) - (A - x_0)‖² / d

of the flow that the policy is compared with.  That flow learns, so the error is an exponential
average over the batches, and the kernel is made anew for each update.  Row i of a batch is spent on
time i mod K: one forward pass of the batch's size per update, whatever K.

A scheme of one's own is named ``module:Name``, and has a constant table.  Making an agent imports
the module; reading a checkpoint does not, see `applications.rl.run_folder.load_agent`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adjoint import Kernel, Scheme, make_kernel, own_time_kernel, table_fingerprint
from applications.common.kernels import load_scheme
from applications.common.objects import is_reference
from applications.rl.agents.bridge import make_bridge
from applications.rl.agents.options import Adjoint, AgentConfig, require
from flows import Cond, VelocityField, interpolate, uniform

RATE = 0.01
"""Weight of the newest batch in the average."""

FLOOR = 1e-6
"""Smallest mmse handed out: the noise of a step must not vanish."""


class DenoiserError(nn.Module):
    """Running mmse(t_k) of a flow at the K first times of a grid.

    Arguments:
        grid: (K+1,) float64 times.

    The state is two buffers, so it is part of a checkpoint and moves with the module.
    """

    times: Tensor
    total: Tensor
    weight: Tensor

    def __init__(self, grid: Tensor) -> None:
        super().__init__()
        self.register_buffer("times", grid[:-1].double().clone(), persistent=False)
        self.register_buffer("total", torch.zeros_like(self.times))
        self.register_buffer("weight", torch.zeros_like(self.times))

    @torch.no_grad()
    def update(
        self, field: VelocityField, x0: Tensor, x1: Tensor, valid: Tensor, cond: Cond
    ) -> None:
        """Take in noise x0 and data x1 (B, d), weights ``valid`` (B,) and conditions (B, ...).

        A batch smaller than K is used more than once.  Times at which every weight is 0 keep their
        average.
        """
        steps, batch = len(self.times), len(x1)
        repeats = -(-steps // batch)  # rows needed so that every time has one
        if repeats > 1:
            x0, x1 = x0.repeat(repeats, 1), x1.repeat(repeats, 1)
            valid = valid.repeat(repeats)
            cond = {name: c.repeat(repeats, *[1] * (c.ndim - 1)) for name, c in cond.items()}
        rows = torch.arange(len(x1), device=x1.device) % steps
        t = self.times[rows].to(x1.dtype)
        errors = (field(interpolate(x0, x1, t), t, cond) - (x1 - x0)).square().mean(1)
        weight = valid.to(self.total)
        total = torch.zeros_like(self.total).index_add_(0, rows, weight * errors.to(weight))
        count = torch.zeros_like(self.total).index_add_(0, rows, weight)
        rate = RATE * (count > 0).to(count)
        mean = total / torch.where(count > 0, count, 1.0)
        self.total.copy_(self.total.lerp(mean, rate))  # in place, `lerp_` takes long under vmap
        self.weight.copy_(self.weight.lerp(torch.ones_like(count), rate))

    def mean(self) -> Tensor:
        """Return the mean squared error of the velocity per dimension, (K,); 1 if unseen."""
        return torch.where(self.weight > 0, self.total / self.weight, 1.0)

    def mmse(self) -> Tensor:
        """Return the mmse (K,) float64, positive."""
        return ((1 - self.times) ** 2 * self.mean()).clamp_min(FLOOR)


def own_kernel(options: AgentConfig) -> str | None:
    """Return the ``module:Name`` of a scheme from outside this package that an agent has."""
    kernel = getattr(options, "kernel", None)
    return kernel if isinstance(kernel, str) and is_reference(kernel) else None


def kernel_identity(options: AgentConfig) -> dict[str, str]:
    """Return the fingerprint of the table of a scheme from outside this package, if there is one.

    Raises:
        ValueError: there is no such scheme, or an agent cannot have it.
    """
    kernel = own_kernel(options)
    if kernel is None:
        return {}
    table = make_kernel(_scheme(kernel), uniform(options.flow_steps))
    return {"kernel_table": table_fingerprint(table)}


def _scheme(kernel: str) -> Scheme:
    """Return a scheme with a constant table.

    Raises:
        ValueError: there is no such scheme, or its table depends on the flow, which here learns.
    """
    scheme = load_scheme(kernel)
    if scheme.needs or scheme.state_noise:
        raise ValueError(
            f"kernel must be a scheme that measures nothing of the flow, which learns, got "
            f"{kernel!r}, which needs {', '.join(sorted(scheme.needs)) or 'the state'}"
        )
    return scheme


class ChainKernel(nn.Module):
    """The kernel of an agent's chain in K equal steps, or the bridge of its scalar adjoint.

    Arguments:
        scheme: name of the scheme, of `applications.rl.agents.options.AGENT_KERNELS`, or
            ``module:Name``.
        steps: K.
        adjoint: "scalar" for a bridge (`applications.rl.agents.bridge`).

    Attributes:
        error: `DenoiserError` for ``moment_matched``, else None.

    Raises:
        ValueError: a scheme that an agent cannot have, or one beside the scalar adjoint.
    """

    def __init__(self, scheme: str, steps: int, adjoint: Adjoint = "lean") -> None:
        super().__init__()
        grid = uniform(steps)
        if adjoint == "scalar":
            expected = "euler_published, the default, where adjoint is 'scalar', which has no chain"
            require(scheme == "euler_published", "kernel", scheme, expected)
        matched = scheme == "moment_matched"
        self.error = DenoiserError(grid) if matched else None
        if adjoint == "scalar":
            self._kernel: Kernel = make_bridge(steps)
        else:
            self._kernel = own_time_kernel(grid) if matched else make_kernel(_scheme(scheme), grid)

    def on(self, device: torch.device) -> Kernel:
        """Return the kernel on a device, to which its constants are sent once."""
        if self._kernel.t.device != device:
            self._kernel = self._kernel.to(device)
        if self.error is None:
            return self._kernel
        return own_time_kernel(self._kernel.t, self.error.mmse())

    def measure(
        self, field: VelocityField, x0: Tensor, x1: Tensor, valid: Tensor, cond: Cond
    ) -> None:
        """Take a batch into the running error, where there is one; see `DenoiserError.update`."""
        if self.error is not None:
            self.error.update(field, x0, x1, valid, cond)
