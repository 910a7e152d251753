"""Tilt a base flow toward a reward in one call.

``tilt(base, reward, shape=(2,))`` checks its input, measures what the kernel needs of the base,
trains a copy of the base (or a zero-initialised residual on it) with `flows.training.fit.Trainer`
on `TiltLoss`, and certifies the result before and after.  Each level is usable by itself: a trainer
of one's own takes `TiltLoss`, a loss of one's own takes `rollout`, `lean_adjoint` and
`adjoint_matching_loss`.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from adjoint.certificate import Certificate, log_mean_exp
from adjoint.chain.rollout import rows_of
from adjoint.config import TiltConfig
from adjoint.evaluator import field_in_parts, reward_in_parts
from adjoint.models.lora import adapter_scales
from adjoint.preparation import check_field, probe
from adjoint.rewards.reward import Reward, ValueFunction, as_reward
from adjoint.tilt_loss import CondSampler, TiltLoss
from adjoint.tilted import Tilted, certificate_of
from flows.field import Cond, Residual, VelocityField, frozen
from flows.networks.mlp import MLPVelocity
from flows.training import Trainer, distributed
from flows.training.callbacks import Callback, ProgressBar, check_callbacks
from flows.training.checkpoint import ensure_writable
from flows.training.gradient_graph import GradientGraph
from flows.training.sharding import is_sharded
from flows.weights import fingerprint

__all__ = ["CondSampler", "TiltConfig", "TiltLoss", "Tilted", "tilt", "trainable"]


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
    if not is_sharded(base):
        return frozen(base)
    if model is None or any(part is base for part in model.modules()):
        raise ValueError(
            "a base sharded by fully_shard cannot be copied: give model= a module of its own, made "
            "in the same way and sharded too"
        )
    return base.eval().requires_grad_(False)


@torch.no_grad()
def _check_apart(base: VelocityField, model: nn.Module, x: Tensor, cond: Cond | None) -> None:
    """Refuse a base whose velocities follow the weights of the model that are trained.

    Raises:
        ValueError: they change with these weights, which are then put back.
    """
    t = torch.tensor(0.5).to(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = [p.clone() for p in trained]
    before, again = base(x, t, cond), base(x, t, cond)
    try:
        for p in trained:
            p.mul_(1.1).add_(0.01)
        after = base(x, t, cond)
    finally:
        for p, weight in zip(trained, kept, strict=True):
            p.copy_(weight)
    if torch.equal(before, again) and not torch.equal(before, after):
        raise ValueError(
            "base must not change while model is trained, but is a callable that evaluates weights "
            "of the model: give the module itself, or a copy, as the base"
        )


def device_of(base: VelocityField, model: nn.Module | None) -> torch.device:
    """Where the weights of the base are, or of the model; the CPU if they have none."""
    for field in (base, model):
        if isinstance(field, nn.Module):
            for tensor in (*field.parameters(), *field.buffers()):
                return tensor.device
    return torch.device("cpu")


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
    identity: Mapping[str, str | int | float | bool | None] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tilted:
    """Tilt ``base`` toward ``reward``: p*(x) ∝ p(x) exp(r(x) / temperature).

    The base must be the flow of independent noise, v = E[X_1 - X_0 | X_t] with X_0 independent of
    X_1: then its memoryless chain and its ODE sample one law.  Flows trained with optimal-transport
    couplings, reflowed, distilled or guided are not; they are tilted as the law of their *chain*.
    The two estimates of log Z, by ODE samples and by the chain, tell: a warning says where they
    differ by more than five standard errors and a tenth of a nat.

    Started by ``torchrun``, the processes do this together (`flows.training.distributed`): the
    numbers of ``config`` are totals, of which each takes its share, the first process writes the
    checkpoint, and every one returns the same weights and the certificate of all trajectories.
    Every process must make the same call.

    Arguments:
        base: velocity field on the canonical path.  A module is copied (but for the weights that
            one of `adjoint.lora` shares with its model) and never changed; another callable must
            not depend on what is trained.
        reward: callable (x, cond) → (B,) or a `Reward`.
        shape: of one sample, without the batch.
        config: options.
        model: module to train, a velocity field that should start at the base; by default a copy
            of the base, or a residual on it where the base has no parameters.
        cond_sampler: (n, generator) → mapping of n conditions, for a conditional flow.
        callbacks: progress bar and loggers of `flows.training.callbacks`.  With a progress bar,
        what comes
            before and after training shows one too.
        checkpoint: file to save to; with ``resume`` training continues from it if it exists.  It
            leaves out the weights of the model that are not trained; a resume of a model with
            others, with adapters of another scale, or on another base is refused, one toward
            another reward warned of.
        identity: what identifies the run beside the options (names of base and reward, say); a
            checkpoint of another run is refused.
        device, dtype: of the SDE state; by default where the base is, in float32.  The reward must
            live on that device.

    Raises:
        TypeError, ValueError: base, model or reward return the wrong type or shape, are not finite,
            or the reward is not differentiable; before any training.  With ``cuda_graphs`` also
            after the first updates, where these cannot be recorded.
        CheckpointError: a checkpoint that is damaged or belongs to another run.
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
    if resume and checkpoint is None:
        raise ValueError("resume must be False without checkpoint, the file to continue from")
    shape = tuple(shape)
    device = device_of(base, model) if device is None else torch.device(device)
    if config.cuda_graphs and device.type != "cuda":
        raise ValueError(f"cuda_graphs must be False on device {device}: it needs cuda")
    distributed.start()
    if config.cuda_graphs and distributed.size() > 1:
        raise ValueError(
            f"cuda_graphs must be False with several processes, got {distributed.size()}"
        )
    if checkpoint is not None:
        path = checkpoint
        distributed.from_first(lambda: ensure_writable(path, "checkpoint"))
    scaled = as_reward(reward).scaled(1 / config.temperature)
    original = base
    if isinstance(base, nn.Module):
        base = _shareable(base, model).to(device)
        distributed.broadcast_([*base.parameters(), *base.buffers()])
    progress = distributed.rank() == 0 and any(isinstance(c, ProgressBar) for c in callbacks)
    kernel, refine_kernel, cond, values = probe(
        base, scaled, shape, config, cond_sampler, device, dtype, progress=progress
    )
    if model is None:
        model = trainable(original, shape, config.seed, cond=cond, dtype=dtype)
    model = distributed.unwrapped(model).to(device)
    generator = torch.Generator(device).manual_seed(0)
    x0 = torch.randn((4, *shape), generator=generator, dtype=dtype, device=device)
    few = slice(min(4, config.micro_batch or 4))
    check_field(model.eval(), x0[few], rows_of(cond, few), "model")
    if not isinstance(base, nn.Module):  # modules are copies by now
        _check_apart(base, model, x0[few], rows_of(cond, few))
    loss = TiltLoss(
        base,
        scaled,
        kernel,
        shape=shape,
        config=config,
        refine_kernel=refine_kernel,
        cond_sampler=cond_sampler,
        dtype=dtype,
        known_rewards=values[:64],
    )
    trainer = Trainer(
        model,
        loss,
        config,
        callbacks=callbacks,
        checkpoint=checkpoint,
        identity={
            **config.fixed_options(),
            **{f"identity.{k}": v for k, v in (identity or {}).items()},
            "shape": list(shape),
            "base": _fingerprint(base),
            "adapters": adapter_scales(model),
        },
        save_frozen=False,  # the caller has them
    )
    field = trainer.fit(
        resume=resume, backward=GradientGraph(trainer) if config.cuda_graphs else None
    )
    judged = [field_in_parts(v, config.micro_batch) for v in (base, field)]
    value = reward_in_parts(scaled, config.reward_batch)
    judge = partial(certificate_of, device=device, dtype=dtype, progress=progress)
    before, after = (
        judge(v, judged[0], value, refine_kernel, shape, config, cond_sampler) for v in judged
    )
    log_z, error, _ = log_mean_exp(values)
    if before is not None and distributed.rank() == 0:  # with conditions, both of log E Z(c)
        _compare_log_z(log_z, error, before)
    return Tilted(
        field, base, scaled, refine_kernel, after, before, shape, config, log_z, error, dtype
    )


def _fingerprint(base: VelocityField) -> str | None:
    """What tells the base's weights and buffers from others; None if it has none."""
    if not isinstance(base, nn.Module):
        return None
    held = dict(base.named_parameters()) | dict(base.named_buffers())
    return fingerprint(distributed.whole(held)) if held else None


def _compare_log_z(log_z: float, error: float, chain: Certificate) -> None:
    """Warn where ODE and chain of the base disagree about log E Z(c), and both know it."""
    by_chain, by_chain_error = chain.log_z, chain.log_z_stderr
    if chain.groups > 1:  # the error is that of as many conditions
        of_each = chain.grouped.logsumexp(1) - math.log(chain.grouped.shape[1])
        by_chain, by_chain_error, _ = log_mean_exp(of_each)
    if abs(log_z - by_chain) > max(0.1, 5 * math.hypot(error, by_chain_error)):
        warnings.warn(
            f"the base's ODE gives log Z = {log_z:.3f} ± {error:.3f}, its memoryless chain "
            f"{by_chain:.3f} ± {by_chain_error:.3f}: the tilt is that of the chain's law. "
            "Either the grid is coarse (more steps), or the base is not the flow of independent "
            "noise (optimal-transport coupling, reflow, distillation, guidance)",
            stacklevel=3,
        )
