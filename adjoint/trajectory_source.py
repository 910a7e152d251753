"""Trajectories of the current model with rewards and adjoints, for the losses of a tilt.

Memory.  Trajectory, adjoints and velocities are a few numbers a state; what fills a device are the
activations of the model, of B states at once in the rollout, the adjoint and the reward (and of S·B
in the loss).  The options ``micro_batch`` and ``reward_batch`` bound how many states are in work,
whatever K and B are, and ``offload`` keeps the results on the CPU in between.  None of them changes
a number beyond rounding.

Modes.  The module is in evaluation mode in its trajectories, like the base: otherwise dropout or
batch statistics would make v_θ differ from v_β and be mistaken for control.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from adjoint.certificate import path_log_ratio
from adjoint.chain.adjoints import lean_adjoint
from adjoint.chain.control_variates import control_variates
from adjoint.chain.kernels import Kernel
from adjoint.chain.rollout import Trajectory, draw_noise, rollout
from adjoint.config import TiltConfig
from adjoint.evaluator import Evaluator, RewardEvaluator
from adjoint.loss import select_steps
from adjoint.micro_batches import rows_of
from adjoint.rewards.reward import AbstractReward
from adjoint.trajectory_batch import TrajectoryBatch
from flows.field import Cond, VelocityField
from flows.training.sharding import is_sharded

CondSampler = Callable[[int, torch.Generator], Cond]
"""Function (n, generator) -> conditions of n samples by name."""

COMPILED_FORMS = 64
"""Shapes and modes for which the code of one class of fields is compiled, of all tilts."""


class TrajectorySource:
    """A source of trajectories of the current model, with rewards and adjoints.

    Arguments:
        base: frozen velocity field.
        reward: scaled reward (temperature included).
        shape: shape of one sample, without the batch.
        config: options of the tilt.
        device: device of base, model and reward.
        cond_sampler: draws conditions for n samples; None for an unconditional flow.
        dtype: of states and adjoints.
        storage_device: device where trajectories are kept.

    Raises:
        ValueError: a sharded base is to be compiled.
    """

    def __init__(
        self,
        base: VelocityField,
        reward: AbstractReward,
        *,
        shape: tuple[int, ...],
        config: TiltConfig,
        device: torch.device,
        cond_sampler: CondSampler | None,
        dtype: torch.dtype,
        storage_device: torch.device,
    ) -> None:
        self.shape, self.config, self.dtype = shape, config, dtype
        self.cond_sampler, self.storage_device = cond_sampler, storage_device
        self._device = None if storage_device == device else device
        self._compiled: dict[nn.Module, VelocityField] = {}
        self.plain_base = base
        self.base = self._evaluator(compiled(base) if config.compile else base)
        self.reward = RewardEvaluator(reward, config.reward_batch, self._device)

    def _evaluator(self, field: VelocityField) -> Evaluator:
        return Evaluator(field, self.config.micro_batch, self._device)

    def model(self, module: nn.Module) -> Evaluator:
        """Return the evaluator of ``module``, or of its compiled form, which shares its weights."""
        if not self.config.compile:
            return self._evaluator(module)
        if module not in self._compiled:
            self._compiled = {module: compiled(module)}
        return self._evaluator(self._compiled[module])

    def roll_out(
        self, module: nn.Module, kernel: Kernel, n: int, groups: int, generator: torch.Generator
    ) -> tuple[Trajectory, Cond | None]:
        """Return fresh trajectories of ``module``, and their conditions.

        Arguments:
            n: number of trajectories.
            groups: number of conditions that are drawn, each for n / groups neighbours.
        """
        x0, cond = self.starts(n, groups, generator)
        cond = rows_of(cond, slice(None), self.storage_device)
        noise = draw_noise(kernel, x0, generator=generator).to(self.storage_device)
        module.eval()
        x0 = x0.to(self.storage_device)
        return rollout(self.model(module), self.base, kernel, x0, noise, cond), cond

    def starts(self, n: int, groups: int, generator: torch.Generator) -> tuple[Tensor, Cond | None]:
        """Return starts (n, *) of trajectories and their conditions, on the generator's device.

        Arguments:
            groups: number of conditions that are drawn, each for n / groups neighbours.
        """
        x0 = torch.randn(
            (n, *self.shape), generator=generator, dtype=self.dtype, device=generator.device
        )
        if self.cond_sampler is None:
            return x0, None
        cond = self.cond_sampler(groups, generator)
        repeats = n // groups
        if repeats > 1:
            cond = {name: c.repeat_interleave(repeats, 0) for name, c in cond.items()}
        return x0, cond

    def collect(
        self, module: nn.Module, kernel: Kernel, n: int, generator: torch.Generator
    ) -> TrajectoryBatch:
        """Return ``n`` fresh trajectories of ``module`` with their lean adjoints."""
        trajectory, cond = self.roll_out(module, kernel, n, n, generator)
        value, gradient, terms = self.reward.value_and_gradient(trajectory.xs[-1], cond)
        value, gradient = value.to(self.dtype), gradient.to(self.dtype)
        adjoint_from = partial(
            lean_adjoint, self.base, kernel, trajectory.xs, cond=cond, noise=trajectory.noise
        )
        adjoint, variate = adjoint_from(-gradient), None
        if self.config.control_variates:
            steps = control_variates(
                self.model(module),
                self.base,
                kernel,
                trajectory,
                -gradient,
                lambda x: -self.reward.value_and_gradient(x, cond)[1].to(self.dtype),
                cond,
            )
            variate = adjoint_from(torch.zeros_like(gradient), control_variates=steps).values
            if kernel.residual_at_next:  # the residual of a step sees the noise of that step too
                variate[1:] += steps
        log_ratio, kl = path_log_ratio(trajectory, adjoint.v_base, kernel)
        return TrajectoryBatch(
            xs=trajectory.xs[:-1],
            adjoint=adjoint.values,
            v_base=adjoint.v_base,
            log_w=value + log_ratio,
            reward=value,
            kl=kl,
            terms={name: term.to(self.dtype) for name, term in terms.items()},
            cond=None if cond is None else dict(cond),
            control_variate=variate,
        )

    def select_steps(self, kernel: Kernel, generator: torch.Generator) -> Tensor | None:
        """Return the indices (S,) of the steps whose velocities get a gradient; None for all."""
        late, early = self.config.late_fraction, self.config.early_fraction
        if late == 1 or early == 1:
            return None
        return select_steps(
            kernel.steps, late_fraction=late, early_fraction=early, generator=generator
        )

    def velocities(
        self,
        field: Evaluator,
        kernel: Kernel,
        xs: Tensor,
        steps: Tensor | None,
        cond: Cond | None,
    ) -> Tensor:
        """Return velocities (S, B, *) of ``field`` at the selected of the states xs (K, B, *).

        Arguments:
            steps: (S,) indices of the selected steps; None for all K.
        """
        times = kernel.t[:-1]
        if steps is not None:
            xs, times = xs[steps.to(xs.device)], times[steps.to(times.device)]
        return field.along(xs, times, cond).to(self.dtype)


def compiled(field: VelocityField) -> VelocityField:
    """Return ``field`` compiled for the shapes that it is given; parameters are shared.

    Raises:
        ValueError: the field is sharded, so that its weights are gathered by hooks.
    """
    if is_sharded(field):
        raise ValueError("compile must be False for a base or model sharded by fully_shard")
    # Compiled forms are kept with the code of ``forward``, at most this many for all fields of one
    # class in a process; a field more would run as it is.
    limits = torch._dynamo.config
    limits.cache_size_limit = max(limits.cache_size_limit, COMPILED_FORMS)
    return torch.compile(field, dynamic=False)
