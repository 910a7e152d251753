"""The cost of a tilt, said beforehand, and sizes that follow the cost of the base.

A tilt evaluates base and model at many states: N_b (100 + K) to sample the base by its ODE and to
measure its mean squared errors, some 3 K B in each update, 6 K N_r for the samples of the
refinement, and 3 K N_c for the two certificates (10 N_c for the ODE samples that are compared with
them).  For a network in the plane N_b = 8192, N_r = 16384 and N_c = 4096 take seconds; for a
network of images they take longer than many a training.  So the sizes that the options leave open
are the largest powers of two with which each part stays below `BUDGET` floating-point operations,
down to `LEAST` samples: the errors of what they estimate fall with the number of entries, which a
large sample has many of.  Operations are counted, not timed, so that the sizes are the same on
every machine and in every resume.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adjoint.arguments import Arguments, check_arguments
from adjoint.chain.kernels import (
    CovarianceMatched,
    MomentMatched,
    Scheme,
    find_scheme,
    gaussian_kernel,
)
from adjoint.checks import check_field, draw_states
from adjoint.config import TiltConfig
from adjoint.micro_batches import rows_of
from adjoint.trajectory_source import CondSampler
from flows import grid as grids
from flows.field import Cond, VelocityField

Number = TypeVar("Number", int, float)

BUDGET = 5e11
"""Floating-point operations of the samples before training, and of the certificates."""

LEAST = 64
"""Fewest samples that are chosen."""

MOST_BASE_SAMPLES, MOST_CERTIFICATE_SAMPLES, MOST_AT_A_TIME = 8192, 4096, 4096
"""Most samples that are chosen."""

MOST_REFINE_SAMPLES = 16384
"""Most trajectories that are chosen for the refinement by flow matching."""

SMALL = 3
"""Entries of a sample up to which the chain of the refinement has the full covariance."""

FINER = (8, 4, 2)
"""Steps of the chain of the refinement as multiples of the training chain's, where affordable."""

ENTRIES_AT_A_TIME = 2**18
"""Entries of the samples that are evaluated at a time, where the options leave it open."""

PATH_ENTRIES_AT_A_TIME = 2**24
"""Entries of the states of these samples along a chain; four tensors of that size are held."""

ODE_EVALUATIONS = 100
"""Evaluations of the base for an ODE sample: 50 steps of the midpoint rule."""


COMPARED_SHARE = 4
"""Trajectories of a certificate for each ODE sample that is compared with it."""

COMPARED_STEPS = 20
"""Steps of the two-step Adams-Bashforth method, of one evaluation each, in these samples."""


@dataclass(frozen=True)
class Cost:
    """The cost of a tilt: evaluations, and estimates of time and memory.

    An evaluation is a forward pass of base or model at one state.

    Attributes:
        config: options with their open sizes chosen.
        before: evaluations before training.
        per_update: evaluations in one update, the mean over the training; where ``refine_loss`` is
            "auto", with the dearer of the two losses that it chooses from.
        after: evaluations after training.
        seconds: estimates of the time before training, in it, and after it; without the reward.
        memory: estimate of the memory of an update, bytes; None where it is unknown.
    """

    config: TiltConfig
    before: int
    per_update: int
    after: int
    seconds: tuple[float, float, float]
    memory: int | None

    def __str__(self) -> str:
        """Return one sentence with the cost, and the options that lower it."""
        updates = self.config.iterations
        before, during, after = (_duration(s) for s in self.seconds)
        memory = "" if self.memory is None else f"; about {_size(self.memory)} in an update"
        return (
            f"evaluations of the velocity: {self.before:,} before training (about {before}; fewer "
            f"with base_samples < {self.config.base_samples}), {self.per_update:,} in each of "
            f"{updates:,} updates (about {during} in all; fewer with a smaller batch_size, steps, "
            f"iterations or refine_samples), {self.after:,} after (about {after}; fewer with "
            f"certificate_samples < {self.config.certificate_samples}){memory} (less with "
            "micro_batch)"
        )


def estimate_cost(
    base: VelocityField,
    *,
    shape: tuple[int, ...],
    config: TiltConfig | None = None,
    cond_sampler: CondSampler | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Cost:
    """Return the cost of a tilt of ``base``, from a few evaluations.

    The arguments are those of `adjoint.tilt`.

    Raises:
        TypeError, ValueError: the arguments do not fit.
    """
    arguments = check_arguments(
        base,
        lambda x, cond: x.flatten(1).sum(1),
        shape=shape,
        config=config,
        cond_sampler=cond_sampler,
        device=device,
        dtype=dtype,
    )
    check_field(arguments.base, *draw_states(arguments), "base")
    return measure_cost(arguments)


def measure_cost(arguments: Arguments) -> Cost:
    """Return the cost of a tilt, with the sizes that its options leave open chosen.

    Arguments:
        arguments: checked arguments, whose base has passed `adjoint.checks.check_field`.
    """
    x, cond = draw_states(arguments)
    seconds = _seconds(arguments, x, cond)
    x, cond = x[:4], rows_of(cond, slice(4))
    config = chosen_sizes(arguments.config, x[0].numel(), _flops(arguments.base, x, cond))
    before, (forward, passes), after = _evaluations(config, x[0].numel())
    activations = _activations(arguments.base, x, cond)
    memory = None
    if activations is not None:
        states = config.batch_size * config.steps
        kept = 5 * states * x[0].numel() * x.element_size()
        memory = kept + activations * min(states, config.micro_batch or states)
    return Cost(
        config=config,
        before=before,
        per_update=forward,
        after=after,
        seconds=(before * seconds, passes * config.iterations * seconds, after * seconds),
        memory=memory,
    )


def chosen_sizes(config: TiltConfig, dim: int, flops: float | None) -> TiltConfig:
    """Return the options with the open sizes chosen.

    Arguments:
        dim: number of entries of a sample.
        flops: floating-point operations of an evaluation at one state; None where unknown.
    """
    each = max(flops or 0.0, 1.0)

    def size(given: int | None, evaluations: int, most: int) -> int:
        return _power(BUDGET / (each * evaluations), LEAST, most) if given is None else given

    if config.refine_updates and config.refine_loss != "log_variance":
        if config.refine_kernel is None:
            small = dim <= SMALL and config.kernel == MomentMatched.name
            full = CovarianceMatched.name if small else config.kernel
            config = replace(config, refine_kernel=full)
        final, noise = config.refine_steps, _noise(config.chain_kernel, dim)
        if final is None:
            affordable = BUDGET / (each * (3 + 2 * noise) * MOST_REFINE_SAMPLES)
            final = next((m * config.steps for m in FINER if m * config.steps <= affordable), None)
        final = final or config.steps
        trained = config.iterations * config.accumulate * config.batch_size * config.steps
        most = min(MOST_REFINE_SAMPLES, max(LEAST, 2 * trained // final))
        drawn = size(config.refine_samples, final * (3 + 2 * noise), most)
        config = replace(config, refine_steps=final, refine_samples=drawn)
    to_sample = ODE_EVALUATIONS + sum({config.steps, config.chain_steps})

    at_a_time = config.eval_batch_size
    if at_a_time is None:
        path = config.chain_steps * dim * max(1, _noise(config.chain_kernel, dim))
        affordable = min(ENTRIES_AT_A_TIME / dim, PATH_ENTRIES_AT_A_TIME / path)
        at_a_time = _power(affordable, 16, MOST_AT_A_TIME)
    return replace(
        config,
        base_samples=size(config.base_samples, to_sample, MOST_BASE_SAMPLES),
        certificate_samples=size(
            config.certificate_samples, 3 * config.chain_steps, MOST_CERTIFICATE_SAMPLES
        ),
        eval_batch_size=at_a_time,
    )


def _noise(kernel: str | Scheme, dim: int) -> int:
    """Return the number of states at which the noise of one step evaluates the base."""
    return dim if find_scheme(kernel).state_noise else 0  # its Jacobian is of dim states


def _power(value: float, least: int, most: int) -> int:
    """Return the largest power of two that is at most ``value``, within two bounds."""
    return int(2 ** math.floor(math.log2(min(max(value, least), most))))


def _evaluations(config: TiltConfig, dim: int) -> tuple[int, tuple[int, float], int]:
    """Return the evaluations before training, in an update, and after training.

    In an update they are forward passes, and the time of its passes as multiples of one: a backward
    pass counts as one more where only states have gradients, else as two.
    """
    steps, final = config.steps, config.chain_steps
    needs = find_scheme(config.kernel).needs | find_scheme(config.chain_kernel).needs
    n, certified = config.base_samples or 0, config.certificate_samples or 0
    before = n * ODE_EVALUATIONS
    if "mmse" in needs:
        before += n * sum({steps, final})
    if "covariance" in needs:
        before += n
    noise, fine_noise = _noise(config.kernel, dim), _noise(config.chain_kernel, dim)
    after = certified * final * (3 + 2 * fine_noise)
    after += 2 * (certified // COMPARED_SHARE) * COMPARED_STEPS  # ODE of base and model
    rolled, backward = steps * (1 + noise), float(steps * (1 + noise))
    table = gaussian_kernel(config.kernel, grids.shifted(steps, config.shift), dim=dim)
    adjoint = rolled + steps - sum(table.own_time)  # elsewhere the base is evaluated once more
    if config.control_variates:
        adjoint, backward = 2 * adjoint + 3 * (steps - 1), 2 * backward
    rate = config.losses_per_rollout
    late, early = config.late_fraction, config.early_fraction

    def in_loss(steps: int) -> int:
        late_steps = round(late * steps)
        return late_steps + round(early * (steps - late_steps))

    def again(states: int) -> int:
        return states if 0 < config.micro_batch < states * config.batch_size else 0

    matched = in_loss(steps)
    match = (rolled + adjoint) / rate + matched + again(matched)
    match_passes = match + backward / rate + 2 * matched
    if config.refine_loss == "log_variance":
        refined = in_loss(final)
        refine: float = final * (2 + fine_noise) + refined + again(refined)
    else:  # the samples are drawn twice
        refined = steps
        drawn = 2 * (config.refine_samples or 0) * final * (3 + 2 * fine_noise)
        calls = config.refine_updates * config.accumulate
        refine = refined + again(refined) + drawn / max(1, calls * config.batch_size)
    refine_passes = refine + 2 * refined
    if config.refine_loss == "auto":  # it may go on with adjoint matching instead
        refine, refine_passes = max(refine, match), max(refine_passes, match_passes)
    part = 0.0 if config.refine_from is None else 1 - config.refine_from / max(1, config.iterations)
    each = config.batch_size * config.accumulate
    forward = each * ((1 - part) * match + part * refine)
    passes = each * ((1 - part) * match_passes + part * refine_passes)
    return before, (round(forward), passes), after


def _flops(field: VelocityField, x: Tensor, cond: Cond | None) -> float | None:
    """Return the floating-point operations of one evaluation at one state.

    Matrix products, convolutions and attention are counted; None where that is not possible.  The
    evaluation records gradients and takes attention apart: fused operations are not counted.
    """

    def count() -> float:
        plain = sdpa_kernel(SDPBackend.MATH)
        with torch.enable_grad(), plain, FlopCounterMode(display=False) as counter:
            field(x.detach().requires_grad_(True), torch.tensor(0.5).to(x), cond)
        return counter.get_total_flops() / len(x)

    return _if_possible(count)


def _activations(field: VelocityField, x: Tensor, cond: Cond | None) -> int | None:
    """Return the bytes that one state keeps for a backward pass to the weights; None if unknown."""
    named = dict(field.named_parameters()) if isinstance(field, nn.Module) else {}
    trained = {name: p.detach().requires_grad_(True) for name, p in named.items()}
    weights = {p.data_ptr() for p in trained.values()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    def count() -> int:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            inputs = (x.detach().requires_grad_(True), torch.tensor(0.5).to(x), cond)
            if isinstance(field, nn.Module):  # the base is frozen, but the model is its copy
                v = functional_call(field, trained, inputs)
            else:
                v = field(*inputs)
        del v
        return sum(kept.values()) // len(x)

    return _if_possible(count)


def _if_possible(count: Callable[[], Number]) -> Number | None:
    """Return the result of ``count``; None where the operations of a field cannot be watched."""
    try:
        return count()
    except (RuntimeError, NotImplementedError, TypeError, AttributeError):
        return None


@torch.no_grad()
def _seconds(arguments: Arguments, x: Tensor, cond: Cond | None) -> float:
    """Return the time of an evaluation at one of the states x (B, *), by the clock of the wall."""
    t = torch.tensor(0.5).to(x)
    taken = []
    for _ in range(2):
        _wait(x.device)
        start = time.perf_counter()
        arguments.base(x, t, cond)
        _wait(x.device)
        taken.append(time.perf_counter() - start)
    return min(taken) / len(x)


def _wait(device: torch.device) -> None:
    """Wait for the work of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _duration(seconds: float) -> str:
    """Return a time in its natural unit."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def _size(count: int) -> str:
    """Return a number of bytes in its natural unit."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
