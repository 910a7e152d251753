r"""Approaches a strong or far reward by falling temperatures.

A tilt learns from trajectories of its own model.  Where the reward is many nats above anything that
these reach, they say little about the tilt, and the first updates run off or stand still.  Between
base and tilt lie the tilts at higher temperatures

    p_s(x) ∝ p(x) exp(s r(x) / T),        s from 0 (the base) to 1 (the tilt at temperature T),

and `anneal` makes one from another: stage i trains on the tilt p_s_i of the *base*, but starts with
the model of stage i - 1, so that errors of the stages do not add up.

The next s is measured.  The certificate of a stage holds samples of its chain with log-weights
log w for p_s; those for p_s' are log w + (s' - s) r / T.  The next s' is the one at which the
effective sample size falls to a given part of what it was, a half: then the tilt p_s' is well in
reach of the samples at hand.  For a reward that shifts a Gaussian by m standard deviations this
takes m / .83 stages, however strong it is.

When it stops.  If r grows faster than -log p, exp(s r / T) has no finite mean under the base beyond
some s* < 1, and there is no tilt to reach.  Two measurements tell.  The weights that lead from a
stage to the whole reward, w e^{(1 - s) r / T}, have a finite mean only if the shape k of their tail
(`adjoint.pareto`) is below 1.  But shapes above 1 are common where the goal is merely far, since
finite samples do not see how a tail ends.  Then the stages go on at an equal or growing pace; near
s*, where the spread of r diverges, they shrink like a geometric series, whose limit says how far
they come.  So a run stops where in `PATIENCE` stages one after another the shape is above 1 and the
series of the steps ends below s = 1; and also where a stage has fewer than `LEAST_ESS` of its
samples effective, or after a given number of stages.

Sources: annealed importance sampling (Neal, "Annealed importance sampling", 2001), and the choice
of temperatures by the effective sample size as in Del Moral, Doucet and Jasra ("An adaptive
sequential Monte Carlo method for approximate Bayesian computation", 2012).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from adjoint.arguments import Identity
from adjoint.certificate import Certificate, log_mean_exp
from adjoint.config import TiltConfig
from adjoint.pareto import tail_shape
from adjoint.rewards.reward import ValueFunction
from adjoint.tilt import tilt
from adjoint.tilted import Tilted
from adjoint.trajectory_source import CondSampler
from flows.field import VelocityField
from flows.training.callbacks import Callback, Training
from flows.training.sharding import is_sharded
from flows.weights import copy_sharing

KEPT = 0.5
"""Part of the effective sample size that is left by the step to the next stage."""

PATIENCE = 3
"""Stages one after another that must tell that there is no tilt to reach."""

LEAST_ESS = 0.05
"""Effective sample size / N of a stage below which the next one is not begun."""

MOST_STAGES = 30
"""Most stages that are made."""


class _TrainedNames(Callback):
    """Remembers which weights of a tilt are trained, for the next one to go on with."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_start(self, trainer: Training) -> None:
        """Note the names of the weights that require gradients."""
        self.names = {name for name, p in trainer.module.named_parameters() if p.requires_grad}

    def to_train(self, field: nn.Module) -> nn.Module:
        """Return a copy of a tilted field whose weights of these names require gradients.

        It shares the others with the field.  A sharded field cannot be copied and goes on itself.
        """
        if is_sharded(field):
            return field
        named = field.named_parameters()
        copied = copy_sharing(field, [p for name, p in named if name not in self.names])
        for name, parameter in copied.named_parameters():
            parameter.requires_grad_(name in self.names)
        return copied


@dataclass(frozen=True)
class Stage:
    """The numbers of one stage of an annealed tilt.

    Attributes:
        fraction: s, the part of the reward r / T that the stage has.
        temperature: T / s.
        ess: effective sample size / N of its certificate.
        log_weight_std: standard deviation of log w of its certificate.
        tail_shape: shape k of the tail of the weights that lead from here to the whole reward.
    """

    fraction: float
    temperature: float
    ess: float
    log_weight_std: float
    tail_shape: float


@dataclass(frozen=True)
class Annealed:
    """The tilt that falling temperatures have reached.

    Attributes:
        tilted: the tilt of the last stage.
        stages: numbers of the stages, in order.
        stopped: why the goal was not reached; None where it was.
    """

    tilted: Tilted
    stages: tuple[Stage, ...]
    stopped: str | None

    def __str__(self) -> str:
        """Return a table of the stages, and why they stopped."""
        rows = [f"{'fraction':>9}{'temperature':>13}{'ESS':>7}{'std(log w)':>12}{'tail':>7}"]
        rows += [
            f"{s.fraction:>9.4f}{s.temperature:>13.4g}{s.ess:>7.2f}{s.log_weight_std:>12.3f}"
            f"{s.tail_shape:>7.2f}"
            for s in self.stages
        ]
        return "\n".join([*rows, *([] if self.stopped is None else [self.stopped])])


def anneal(
    base: VelocityField,
    reward: ValueFunction,
    *,
    shape: tuple[int, ...],
    config: TiltConfig | None = None,
    kept: float = KEPT,
    stage_iterations: int | None = None,
    most_stages: int = MOST_STAGES,
    model: nn.Module | None = None,
    cond_sampler: CondSampler | None = None,
    callbacks: Sequence[Callback] = (),
    folder: str | Path | None = None,
    resume: bool = False,
    identity: Identity | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Annealed:
    """Tilt ``base`` toward a strong reward, by tilts at falling temperatures (module docstring).

    Arguments:
        base, reward, shape, model, cond_sampler, callbacks, identity, device, dtype: as for
            `adjoint.tilt`.
        config: options of the last stage, whose temperature is the goal.  It must have
            certificates, which the next temperature is read from.
        kept: part of the effective sample size that is left by a step, between 0 and 1: the
            smaller, the fewer stages.
        stage_iterations: updates of the stages before the last; None is a third of those of the
            last.
        most_stages: number of stages after which to stop.
        folder: where each stage keeps its checkpoint; with ``resume`` the stages that are
            finished there are not trained again, and one that was interrupted goes on.

    Raises:
        ValueError: ``kept`` is not between 0 and 1, ``most_stages`` or ``stage_iterations`` is not
            positive, there are no certificates, or ``resume`` has no folder.
        TypeError, ValueError, CheckpointError, TrainingDiverged: as `adjoint.tilt`.

    Warns:
        UserWarning: the judgement of the last stage is not good; or the goal was not reached.
    """
    config = TiltConfig() if config is None else config
    if not 0 < kept < 1:
        raise ValueError(f"kept must lie between 0 and 1, got {kept}")
    if most_stages < 1:
        raise ValueError(f"most_stages must be at least 1, got {most_stages}")
    if config.certificate_samples == 0:
        raise ValueError("certificate_samples must be positive: temperatures are read from them")
    if resume and folder is None:
        raise ValueError("resume must be False without folder, where the stages are kept")
    updates = max(1, config.iterations // 3) if stage_iterations is None else stage_iterations
    if updates < 1:
        raise ValueError(f"stage_iterations must be at least 1, got {updates}")

    trained = _TrainedNames()

    def tilt_to(fraction: float, iterations: int, start: nn.Module | None, number: int) -> Tilted:
        options = replace(config, temperature=config.temperature / fraction, iterations=iterations)
        file = None if folder is None or not number else Path(folder) / f"stage_{number}.pt"
        with warnings.catch_warnings():
            if fraction < 1 or not number:  # the last stage is judged, the others lead there
                warnings.filterwarnings("ignore", message="judgement")
            return tilt(
                base,
                reward,
                shape=shape,
                config=options,
                model=start,
                cond_sampler=cond_sampler,
                callbacks=[*(callbacks if number else ()), trained],
                checkpoint=file,
                resume=resume and file is not None,
                identity={**(identity or {}), "stage": number},
                device=device,
                dtype=dtype,
            )

    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    tilted = tilt_to(1.0, 0, model, 0)  # the base as it is, with the whole reward in its weights
    assert tilted.certificate is not None
    log_w, rewards = torch.zeros_like(tilted.certificate.grouped), tilted.certificate.grouped
    stages: list[Stage] = []
    fractions, shapes = [0.0], [tail_shape(rewards.flatten())]
    stopped = None
    while fractions[-1] < 1 and stopped is None:
        fraction = next_fraction(log_w, rewards, fractions[-1], kept)
        last = fraction == 1
        tilted = tilt_to(
            fraction,
            config.iterations if last else updates,
            trained.to_train(tilted.field),
            len(stages) + 1,
        )
        certificate = tilted.certificate
        assert certificate is not None
        log_w, rewards = certificate.grouped, _rewards(certificate) / fraction
        fractions.append(fraction)
        shapes.append(tail_shape((log_w + (1 - fraction) * rewards).flatten()))
        stages.append(
            Stage(
                fraction,
                config.temperature / fraction,
                certificate.ess,
                certificate.log_weight_std,
                shapes[-1],
            )
        )
        if tilted.stopped is not None:
            stopped = tilted.stopped
        elif not last:
            stopped = reason_to_stop(fractions, shapes, certificate.ess, most_stages)
    if stopped is not None:
        reached = config.temperature / fractions[-1]
        stopped = (
            f"stopped at {fractions[-1]:.3f} of the reward, temperature {reached:.4g} for "
            f"{config.temperature:.4g}: {stopped}"
        )
        warnings.warn(stopped, stacklevel=2)
    return Annealed(tilted, tuple(stages), stopped)


def next_fraction(log_w: Tensor, rewards: Tensor, fraction: float, kept: float) -> float:
    """Return the fraction of the reward at which a part of the effective sample size is left.

    Arguments:
        log_w: (G, N) log-weights of samples for the tilt at ``fraction``, in groups.
        rewards: (G, N) whole scaled rewards of these samples.
        fraction: s, the part of the reward that the tilt has.
        kept: the part of the effective sample size that is to be left.

    Returns:
        A fraction above s; 1 where all of the reward leaves as much.
    """

    def ess(step: float) -> float:
        return log_mean_exp(log_w + step * rewards)[2]

    enough, low, high = kept * ess(0.0), 0.0, 1 - fraction
    if ess(high) >= enough:
        return 1.0
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if ess(middle) >= enough else (low, middle)
    return fraction + high


def reason_to_stop(
    fractions: Sequence[float], shapes: Sequence[float], ess: float, most_stages: int
) -> str | None:
    """Return why no further stage should be begun; None where one should.

    Arguments:
        fractions: s of the base, 0, and of all stages.
        shapes: shapes of the tails of the weights that lead from each of them to s = 1.
        ess: effective sample size / N of the last stage.
        most_stages: number of stages after which to stop.
    """
    ends = [_limit(fractions[:i]) for i in range(3, len(fractions) + 1)][-PATIENCE:]
    without_mean = len(ends) == PATIENCE and min(shapes[-PATIENCE:]) > 1 and max(ends) < 1
    if without_mean:
        return (
            f"the weights of the whole reward have a tail of shape k = {shapes[-1]:.2f}, and the "
            f"steps end at {ends[-1]:.3f} of it: exp(r) seems to have no finite mean under the "
            "base there (a reward that grows faster than the base's log-density falls), so that "
            "there is no tilt to reach"
        )
    if ess < LEAST_ESS:
        tail = f" (and the tail to the whole reward has shape {shapes[-1]:.2f})"
        return (
            f"only {ess:.2g} of the samples of this stage are effective: train the stages longer "
            f"(stage_iterations), or take smaller steps (kept nearer to 1)"
            f"{tail if shapes[-1] > 1 else ''}"
        )
    if len(fractions) > most_stages:
        return f"{most_stages} stages have been made (most_stages)"
    return None


def _limit(fractions: Sequence[float]) -> float:
    """Return where a series ends whose steps go on shrinking as the last two did."""
    before, last = fractions[-2] - fractions[-3], fractions[-1] - fractions[-2]
    return fractions[-1] + last * last / (before - last) if last < before else math.inf


def _rewards(certificate: Certificate) -> Tensor:
    return certificate.rewards.double().reshape(certificate.groups, -1)
