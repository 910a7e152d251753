r"""The table of a memoryless chain: its transitions, its adjoint rule and its residual.

A discretised memoryless SDE is a chain of Gaussian transition kernels.  Step k from t to
s = t_{k+1} has a mean that is affine in the state and in the velocity, and a noise level that base
and tilted chain share:

    x_{k+1} = mean_x x_k + mean_v v(x_k, t) + std ε_k.

The lean adjoint λ runs backward with one vector-Jacobian product of the *base* velocity a step,

    λ_k = adjoint_x λ_{k+1} + adjoint_v J(x_k, adjoint_t)ᵀ λ_{k+1},    J = ∂v_β/∂x,  λ_K = -∇r(x_K),

and the loss regresses the control onto it, with the residual

    residual_v (v_θ - v_β)(x_k, t) + residual_a λ,     λ = λ_k or λ_{k+1}.

A scheme (`adjoint.chain.kernels.scheme`) fills in these nine columns; rollout, adjoint, loss and
certificate read the columns and know no scheme by name.  A step with std = 0 carries no information
about the drift: there both chains follow the base, so that their distributions stay absolutely
continuous.

Mean and residual belong together.  For any mean there is one pair of adjoint rule and residual that
tilts the chain itself exactly where the reward is linear and the base Gaussian, whatever K is
(`Kernel.consistent`): the adjoint of the chain's own mean and the residual of the discrete control
problem.  From the Gaussian step d = mean_v (v_θ - v_β) costs ‖d‖²/(2 std²) and moves x_{k+1} by d,
which is worth -dᵀa_{k+1}; the minimum over d has d/std + std a_{k+1} = 0.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from flows.field import Cond, VelocityField
from flows.weights import fingerprint

COLUMNS = ("mean_x", "mean_v", "std", "adjoint_t", "adjoint_x", "adjoint_v")
RESIDUALS = ("residual_v", "residual_a")


class StateNoise(Protocol):
    """Step noise L(x_k) ε_k whose covariance L Lᵀ depends on the state.

    Its implementation for the conditional covariance of the data is
    `adjoint.chain.conditional_covariance.ConditionalNoise`.
    """

    def root(self, base: VelocityField, k: int, x: Tensor, cond: Cond | None = None) -> Tensor:
        """Return lower triangular factors L (B, d, d) at the states x (B, *) of step k."""

    def pull(
        self,
        base: VelocityField,
        k: int,
        x: Tensor,
        noise: Tensor,
        adjoint: Tensor,
        cond: Cond | None = None,
    ) -> Tensor:
        """Return the term ∇_x [(L(x) ε)ᵀ a] (B, *) that L(x) adds to the adjoint of step k."""

    def to(self, device: torch.device | str) -> StateNoise:
        """Return a copy of this noise with its tensors on ``device``."""


@dataclass(frozen=True)
class Kernel:
    """The table of a memoryless chain, with a row for each step; see the module docstring.

    All tensors are float64.

    Attributes:
        name: name of the scheme that made the table.
        t: (K+1,) time grid from 0 to 1.
        mean_x, mean_v, std: (K,) mean and standard deviation of the transitions.
        adjoint_t, adjoint_x, adjoint_v: (K,) adjoint rule.
        residual_v, residual_a: (K,) residual of the loss.
        adjoint_scale: (K+1,) λ = a / adjoint_scale, with a the adjoint of the chain: ones where λ
            is a itself, t where λ is c = a / t.
        residual_at_next: True where the residual of step k contains λ_{k+1} instead of λ_k.
        noiseless_last: True where std[-1] is 0, so that the last step follows the base.
        own_time: per step, True where adjoint_t equals t, so that one evaluation serves both.
        state_noise: step noise with a covariance that depends on the state; None where it is
            std ε.  Then std only weights the loss.
    """

    name: str
    t: Tensor
    mean_x: Tensor
    mean_v: Tensor
    std: Tensor
    adjoint_t: Tensor
    adjoint_x: Tensor
    adjoint_v: Tensor
    residual_v: Tensor
    residual_a: Tensor
    adjoint_scale: Tensor
    residual_at_next: bool
    noiseless_last: bool
    own_time: tuple[bool, ...]
    state_noise: StateNoise | None = None

    @classmethod
    def consistent(
        cls, name: str, t: Tensor, *, mean_x: Tensor, mean_v: Tensor, std: Tensor
    ) -> Kernel:
        """Return a kernel with the exact adjoint of its own mean and the matching residual.

        Adjoint a_k = (∂μ_β/∂x)ᵀ a_{k+1} with μ_β = mean_x x + mean_v v_β(x, t), and residual
        mean_v/std (v_θ - v_β) + std a_{k+1}; a noiseless step has no residual.

        Arguments:
            name: name of the scheme.
            t: (K+1,) float64 time grid from 0 to 1.
            mean_x, mean_v, std: (K,) float64; only std[-1] may be 0.

        Raises:
            ValueError: a column of another shape, or a std that is not positive before the last
                step.
        """
        for column, value in (("mean_x", mean_x), ("mean_v", mean_v), ("std", std)):
            if value.shape != t[:-1].shape:
                raise ValueError(
                    f"{column} must have the shape ({len(t) - 1},) of the grid's steps, "
                    f"got {tuple(value.shape)}"
                )
        if not bool((std[:-1] > 0).all() and std[-1] >= 0):
            raise ValueError(f"std must be positive but for the last step's, got {std.tolist()}")
        return cls(
            name=name,
            t=t,
            mean_x=mean_x,
            mean_v=mean_v,
            std=std,
            adjoint_t=t[:-1],
            adjoint_x=mean_x,
            adjoint_v=mean_v,
            residual_v=torch.where(std > 0, mean_v / std, torch.zeros_like(std)),
            residual_a=std,
            adjoint_scale=torch.ones_like(t),
            residual_at_next=True,
            noiseless_last=bool(std[-1] == 0),
            own_time=tuple([True] * (len(t) - 1)),
        )

    @property
    def steps(self) -> int:
        """Return the number of steps K."""
        return self.mean_x.shape[0]

    @property
    def is_exact_adjoint(self) -> bool:
        """Return whether the adjoint is the Jacobian of the chain's own mean."""
        return self.own_time[-1]

    def to(self, device: torch.device | str) -> Kernel:
        """Return a copy of this table with its tensors on ``device`` (still float64)."""
        moved: dict[str, Any] = {
            f.name: value.to(device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        if self.state_noise is not None:
            moved["state_noise"] = self.state_noise.to(device)
        return replace(self, **moved)


def table_fingerprint(kernel: Kernel) -> str:
    """Return a digest of the columns of a table, rounded to float32, alike in every process."""
    columns = {name: getattr(kernel, name).cpu() for name in (*COLUMNS, *RESIDUALS)}
    return fingerprint({name: column.to(torch.float32) for name, column in columns.items()})


def check_table(kernel: Kernel, grid: Tensor) -> None:
    """Refuse a table that rollout, adjoint, loss and certificate cannot rely on.

    Arguments:
        kernel: the table that a scheme made.
        grid: the grid (K+1,) that it was given.

    Raises:
        TypeError: ``kernel`` is not a `Kernel`.
        ValueError: a column of another shape or dtype, or not finite; a std that is not positive
            before the last step; a flag that is not true of the columns.
    """
    if not isinstance(kernel, Kernel):
        raise TypeError(f"a scheme must return a Kernel, got {kernel!r}")
    steps = len(grid) - 1
    lengths = {"t": steps + 1, "adjoint_scale": steps + 1}
    lengths |= dict.fromkeys((*COLUMNS, *RESIDUALS), steps)
    for name, length in lengths.items():
        column = getattr(kernel, name)
        if column.shape != (length,) or column.dtype != torch.float64:
            raise ValueError(
                f"{name} must be float64 of shape ({length},), got {column.dtype} of shape "
                f"{tuple(column.shape)}"
            )
        if not bool(column.isfinite().all()):
            raise ValueError(f"{name} must be finite, got {column.tolist()}")
    if not torch.equal(kernel.t, grid):
        raise ValueError(f"t must be the grid that was given, got {kernel.t.tolist()}")
    if not bool((kernel.std[:-1] > 0).all() and kernel.std[-1] >= 0):
        raise ValueError(f"std must be positive but for the last step's, got {kernel.std.tolist()}")
    if kernel.noiseless_last != bool(kernel.std[-1] == 0):
        raise ValueError(
            f"noiseless_last must say whether std[-1] is 0, got {kernel.noiseless_last}"
        )
    own_time = tuple((kernel.adjoint_t == kernel.t[:-1]).tolist())
    if kernel.own_time != own_time:
        raise ValueError(
            f"own_time must say where adjoint_t equals t, {own_time}, got {kernel.own_time}"
        )
    if kernel.adjoint_scale[-1] != 1:
        raise ValueError(
            f"adjoint_scale must end with 1, as λ_K is -∇r(x_K), got {kernel.adjoint_scale[-1]}"
        )
