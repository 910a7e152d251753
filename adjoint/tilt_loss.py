"""What a tilt minimises: the adjoint-matching loss as a trainer calls it.

`TiltLoss` rolls the current model out (or replays), runs the lean adjoint back, and evaluates
`adjoint_matching_loss` on the selected steps.  In the last part of a training it refines: on fresh
trajectories of the current model it evaluates `log_variance_loss`, which needs no adjoint and whose
noise vanishes at the optimum.  A trainer of one's own takes it as it is.

Memory.  Trajectory, adjoints and velocities are a few numbers a state; what fills a device are the
activations of the model, of S·B states at once in the loss, of B in the rollout, the adjoint and
the reward.  ``micro_batch`` and ``reward_batch`` bound how many states are in work, whatever K and
B are, and ``offload`` keeps between them on the CPU what has been computed.  None of them changes
the result beyond rounding.

Modes.  The module is in evaluation mode in its trajectories and in the loss, like the base: what a
network drops or normalises by its batch would be in v_θ and not in v_β.  Only the dropout of
trained adapters (`adjoint.lora`) is on in the loss.  The module is left so, as a backward pass may
evaluate it again.

Several processes (`flows.training.distributed`).  Options count trajectories of all processes
together, of which each takes its share, with noise of its own: R processes minimise what one does.
Importance weights, the variance of the refinement, and the metrics ``ess`` and ``log_weight_std``
are those of the joined batch.  The running cap follows the mean of the processes' quantiles, each
keeps its share of the replay buffer, and each draws its own subset of the early steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from adjoint.certificate import path_log_ratio
from adjoint.chain.adjoints import Adjoint, lean_adjoint
from adjoint.chain.control_variates import control_variates
from adjoint.chain.kernels import Kernel
from adjoint.chain.rollout import Trajectory, chunks, draw_noise, rollout, rows_of, velocity_along
from adjoint.config import TiltConfig
from adjoint.loss import (
    adjoint_matching_loss,
    importance_weights,
    log_variance_loss,
    select_steps,
)
from adjoint.models.lora import prepare_dropout
from adjoint.rewards.reward import Reward
from adjoint.rewards.sums import total
from adjoint.trajectory_buffer import TrajectoryBuffer
from flows.field import Cond, VelocityField
from flows.training import distributed
from flows.training.loss import Loss
from flows.training.sharding import is_sharded

CondSampler = Callable[[int, torch.Generator], Cond]

COMPILED_FORMS = 64
"""Shapes and modes for which the code of one class of fields is compiled, of all tilts."""

GROUP = 8
"""Trajectories that share a condition where the spread of their log-weights is the loss."""


class TiltLoss(Loss):
    """The adjoint-matching loss on fresh or replayed trajectories, as a trainer calls it.

    Arguments:
        base: frozen velocity field.
        reward: scaled reward (temperature included).
        kernel: table of the chain.
        refine_kernel: table of the chain in the refinement; ``kernel`` if None.
        shape: of one sample, without the batch.
        config: the options of training.
        cond_sampler: draws conditions for n samples; None for an unconditional flow.
        dtype: of the SDE state and the adjoint.
        known_rewards: (n,) of samples that are the same in every run of this tilt, by which a
            resume knows the reward again.

    Raises:
        ValueError: several processes refine under conditions with less than two trajectories each,
            or a sharded base is to be compiled (a sharded model: when the loss is first called).
    """

    def __init__(
        self,
        base: VelocityField,
        reward: Reward,
        kernel: Kernel,
        *,
        shape: tuple[int, ...],
        config: TiltConfig,
        refine_kernel: Kernel | None = None,
        cond_sampler: CondSampler | None = None,
        dtype: torch.dtype = torch.float32,
        known_rewards: Tensor | None = None,
    ) -> None:
        self.known_rewards = None if known_rewards is None else known_rewards.cpu()
        self.base = compiled(base) if config.compile else base
        self.reward = reward
        self._compiled: dict[nn.Module, VelocityField] = {}
        self.shape, self.config, self.cond_sampler = shape, config, cond_sampler
        self.dtype, self.device = dtype, kernel.t.device
        self.storage_device = torch.device("cpu") if config.offload else self.device
        self._kernels = {"match": kernel, "refine": refine_kernel or kernel}
        self.batch_size = distributed.share(config.batch_size)
        if config.refine_fraction and cond_sampler is not None and self.batch_size < 2:
            raise ValueError(
                "refine compares trajectories under one condition: batch_size must be at least "
                f"{2 * distributed.size()} for {distributed.size()} processes, "
                f"got {config.batch_size}"
            )
        self.calls = 0
        self.cap: Tensor | None = None
        self.buffer: TrajectoryBuffer | None = None
        if config.replay_size:
            capacity = distributed.share(config.replay_size)
            dims = {"xs": 1, "values": 1, "v_base": 1, "control_variate": 1}
            self.buffer = TrajectoryBuffer(capacity, dims, device=self.storage_device)

    def _rollout(
        self, module: nn.Module, n: int, groups: int, generator: torch.Generator
    ) -> tuple[Trajectory, Cond | None]:
        """``n`` fresh trajectories and their conditions, ``groups`` of them each repeated."""
        device = generator.device
        x0 = torch.randn((n, *self.shape), generator=generator, dtype=self.dtype, device=device)
        cond = None
        if self.cond_sampler is not None:
            cond = self.cond_sampler(groups, generator)
            repeats = n // groups
            if repeats > 1:
                cond = {name: c.repeat_interleave(repeats, 0) for name, c in cond.items()}
        noise = draw_noise(self.kernel, x0, generator=generator).to(self.storage_device)
        module.eval()  # no dropout in the trajectories, no statistics from them
        trajectory = rollout(
            self._field(module),
            self.base,
            self.kernel,
            x0.to(self.storage_device),
            noise,
            cond,
            micro_batch=self.config.micro_batch,
            device=self.device,
        )
        return trajectory, rows_of(cond, slice(None), self.storage_device)

    def _rewards(
        self, x: Tensor, cond: Cond | None, *, gradient: bool
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Terms (B,) of the reward at samples x (B, *), and its gradient; in the state's dtype."""
        terms: list[dict[str, Tensor]] = []
        slopes: list[Tensor] = []
        for i in chunks(len(x), self.config.reward_batch):
            part, some = x[i].to(self.device), rows_of(cond, i, self.device)
            if gradient:
                found, slope = self.reward.terms_and_gradient(part, some)
                slopes.append(slope)
            else:
                found = self.reward.terms(part, some)
            terms.append(found)
        values = {name: torch.cat([found[name] for found in terms]) for name in terms[0]}
        values = {name: value.to(self.storage_device, self.dtype) for name, value in values.items()}
        return values, torch.cat(slopes).to(self.storage_device, self.dtype) if slopes else None

    def collect(self, module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """A batch of fresh trajectories: xs, values, v_base, log_w, reward, kl, conditions."""
        n = self.batch_size
        trajectory, cond = self._rollout(module, n, n, generator)
        terms, gradient = self._rewards(trajectory.xs[-1], cond, gradient=True)
        assert gradient is not None
        value = total(terms)
        carry = partial(
            lean_adjoint,
            self.base,
            self.kernel,
            trajectory.xs,
            cond=cond,
            noise=trajectory.noise,
            micro_batch=self.config.micro_batch,
            device=self.device,
        )
        adjoint = carry(-gradient)
        known = {}
        if self.config.control_variates:
            variates = self._variates(module, trajectory, -gradient, cond)
            noise = carry(torch.zeros_like(gradient), control_variates=variates).values
            if (
                self.kernel.residual_at_next
            ):  # the residual of a step sees the noise of that step too
                noise[1:] += variates
            known["control_variate"] = noise
        log_ratio, kl = path_log_ratio(trajectory, adjoint.v_base, self.kernel_on_storage)
        return {
            "xs": trajectory.xs[:-1],
            "values": adjoint.values,
            "v_base": adjoint.v_base,
            "log_w": value + log_ratio,
            "reward": value,
            "kl": kl,
            **known,
            **_named(terms),
            **{f"cond.{name}": c for name, c in (cond or {}).items()},
        }

    def _variates(
        self, module: nn.Module, trajectory: Trajectory, end: Tensor, cond: Cond | None
    ) -> Tensor:
        """Control variates (K, B, *) by the model that made the trajectory and ends at ``end``."""

        def terminal(x: Tensor) -> Tensor:
            gradient = self._rewards(x, cond, gradient=True)[1]
            assert gradient is not None
            return -gradient

        return control_variates(
            self._field(module),
            self.base,
            self.kernel,
            trajectory,
            end,
            terminal,
            cond,
            micro_batch=self.config.micro_batch,
            device=self.device,
        )

    def _batch(self, module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh trajectories, or replayed ones when the buffer says so."""
        if self.buffer is None:
            return self.collect(module, generator)
        if self.calls % self.config.losses_per_rollout == 0 or not self.buffer.size:
            self.buffer.add(self.collect(module, generator))
        return self.buffer.draw(self.batch_size, generator=generator)

    def __call__(
        self, module: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of ``module`` on one batch, and metrics."""
        evaluate = {"match": self._match, "refine": self._refine}[self.phase]
        loss, metrics = evaluate(module, generator)
        self.calls += 1
        return loss, metrics

    @property
    def phase(self) -> Literal["match", "refine"]:
        """Which loss the next call takes."""
        restart = self.config.restart
        refining = restart is not None and self.calls >= restart * self.config.accumulate
        return "refine" if refining else "match"

    def _match(
        self, module: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The adjoint-matching loss."""
        config = self.config
        batch = self._batch(module, generator)
        steps = self._select(generator)
        cond = {n.removeprefix("cond."): c for n, c in batch.items() if n.startswith("cond.")}
        prepare_dropout(module)
        v = self._velocity(self._field(module), batch["xs"], steps, cond or None)
        clip: Tensor | float | None = config.clip or None
        if config.clip_quantile:
            clip = self.cap
        weights = None
        if config.importance:
            log_w = distributed.gather(batch["log_w"])
            weights = distributed.own(importance_weights(log_w, min_ess=config.min_ess))
        loss, metrics = adjoint_matching_loss(
            v,
            Adjoint(batch["values"], batch["v_base"]),
            self.kernel_on_storage,
            steps=steps,
            weights=weights,
            clip=clip,
            control_variate=batch.get("control_variate"),
        )
        if config.clip_quantile:
            seen = metrics["term_quantile"]
            distributed.average_([seen])
            self.cap = seen if self.cap is None else 0.99 * self.cap + 0.01 * seen
        terms = {name: v.mean() for name, v in batch.items() if name.startswith("reward.")}
        return loss, metrics | _judged(batch["reward"], batch["log_w"], batch["kl"]) | terms

    def _refine(
        self, module: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Half the variance of log w, within conditions, on fresh trajectories.

        Where the loss is taken on some of the steps, the other steps enter log w as numbers: the
        gradient in each step's control vanishes at the optimum by itself.
        """
        n, groups, several = self.batch_size, 1, 1
        if self.cond_sampler is not None:
            groups = max(1, n // GROUP)
            n, several = groups * (n // groups), distributed.size()
        trajectory, cond = self._rollout(module, n, groups, generator)
        with torch.no_grad():
            v_base = self._velocity(self.base, trajectory.xs[:-1], None, cond)
            terms, _ = self._rewards(trajectory.xs[-1], cond, gradient=False)
        value = total(terms)
        steps = self._select(generator)
        prepare_dropout(module)
        v = self._velocity(self._field(module), trajectory.xs[:-1], steps, cond)
        if steps is not None:
            v = trajectory.v.index_copy(0, steps.to(v.device), v)
        log_ratio, kl = path_log_ratio(trajectory, v_base, self.kernel_on_storage, v)
        log_w = value + log_ratio
        metrics = _judged(value, log_w.detach(), kl.detach())
        metrics |= {name: v.mean() for name, v in _named(terms).items()}
        return log_variance_loss(distributed.gather(log_w), groups * several), metrics

    @property
    def kernel(self) -> Kernel:
        """Table of the chain that the next call rolls out."""
        return self._kernels[self.phase]

    @property
    def kernel_on_storage(self) -> Kernel:
        """The same where trajectories are kept."""
        return self.kernel.to(self.storage_device)

    def _field(self, module: nn.Module) -> VelocityField:
        """What evaluates ``module``: itself, or its compiled form, which shares its weights."""
        if not self.config.compile:
            return module
        if module not in self._compiled:
            self._compiled = {module: compiled(module)}
        return self._compiled[module]

    def _select(self, generator: torch.Generator) -> Tensor | None:
        """Indices of the steps whose velocities get a gradient; None for all."""
        late, early = self.config.late_fraction, self.config.early_fraction
        if late == 1 or early == 1:
            return None
        return select_steps(
            self.kernel.steps, late_fraction=late, early_fraction=early, generator=generator
        )

    def _velocity(
        self, field: VelocityField, xs: Tensor, steps: Tensor | None, cond: Cond | None
    ) -> Tensor:
        """Velocities (S, B, *) of ``field`` at the selected of the states (K, B, *)."""
        times = self.kernel.t[:-1]
        if steps is not None:
            xs, times = xs[steps.to(xs.device)], times[steps.to(times.device)]
        micro_batch = self.config.micro_batch
        v = velocity_along(field, xs, times, cond, micro_batch=micro_batch, device=self.device)
        return v.to(self.dtype)

    def state_dict(self) -> dict[str, object]:
        """Counter, cap, this process's replay buffer and the known rewards, for a checkpoint."""
        return {
            "processes": distributed.size(),
            "device": self.device.type,
            "known_rewards": self.known_rewards,
            "calls": self.calls,
            "cap": self.cap,
            "buffer": None if self.buffer is None else self.buffer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave; what another number of processes replayed is left out.

        Warns where the known rewards are others, unless another number of processes, or another
        kind of device, drew the samples.
        """
        as_many = state.get("processes", 1) == distributed.size()
        if as_many and state.get("device") == self.device.type:
            self._compare(state.get("known_rewards"))
        self.calls = int(state["calls"])  # type: ignore[call-overload]
        cap = state["cap"]
        self.cap = cap.to(self.storage_device) if isinstance(cap, Tensor) else None
        if self.buffer is not None and isinstance(state["buffer"], dict) and as_many:
            self.buffer.load_state_dict(state["buffer"])

    def _compare(self, known: object) -> None:
        """Warn of a checkpoint of another reward; a constant or a little noise more is none."""
        if not isinstance(known, Tensor) or self.known_rewards is None:
            return
        was, now = known - known.mean(), self.known_rewards - self.known_rewards.mean()
        if bool((now - was).norm() > 0.1 * was.norm() + 1e-3 * known.norm()):
            warnings.warn(
                "the reward is not the one that the checkpoint was trained with, or its conditions "
                f"are others: of the same samples of the base it was {known[:3].tolist()} and so "
                f"on, and is {self.known_rewards[:3].tolist()}; training goes on toward the latter",
                stacklevel=2,
            )


def compiled(field: VelocityField) -> VelocityField:
    """``field`` compiled for the shapes that it will be given; parameters are shared.

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


def _named(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The terms of a composite reward as metrics; none for a single one, which is the reward."""
    return {f"reward.{name}": value for name, value in terms.items()} if len(terms) > 1 else {}


def _judged(reward: Tensor, log_w: Tensor, kl: Tensor) -> dict[str, Tensor]:
    """What a batch of trajectories says about the tilt, as the certificate does; (B,) each."""
    log_w = distributed.gather(log_w)
    relative = torch.softmax(log_w, 0)
    return {
        "reward": reward.mean(),
        "path_kl": kl.mean(),
        "log_weight_std": log_w.std(correction=0),
        "ess": 1 / (len(relative) * relative.square().sum()),
    }
