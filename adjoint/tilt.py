"""Tilt a base flow toward a reward in one call.

``tilt(base, reward, shape=(2,))`` checks its input, measures what the kernel needs of the base,
trains a copy of the base (or a zero-initialised residual on it) with `flows.training.Trainer` on
`TiltLoss`, and certifies the result before and after.  Each level is usable by itself: a trainer of
one's own takes `TiltLoss`, a loss of one's own takes `rollout`, `lean_adjoint` and
`adjoint_matching_loss`.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from adjoint.certificate import Certificate, certify, log_mean_exp
from adjoint.covariance import MAX_DIM
from adjoint.kernel import MATCHED, Kernel, make_kernel, measure_mmse
from adjoint.lora import adapter_scales
from adjoint.objective import CondSampler, TiltLoss
from adjoint.reward import Reward, ValueFunction, as_reward, check_reward
from adjoint.rollout import chunks, rows_of, velocity_along
from adjoint.tilt_config import TiltConfig
from flows import distributed
from flows import grid as grids
from flows.callbacks import Callback, ProgressBar, check_callbacks
from flows.checkpoint import ensure_writable
from flows.field import Cond, Residual, VelocityField, check_velocity, frozen
from flows.graphs import RecordedGradient
from flows.networks import MLPVelocity
from flows.sampling import sample
from flows.training import Trainer
from flows.weights import fingerprint

__all__ = ["CondSampler", "TiltConfig", "TiltLoss", "Tilted", "tilt", "trainable"]

FREE = (
    *("checkpoint_every", "certificate_samples", "max_batch"),
    *("micro_batch", "reward_batch", "offload", "compile", "graph"),  # no change beyond rounding
)
"""Options that a resumed run may change."""


@dataclass(frozen=True)
class Tilted:
    """A tilted flow and how good it is.

    Attributes:
        field: tilted velocity field (the averaged weights, in evaluation mode).
        base: the frozen base.
        kernel: chain it was trained and certified on.
        certificate: after; None if certificate_samples is 0.
        certificate_base: before: the untilted base judged as the tilt.
        shape: of one sample.
        config: options of the run.
        log_z_ode, log_z_ode_stderr: log mean e^r over ODE samples of the base.  It must agree with
            the certificates' log_z, up to the error of the grid, if the base is the flow that the
            method assumes; see `tilt`.
        dtype: of the state, which weights of half the precision do not have.
    """

    field: nn.Module
    base: VelocityField
    kernel: Kernel
    certificate: Certificate | None
    certificate_base: Certificate | None
    shape: tuple[int, ...]
    config: TiltConfig
    log_z_ode: float
    log_z_ode_stderr: float
    dtype: torch.dtype

    def sample(
        self,
        n: int,
        *,
        grid: Tensor | int = 100,
        method: str = "midpoint",
        cond: Cond | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``n`` samples (n, *) by the ODE of the tilted flow; see `flows.sampling.sample`.

        The certificate judges the chain; its own samples are ``certificate.samples``.
        """
        home = next(self.field.parameters()).device
        device = home if generator is None else generator.device
        x0 = torch.randn((n, *self.shape), generator=generator, dtype=self.dtype, device=device)
        field = _in_parts(self.field, self.config.micro_batch)
        return sample(field, x0.to(home), grid=grid, method=method, cond=cond)

    def __str__(self) -> str:
        """The two certificates as a table."""
        if self.certificate is None or self.certificate_base is None:
            return f"tilted flow, kernel {self.kernel.name}, {self.kernel.steps} steps"
        before, after = self.certificate_base.summary(), self.certificate.summary()
        for column in (before, after):
            column["reward"] *= self.config.temperature
        rows = [f"{name:<18}{before[name]:>12.4f}{after[name]:>12.4f}" for name in after]
        error = f"± {self.log_z_ode_stderr:.4f}"
        check = f"{'log_z by ODE':<18}{self.log_z_ode:>12.4f}{error:>12}"
        return "\n".join([f"{'':<18}{'base':>12}{'tilted':>12}", *rows, check])


def trainable(
    base: VelocityField,
    shape: tuple[int, ...],
    seed: int,
    *,
    cond: Cond | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """What is trained when the caller names no model; it starts at the base.

    A base with parameters is copied, and those of its parameters that require a gradient (all, if
    none does) are trained; one without (a closed form) gets a zero-initialised residual network of
    ``dtype`` that sees the conditions.

    Raises:
        ValueError: a base without parameters whose samples or conditions are not vectors.
    """
    if isinstance(base, nn.Module) and any(True for _ in base.parameters()):
        clone = copy.deepcopy(base)
        if not any(p.requires_grad for p in clone.parameters()):
            clone.requires_grad_(True)
        return clone
    sizes = {name: tuple(c.shape[1:]) for name, c in (cond or {}).items()}
    if len(shape) != 1 or any(len(size) != 1 for size in sizes.values()):
        raise ValueError(
            f"a base without parameters, samples of shape {shape} and conditions {sizes} needs "
            "model=, a module to train; only vectors get a residual network by default"
        )
    dims = {name: size[0] for name, size in sizes.items()}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = MLPVelocity(shape[0], cond_dims=dims, zero_init=True)
        return Residual(base, network.to(dtype))


def _shareable(base: nn.Module, model: nn.Module | None) -> nn.Module:
    """A frozen copy of ``base``; itself, if it is sharded and so cannot be copied.

    Raises:
        ValueError: a sharded base without a model, or with itself as the model.
    """
    if not distributed.is_sharded(base):
        return frozen(base)
    if model is None or any(part is base for part in model.modules()):
        raise ValueError(
            "a base sharded by fully_shard cannot be copied: give model= a module of its own, made "
            "in the same way and sharded too"
        )
    return base.eval().requires_grad_(False)


def _in_parts(field: VelocityField, size: int) -> VelocityField:
    """``field`` at scalar times, evaluated at ``size`` states at a time; itself if that is 0."""
    if not size:
        return field

    def evaluate(x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        return velocity_along(field, x[None], t.reshape(1), cond, micro_batch=size)[0]

    return evaluate


def _reward_in_parts(reward: Reward, size: int) -> ValueFunction:
    """The value of ``reward``, of ``size`` samples at a time; itself if that is 0."""
    if not size:
        return reward

    def value(x: Tensor, cond: Cond | None) -> Tensor:
        return torch.cat([reward(x[i], rows_of(cond, i)) for i in chunks(len(x), size)])

    return value


def _check_cond(cond: Cond, n: int) -> Cond:
    """The conditions of ``n`` samples that a sampler gave.

    Raises:
        TypeError: it is no mapping of names to tensors.
        ValueError: a tensor without the leading size n.
    """
    if not isinstance(cond, Mapping):
        raise TypeError(
            "cond_sampler(n, generator) must return a mapping of names to tensors of n conditions, "
            f"got {type(cond).__name__}"
        )
    for name, c in cond.items():
        if not isinstance(c, Tensor):
            raise TypeError(f"cond_sampler must return tensors, got {type(c).__name__} as {name!r}")
        if not c.ndim or len(c) != n:
            raise ValueError(
                f"cond_sampler must return {n} conditions {name!r}, got shape {tuple(c.shape)}"
            )
    return cond


def _home(base: VelocityField, model: nn.Module | None) -> torch.device:
    """Where the weights of the base are, or of the model; the CPU if they have none."""
    for field in (base, model):
        if isinstance(field, nn.Module):
            for tensor in (*field.parameters(), *field.buffers()):
                return tensor.device
    return torch.device("cpu")


@torch.no_grad()
def _check_field(field: VelocityField, x: Tensor, cond: Cond | None, name: str) -> None:
    """Evaluate ``field`` at a scalar time and at times (B,).

    Raises:
        TypeError, ValueError: wrong type or shape, or not finite.
    """
    for t in (torch.tensor(0.5).to(x), torch.full(x.shape[:1], 0.5).to(x)):
        try:
            v = field(x, t, cond)
        except (RuntimeError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{name} fails for x of shape {tuple(x.shape)} and {x.dtype} at a time of shape "
                f"{tuple(t.shape)}, called as {name}(x, t, cond) with times as scalars and as (B,) "
                f"and conditions {sorted(cond or {})}: {type(error).__name__}: {error}"
            ) from error
        if not bool(torch.isfinite(check_velocity(v, x, name)).all()):
            raise ValueError(f"{name} returned NaN or infinite velocities at t = 0.5 on noise")


def _probe(
    base: VelocityField,
    reward: Reward,
    shape: tuple[int, ...],
    config: TiltConfig,
    cond_sampler: CondSampler | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    progress: bool,
) -> tuple[Kernel, Kernel, Cond | None, Tensor]:
    """Check base and reward, and measure what the kernels need.

    Returns:
        The kernel of the regression, that of the chain that training ends with, conditions, and
        rewards of ODE samples of the base.

    Raises:
        TypeError, ValueError: as `tilt`.
    """
    n, size = distributed.share(config.probe_samples), config.max_batch
    if config.kernel == "covariance_matched" and math.prod(shape) > MAX_DIM:
        raise ValueError(
            f"kernel 'covariance_matched' serves up to {MAX_DIM} dimensions, got shape {shape}; "
            "use 'moment_matched'"
        )
    generator = torch.Generator(device).manual_seed(distributed.seed_of(config.seed + 1))
    x0 = torch.randn((n, *shape), generator=generator, dtype=dtype, device=device)
    cond = None if cond_sampler is None else _check_cond(cond_sampler(n, generator), n)
    few = slice(min(64, config.micro_batch or 64))
    _check_field(base, x0[few], rows_of(cond, few), "base")
    v_base = _in_parts(base, config.micro_batch)
    parts = [
        sample(v_base, x0[i], grid=50, method="midpoint", cond=rows_of(cond, i))
        for i in tqdm(chunks(n, size), desc="probe", disable=not progress, leave=False)
    ]
    x1 = torch.cat(parts)
    if not bool(torch.isfinite(x1).all()):
        raise ValueError("base does not lead to finite samples: its ODE from noise ends in NaN")
    for i in chunks(min(n, size), config.reward_batch):
        check_reward(reward, x1[i], rows_of(cond, i))
    value = _reward_in_parts(reward, config.reward_batch)
    with torch.no_grad():
        values = torch.cat([value(x1[i], rows_of(cond, i)) for i in chunks(n, size)])
    covariance = None
    if config.kernel == "covariance_matched":
        with torch.no_grad():  # about the mean, which at t = 0 is x + v, of each condition
            rest = x1 - (x0 + v_base(x0, torch.zeros(()).to(x0), cond))
            rest = distributed.gather(rest)
        covariance = torch.cov(rest.flatten(1).double().T.cpu()).reshape(2 * [x1[0].numel()])

    def on(steps: int) -> Kernel:
        grid, mmse = grids.shifted(steps, config.shift), None
        if config.kernel in MATCHED:
            mmse = measure_mmse(v_base, grid, x1, cond=cond, batch_size=size, generator=generator)
            distributed.average_([mmse])
        return make_kernel(config.kernel, grid, mmse=mmse, covariance=covariance).to(device)

    kernel = on(config.steps)
    fine = kernel if config.chain_steps == config.steps else on(config.chain_steps)
    return kernel, fine, cond, distributed.gather(values.double())


def tilt(
    base: VelocityField,
    reward: Reward | ValueFunction,
    *,
    shape: tuple[int, ...],
    config: TiltConfig | None = None,
    model: nn.Module | None = None,
    cond_sampler: CondSampler | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    resume: bool = False,
    problem: Mapping[str, str | int | float | bool | None] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tilted:
    """Tilt ``base`` toward ``reward``: p*(x) ∝ p(x) exp(r(x) / temperature).

    The base must be the flow of independent noise, v = E[X_1 - X_0 | X_t] with X_0 independent of
    X_1: then its memoryless chain and its ODE sample one law.  Flows trained with optimal-transport
    couplings, reflowed, distilled or guided are not; they are tilted as the law of their *chain*.
    The two estimates of log Z, by ODE samples and by the chain, tell: a warning says where they
    differ by more than five standard errors and a tenth of a nat.

    Started by ``torchrun``, the processes do this together (`flows.distributed`): the numbers of
    ``config`` are totals, of which each takes its share, the first process writes the checkpoint,
    and every one returns the same weights and the certificate of all trajectories.  Every process
    must make the same call.

    Arguments:
        base: velocity field on the canonical path; it is copied (but for the weights that one of
            `adjoint.lora` shares with its model) and never changed.
        reward: callable (x, cond) → (B,) or a `Reward`.
        shape: of one sample, without the batch.
        config: options.
        model: module to train, a velocity field that should start at the base; by default a copy
            of the base, or a residual on it where the base has no parameters.
        cond_sampler: (n, generator) → mapping of n conditions, for a conditional flow.
        callbacks: progress bar and loggers of `flows.callbacks`.  With a progress bar, what comes
            before and after training shows one too.
        checkpoint: file to save to; with ``resume`` training continues from it if it exists.  It
            leaves out the weights of the model that are not trained; a resume of a model with
            others, with adapters of another scale, or on another base is refused.
        problem: what identifies the run beside the options (names of base and reward, say); a
            checkpoint of another problem is refused.
        device, dtype: of the SDE state; by default where the base is, in float32.  The reward must
            live on that device.

    Raises:
        TypeError, ValueError: base, model or reward return the wrong type or shape, are not finite,
            or the reward is not differentiable; before any training.  With ``graph`` also after
            the first updates, where these cannot be recorded.
        CheckpointError: a checkpoint that is damaged or belongs to another problem.
        TrainingDiverged: loss or gradient became NaN; the last good checkpoint is kept.
    """
    config = TiltConfig() if config is None else config
    if not isinstance(config, TiltConfig):
        raise TypeError(f"config must be a TiltConfig, got {type(config).__name__}")
    if not isinstance(shape, tuple | list) or not all(isinstance(n, int) for n in shape):
        raise ValueError(f"shape must be a tuple of sizes such as (2,), got {shape!r}")
    if not shape:
        raise ValueError("shape must have a dimension, got (): numbers are vectors of shape (1,)")
    if cond_sampler is not None and not callable(cond_sampler):
        raise TypeError(
            "cond_sampler must be a callable (n, generator) -> mapping of n conditions, got "
            f"{type(cond_sampler).__name__}"
        )
    check_callbacks(callbacks)
    shape = tuple(shape)
    device = _home(base, model) if device is None else torch.device(device)
    if config.graph and device.type != "cuda":
        raise ValueError(f"graph must be False on device {device}: it needs cuda")
    distributed.start()
    if config.graph and distributed.size() > 1:
        raise ValueError(f"graph must be False with several processes, got {distributed.size()}")
    if checkpoint is not None:
        path = checkpoint
        distributed.from_first(lambda: ensure_writable(path, "checkpoint"))
    scaled = as_reward(reward).scaled(1 / config.temperature)
    original = base
    if isinstance(base, nn.Module):
        base = _shareable(base, model).to(device)
        distributed.broadcast_([*base.parameters(), *base.buffers()])
    progress = distributed.rank() == 0 and any(isinstance(c, ProgressBar) for c in callbacks)
    kernel, fine, cond, values = _probe(
        base, scaled, shape, config, cond_sampler, device, dtype, progress=progress
    )
    if model is None:
        model = trainable(original, shape, config.seed, cond=cond, dtype=dtype)
    model = distributed.unwrapped(model).to(device)
    generator = torch.Generator(device).manual_seed(0)
    x0 = torch.randn((4, *shape), generator=generator, dtype=dtype, device=device)
    few = slice(min(4, config.micro_batch or 4))
    _check_field(model.eval(), x0[few], rows_of(cond, few), "model")
    loss = TiltLoss(
        base,
        scaled,
        kernel,
        shape=shape,
        config=config,
        fine=fine,
        cond_sampler=cond_sampler,
        dtype=dtype,
    )
    options = {name: value for name, value in asdict(config).items() if name not in FREE}
    trainer = Trainer(
        model,
        loss,
        config,
        callbacks=callbacks,
        checkpoint=checkpoint,
        problem={
            **options,
            **{f"problem.{k}": v for k, v in (problem or {}).items()},
            "shape": list(shape),
            "base": _fingerprint(base),
            "adapters": adapter_scales(model),
        },
        save_frozen=False,  # the caller has them
    )
    field = trainer.fit(resume=resume, backward=RecordedGradient(trainer) if config.graph else None)
    judged = [_in_parts(v, config.micro_batch) for v in (base, field)]
    value = _reward_in_parts(scaled, config.reward_batch)
    judge = partial(certificate_of, device=device, dtype=dtype, progress=progress)
    before, after = (judge(v, judged[0], value, fine, shape, config, cond_sampler) for v in judged)
    log_z, error, _ = log_mean_exp(values)
    if before is not None and distributed.rank() == 0:  # with conditions, both of log E Z(c)
        _compare_log_z(log_z, error, before)
    return Tilted(field, base, fine, after, before, shape, config, log_z, error, dtype)


def _fingerprint(base: VelocityField) -> str | None:
    """What tells the base's weights and buffers from others; None if it has none."""
    if not isinstance(base, nn.Module):
        return None
    held = dict(base.named_parameters()) | dict(base.named_buffers())
    return fingerprint(distributed.whole(held)) if held else None


def _compare_log_z(log_z: float, error: float, chain: Certificate) -> None:
    """Warn where ODE and chain of the base disagree about log Z, and both know it."""
    gap = abs(log_z - chain.log_z)
    if gap > max(0.1, 5 * math.hypot(error, chain.log_z_stderr)):
        warnings.warn(
            f"the base's ODE gives log Z = {log_z:.3f} ± {error:.3f}, its memoryless chain "
            f"{chain.log_z:.3f} ± {chain.log_z_stderr:.3f}: the tilt is that of the chain's law. "
            "Either the grid is coarse (more steps), or the base is not the flow of independent "
            "noise (optimal-transport coupling, reflow, distillation, guidance)",
            stacklevel=3,
        )


def certificate_of(
    field: VelocityField,
    base: VelocityField,
    reward: Reward | ValueFunction,
    kernel: Kernel,
    shape: tuple[int, ...],
    config: TiltConfig,
    cond_sampler: CondSampler | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    progress: bool = False,
) -> Certificate | None:
    """Certificate with noise that depends only on the seed; None if no samples are asked for."""
    n = distributed.share(config.certificate_samples)
    if not n:
        return None
    generator = torch.Generator(device).manual_seed(distributed.seed_of(config.seed + 2))
    x0 = torch.randn((n, *shape), generator=generator, dtype=dtype, device=device)
    cond = None if cond_sampler is None else cond_sampler(n, generator)
    return certify(
        field,
        base,
        reward,
        kernel,
        x0,
        cond=cond,
        batch_size=config.max_batch,
        generator=generator,
        progress=progress,
    )
