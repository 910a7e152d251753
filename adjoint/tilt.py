"""Tilt a base flow toward a reward in one call.

``tilt(base, reward, shape=(2,))`` has four steps, each a function of its own: it checks its
arguments (`adjoint.arguments.check_arguments`, and `adjoint.checks.checked_model` at a few states),
measures the base (`adjoint.preparation.prepare_tilt`), trains a copy of the base or a residual on
it with `flows.training.Trainer` on `TiltLoss` (`fit_tilt`), and certifies the result before and
after training (`adjoint.certify_tilt`).  Each level is usable by itself: your own trainer
takes `TiltLoss`, your own loss takes `rollout`, `lean_adjoint` and `adjoint_matching_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from adjoint.arguments import Arguments, Identity, check_arguments
from adjoint.certify_tilt import certify_tilt
from adjoint.chain.kernels import KERNELS, Kernel, Scheme, find_scheme, table_fingerprint
from adjoint.checks import checked_model, draw_states
from adjoint.config import TiltConfig
from adjoint.models.lora import adapter_scales
from adjoint.preparation import Preparation, prepare_tilt
from adjoint.reward_record import RewardRecord
from adjoint.rewards.reward import ValueFunction
from adjoint.tilt_loss import TiltLoss
from adjoint.tilted import Tilted
from adjoint.trajectory_source import CondSampler
from flows.field import VelocityField
from flows.training import GradientGraph, Trainer, distributed
from flows.training.callbacks import Callback, default_callbacks, describe_stop
from flows.weights import fingerprint


@torch.inference_mode(False)
@torch.enable_grad()
def tilt(
    base: VelocityField,
    reward: ValueFunction,
    *,
    shape: tuple[int, ...],
    config: TiltConfig | None = None,
    model: nn.Module | None = None,
    cond_sampler: CondSampler | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    resume: bool = False,
    identity: Identity | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tilted:
    """Tilt ``base`` toward ``reward``: p*(x) ∝ p(x) exp(r(x) / temperature).

    The base must be the flow of independent noise, v = E[X_1 - X_0 | X_t] with X_0 independent of
    X_1: then its memoryless chain and its ODE sample one distribution.  Flows trained with
    optimal-transport couplings, reflowed, distilled or guided are not; for them the result is the
    tilt of the distribution of their *chain*.  The judgement of the result says where ODE and chain
    of the base disagree.

    Started by ``torchrun``, the processes do this together (`flows.training.distributed`): the
    numbers of ``config`` are totals, of which each takes its share, the first process writes the
    checkpoint, and every one returns the same weights and the certificate of all trajectories.
    Every process must make the same call.  Gradients are recorded whatever the mode of the caller,
    under `torch.no_grad` too.

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
        callbacks: progress bar and loggers of `flows.training`.  On a terminal a progress
            bar is added.  With one, a line says beforehand what the tilt costs
            (`adjoint.estimate_cost`), and the work before and after training shows a bar too.
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

    Warns:
        UserWarning: the judgement of the result (`adjoint.judgement`) is not good, with what speaks
            against it.
    """
    callbacks = default_callbacks(callbacks, description="tilt")
    arguments = check_arguments(
        base,
        reward,
        shape=shape,
        config=config,
        model=model,
        cond_sampler=cond_sampler,
        callbacks=callbacks,
        checkpoint=checkpoint,
        resume=resume,
        identity=identity,
        device=device,
        dtype=dtype,
    )
    model = checked_model(arguments, base, model, *draw_states(arguments))
    preparation = prepare_tilt(arguments)
    field, stopped = fit_tilt(
        arguments,
        preparation,
        model,
        callbacks=callbacks,
        checkpoint=checkpoint,
        resume=resume,
        identity=identity,
    )
    return certify_tilt(arguments, preparation, field, stopped=stopped)


def fit_tilt(
    arguments: Arguments,
    preparation: Preparation,
    model: nn.Module,
    *,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    resume: bool = False,
    identity: Identity | None = None,
) -> tuple[nn.Module, str | None]:
    """Train ``model`` on the loss of the tilt.

    Arguments:
        model: velocity field that starts at the base; trained in place.
        callbacks, checkpoint, resume, identity: see `tilt`.

    Returns:
        The averaged weights as a module, and where and why a callback stopped the training.
    """
    config = preparation.cost.config
    record = RewardRecord(preparation.rewards[:64], arguments.device.type)
    loss = TiltLoss(
        arguments.base,
        arguments.reward,
        preparation.kernel,
        shape=arguments.shape,
        config=config,
        refine_kernel=preparation.refine_kernel,
        cond_sampler=arguments.cond_sampler,
        dtype=arguments.dtype,
        companions={"rewards": record},
        progress=arguments.progress,
    )
    trainer = Trainer(
        model,
        loss,
        config,
        callbacks=callbacks,
        checkpoint=checkpoint,
        identity={
            **config.fixed_options(),
            **_table_of("kernel_table", preparation.kernel, config.kernel),
            **_table_of("refine_table", preparation.refine_kernel, config.chain_kernel),
            **{f"identity.{k}": v for k, v in (identity or {}).items()},
            "shape": list(arguments.shape),
            "base": _fingerprint(arguments.base),
            "adapters": adapter_scales(model),
        },
        save_frozen=False,  # the caller has them
        restart=config.refine_from,
    )
    backward = GradientGraph(trainer) if config.cuda_graphs else None
    return trainer.fit(resume=resume, backward=backward), describe_stop(trainer)


def _table_of(label: str, kernel: Kernel, chosen: str | Scheme) -> dict[str, str]:
    """Return, by a label, the fingerprint of the table of a scheme that measures nothing.

    Only schemes of one's own have one: their table holds what their description may not, such as
    attributes of the class.  Tables of measured moments are left out: rounding differs between
    machines.
    """
    scheme = find_scheme(chosen)
    if scheme.needs or scheme.name in KERNELS:
        return {}
    return {label: table_fingerprint(kernel)}


def _fingerprint(base: VelocityField) -> str | None:
    """Return the fingerprint of the base's weights and buffers; None if it has none."""
    if not isinstance(base, nn.Module):
        return None
    held = dict(base.named_parameters()) | dict(base.named_buffers())
    return fingerprint(distributed.whole(held)) if held else None
