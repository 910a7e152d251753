"""Evaluation of fields and rewards some states at a time, on the device where they are.

A model that fills a device is evaluated in micro-batches: it never sees more than ``micro_batch``
states at once, so that the activations of these are all that is held.  Where the states are kept
elsewhere (on the CPU), each micro-batch is moved to the model and its result back.  Neither changes
a number beyond rounding.

`Evaluator` wraps a velocity field and `RewardEvaluator` a reward; everything in this package that
takes a field takes an evaluator of one as well.  So how large a batch may be, and where the model
is, is said once, where the evaluator is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from adjoint.micro_batches import chunks, rows_of
from adjoint.rewards.reward import AbstractReward
from flows.autodiff import velocity_and_vjp
from flows.field import Cond, VelocityField

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Evaluator:
    """A velocity field, how many states it is given at a time, and where it is.

    Attributes:
        field: velocity field.
        micro_batch: states at a time; 0 is all.
        device: device of the field; None where it is on the device of the states.
    """

    field: VelocityField
    micro_batch: int = 0
    device: torch.device | None = None

    @staticmethod
    def of(field: VelocityField | Evaluator) -> Evaluator:
        """Return an evaluator of ``field``, or ``field`` itself if it is one."""
        return field if isinstance(field, Evaluator) else Evaluator(field)

    def at(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Return velocities (B, *) at states x (B, *) and one time t (), on the device of x."""
        if not self.micro_batch and self.device is None:
            return self.field(x, t, cond)
        t = t.to(self.device or x.device)
        return self.map(lambda x, cond: (self.field(x, t, cond),), x, cond=cond)[0]

    def velocity_and_vjp(
        self, x: Tensor, t: Tensor, cotangent: Tensor, cond: Cond | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the velocity v(x, t) and product (∂v/∂x)ᵀ cotangent, each (B, *), both detached.

        One forward and one backward pass for each micro-batch; t is one time ().
        """
        t = t.to(self.device or x.device)

        def run(x: Tensor, cotangent: Tensor, cond: Cond | None) -> Results:
            return velocity_and_vjp(self.field, x, t, cotangent, cond)

        v, product = self.map(run, x, cotangent, cond=cond)
        return v, product

    def pullbacks(
        self, xs: Tensor, t: Tensor, cond: Cond | None = None
    ) -> Callable[[int, Tensor], tuple[Tensor, Tensor]]:
        """Return a function (k, cotangent) -> (v, Jᵀ cotangent) at the states xs[k] and times t[k].

        A field with the method ``linearised`` (`flows.field`) makes the forward passes of all
        states at once, unless there are more of them than in a micro-batch.

        Arguments:
            xs: (S, B, *) states.
            t: (S,) times.
        """
        linearised = getattr(self.field, "linearised", None)
        if linearised is None or 0 < self.micro_batch < xs.shape[0] * xs.shape[1]:
            times = t.unbind()
            return lambda k, cotangent: self.velocity_and_vjp(xs[k], times[k], cotangent, cond)
        device = self.device or xs.device
        vs, pull = linearised(xs.to(device), t.to(device), rows_of(cond, slice(None), device))

        def at_step(k: int, cotangent: Tensor) -> tuple[Tensor, Tensor]:
            return vs[k].to(xs.device), pull(k, cotangent.to(device)).to(xs.device)

        return at_step

    def along(self, xs: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Return velocities (S, B, *) at states xs (S, B, *) and times t (S,).

        All are evaluated in one batch of S·B, or in micro-batches of these.  A field that
        ``broadcasts`` (`flows.field`) gets states and times as they are, and so computes what
        depends on the time alone S times; any other gets a time for each of the S·B states.

        Where a gradient is recorded, each micro-batch is evaluated again in the backward pass,
        which so holds the activations of one at a time.
        """
        steps, batch = xs.shape[:2]
        states, device = xs.flatten(0, 1), self.device or xs.device
        times = t.to(xs.dtype)
        if not 0 < self.micro_batch < len(states):
            moved = rows_of(cond, slice(None), device)
            if getattr(self.field, "broadcasts", False):
                return self.field(xs.to(device), times[:, None].to(device), moved).to(xs.device)
            repeated = None
            if moved is not None:
                repeated = {n: repeat(c, "b ... -> (s b) ...", s=steps) for n, c in moved.items()}
            v = self.field(states.to(device), times.repeat_interleave(batch).to(device), repeated)
            return v.to(xs.device).reshape(xs.shape)

        def rows(i: slice) -> Tensor:
            return torch.arange(i.start, min(i.stop, len(states)))

        def evaluate(some_times: Tensor, i: slice) -> Tensor:
            some = rows_of(cond, rows(i) % batch, device)
            return self.field(states[i].to(device), some_times, some).to(xs.device)

        # Of its arguments `checkpoint` keeps the tensors, and takes from them whose random state
        # and autocast to restore: the times, which are small and on the device, serve for both.
        parts = [
            checkpoint(evaluate, times[rows(i) // batch].to(device), i, use_reentrant=False)
            for i in chunks(len(states), self.micro_batch)
        ]
        return torch.cat(parts).reshape(xs.shape)

    def map(
        self, function: Callable[..., Results], *states: Tensor, cond: Cond | None = None
    ) -> Results:
        """Return the joined results of ``function(*states, cond)`` for micro-batches of states.

        Arguments:
            function: takes tensors (n, *) and conditions on the device of the field and returns
                a tuple of tensors (n, ...).
            states: tensors (B, *) on one device, to which the results (B, ...) are moved.
            cond: conditions with leading size B.
        """
        home = states[0].device
        device = self.device or home
        parts = [
            [part.to(home) for part in function(*(s[i].to(device) for s in states), some)]
            for i in chunks(len(states[0]), self.micro_batch)
            for some in (rows_of(cond, i, device),)
        ]
        return tuple(parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True)))


def velocity_along(
    field: VelocityField | Evaluator, xs: Tensor, t: Tensor, cond: Cond | None = None
) -> Tensor:
    """Return velocities (S, B, *) at states xs (S, B, *) and times t (S,), in one batch."""
    return Evaluator.of(field).along(xs, t, cond)


@dataclass(frozen=True)
class RewardEvaluator:
    """A reward, of how many samples it is evaluated at a time, and where it is.

    Attributes:
        reward: the reward.
        batch: samples at a time; 0 is all.
        device: device of the reward; None where it is on the device of the samples.
    """

    reward: AbstractReward
    batch: int = 0
    device: torch.device | None = None

    def __call__(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        """Return rewards (B,) of samples x (B, *), on their device."""
        return self.value_and_info(x, cond)[0]

    def value_and_info(
        self, x: Tensor, cond: Cond | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the rewards (B,) of samples x (B, *), and the values of several terms."""
        parts = [self.reward.value_and_info(*part) for part in self._parts(x, cond)]
        values, infos = zip(*parts, strict=True)
        return torch.cat(values).to(x.device), _joined(infos, x.device)

    def value_and_gradient(
        self, x: Tensor, cond: Cond | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return rewards (B,), gradients (B, *) and the values of the terms at samples x (B, *).

        All are detached and on the device of x.
        """
        parts = [self.reward.value_and_gradient(*part) for part in self._parts(x, cond)]
        values, gradients, infos = zip(*parts, strict=True)
        home = x.device
        return torch.cat(values).to(home), torch.cat(gradients).to(home), _joined(infos, home)

    def _parts(self, x: Tensor, cond: Cond | None) -> list[tuple[Tensor, Cond | None]]:
        device = self.device or x.device
        return [(x[i].to(device), rows_of(cond, i, device)) for i in chunks(len(x), self.batch)]


def _joined(infos: tuple[dict[str, Tensor], ...], device: torch.device) -> dict[str, Tensor]:
    """Return the values of the terms for the whole batch from those of its parts."""
    return {name: torch.cat([info[name] for info in infos]).to(device) for name in infos[0]}
