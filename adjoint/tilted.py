"""The result of a tilt: the tilted flow with its certificates, and samples of it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adjoint.arguments import Arguments
from adjoint.certificate import Certificate, certify, log_mean_exp
from adjoint.chain.kernels import Kernel
from adjoint.checks import draw_conditions
from adjoint.config import TiltConfig
from adjoint.evaluator import Evaluator, RewardEvaluator
from adjoint.exact_samples import check_request, sample_exact
from adjoint.preparation import Preparation
from adjoint.rejection import CUT, MAX_TRAJECTORIES
from adjoint.rewards.reward import AbstractReward
from flows.field import Cond, VelocityField
from flows.sampling import sample
from flows.training import distributed

PER_CONDITION = 64
"""Trajectories of a certificate that share a condition."""


@dataclass(frozen=True)
class Tilted:
    """A tilted flow and how good it is.

    Attributes:
        field: tilted velocity field (the averaged weights, in evaluation mode).
        base: the frozen base.
        reward: scaled reward, r / temperature.
        kernel: chain it was trained and certified on.
        certificate: certificate after training; None if certificate_samples is 0.
        certificate_base: certificate before training, of the untilted base as the tilt.
        shape: of one sample.
        config: options of the run, with the sizes that were left open chosen.
        log_z_ode, log_z_ode_stderr: log mean e^r over ODE samples of the base.  It must agree with
            the certificates' log_z, up to the error of the grid, if the base is the flow that the
            method assumes; see `tilt`.  With conditions, the logarithm of the mean of Z(c), where
            the certificates have the mean of log Z(c).
        dtype: of the state, which weights of half the precision do not have.
        stopped: where and why a callback stopped the training; None if it ran to its end.
    """

    field: nn.Module
    base: VelocityField
    reward: AbstractReward
    kernel: Kernel
    certificate: Certificate | None
    certificate_base: Certificate | None
    shape: tuple[int, ...]
    config: TiltConfig
    log_z_ode: float
    log_z_ode_stderr: float
    dtype: torch.dtype
    stopped: str | None = None

    def sample(
        self,
        n: int,
        *,
        grid: Tensor | int = 100,
        method: str = "midpoint",
        cond: Cond | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return ``n`` samples (n, *) by the ODE of the tilted flow; see `flows.sampling.sample`.

        Conditions have leading size n, or 1, which stands for n times the same.

        The certificate is of the chain; its own samples are ``certificate.samples``, and those of
        the exact tilt `sample_exact`.
        """
        check_request(n, cond, generator)
        if cond is not None:
            cond = {
                name: c.expand(n, *c.shape[1:]) if len(c) == 1 else c for name, c in cond.items()
            }
        home = next(self.field.parameters()).device
        device = home if generator is None else generator.device
        x0 = torch.randn((n, *self.shape), generator=generator, dtype=self.dtype, device=device)
        field = Evaluator(self.field, self.config.micro_batch)
        return sample(field.at, x0.to(home), grid=grid, method=method, cond=cond)

    def sample_exact(
        self,
        n: int,
        *,
        distribution: str = "chain",
        cut: float = CUT,
        cond: Cond | None = None,
        max_trajectories: int = MAX_TRAJECTORIES,
        generator: torch.Generator | None = None,
        progress: bool | None = None,
    ) -> Tensor:
        """Return ``n`` independent samples (n, *) of the exact tilt of the base's chain or ODE.

        Samples of the tilted flow are accepted by their weights (`adjoint.exact_samples`): the
        better the tilt, the more of them.  ``adjoint.rejection.acceptance`` of the certificate's
        log-weights says how many.  Under a condition, which the certificate knows nothing of, at
        least as many trajectories are needed as count 1/cut effective samples.

        Arguments:
            distribution: "chain" draws the tilt of the base's chain, in the steps of ``kernel``,
                for some 2 K evaluations a trajectory.  "flow" draws the tilt of the base's own ODE,
                up to the error of the solver; a trajectory takes some hundred evaluations, each
                with a backward pass for every dimension.
            cut: largest total variation between the distribution of the samples and the exact tilt,
                as far as the weights tell; a warning says where they do not.
            cond: for a conditional flow, one condition, of leading size 1.
            max_trajectories: the call is refused where more trajectories are expected; from the
                certificate's weights that is known before the first one.
            generator: on the device of the model.
            progress: show a bar with the expected time; None shows one on a terminal.

        Raises:
            TypeError, ValueError: as `adjoint.exact_samples.sample_exact`.
        """
        config = self.config
        assert config.eval_batch_size is not None
        known = self.certificate if distribution == "chain" and cond is None else None
        return sample_exact(
            Evaluator(self.field, config.micro_batch),
            Evaluator(self.base, config.micro_batch),
            RewardEvaluator(self.reward, config.reward_batch),
            self.kernel,
            n,
            like=torch.empty(self.shape, dtype=self.dtype, device=self.kernel.t.device),
            distribution=distribution,
            seen=known.log_weights if known else None,
            cut=cut,
            cond=cond,
            batch_size=config.eval_batch_size,
            max_trajectories=max_trajectories,
            generator=generator,
            progress=progress,
        )

    def __str__(self) -> str:
        """Return the two certificates as a table, and why the training was stopped, if it was."""
        stopped = [] if self.stopped is None else [self.stopped]
        if self.certificate is None or self.certificate_base is None:
            sizes = f"tilted flow, kernel {self.kernel.name}, {self.kernel.steps} steps"
            return "\n".join([sizes, *stopped])
        before, after = self.certificate_base.summary(), self.certificate.summary()
        for column in (before, after):
            column["reward"] *= self.config.temperature
        rows = [f"{name:<18}{before[name]:>12.4f}{after[name]:>12.4f}" for name in after]
        rows = [f"{'':<18}{'base':>12}{'tilted':>12}", *rows]
        if self.certificate.groups == 1:  # of conditions it is another mean
            error = f"± {self.log_z_ode_stderr:.4f}"
            rows.append(f"{'log_z by ODE':<18}{self.log_z_ode:>12.4f}{error:>12}")
        return "\n".join([*rows, *stopped])


def certify_tilt(
    arguments: Arguments,
    preparation: Preparation,
    field: nn.Module,
    *,
    stopped: str | None = None,
) -> Tilted:
    """Return the tilted flow ``field`` with its certificates before and after training.

    Arguments:
        arguments, preparation: of the tilt.
        field: tilted velocity field.
        stopped: where and why a callback stopped the training.

    Warns:
        UserWarning: ODE and chain of the base disagree about log Z.
    """
    before, after = (_certificate(arguments, preparation, v) for v in (arguments.base, field))
    log_z, error, _ = log_mean_exp(preparation.rewards)
    if before is not None and distributed.rank() == 0:  # with conditions, both of log E Z(c)
        _compare_log_z(log_z, error, before)
    return Tilted(
        field=field,
        base=arguments.base,
        reward=arguments.reward,
        kernel=preparation.refine_kernel,
        certificate=after,
        certificate_base=before,
        shape=arguments.shape,
        config=preparation.cost.config,
        log_z_ode=log_z,
        log_z_ode_stderr=error,
        dtype=arguments.dtype,
        stopped=stopped,
    )


def _certificate(
    arguments: Arguments, preparation: Preparation, field: VelocityField
) -> Certificate | None:
    """Return a certificate with noise that depends only on the seed; None if it has no samples.

    With conditions it has groups of `PER_CONDITION` trajectories under one condition.
    """
    config, device = preparation.cost.config, arguments.device
    assert config.certificate_samples is not None
    assert config.eval_batch_size is not None
    n = distributed.share(config.certificate_samples)
    if not n:
        return None
    generator = torch.Generator(device).manual_seed(distributed.seed_of(config.seed + 2))
    groups = 1
    if arguments.cond_sampler is not None:  # two at least, of two at least
        groups = max(1, min(n // 2, max(2, n // PER_CONDITION)))
    n = groups * (n // groups)
    x0 = torch.randn(
        (n, *arguments.shape), generator=generator, dtype=arguments.dtype, device=device
    )
    cond = None
    if arguments.cond_sampler is not None:
        few = draw_conditions(arguments.cond_sampler, groups, generator)
        cond = {name: c.repeat_interleave(n // groups, 0) for name, c in few.items()}
    return certify(
        arguments.evaluator(field),
        arguments.evaluator(arguments.base),
        arguments.reward_evaluator,
        preparation.refine_kernel,
        x0,
        cond=cond,
        groups=groups,
        batch_size=config.eval_batch_size,
        generator=generator,
        progress=arguments.progress,
    )


def _compare_log_z(log_z: float, error: float, chain: Certificate) -> None:
    """Warn where ODE and chain of the base disagree about log E Z(c), and both know it."""
    by_chain, by_chain_error = chain.log_z, chain.log_z_stderr
    if chain.groups > 1:  # the error is that of as many conditions
        of_each = chain.grouped.logsumexp(1) - math.log(chain.grouped.shape[1])
        by_chain, by_chain_error, _ = log_mean_exp(of_each)
    if abs(log_z - by_chain) > max(0.1, 5 * math.hypot(error, by_chain_error)):
        warnings.warn(
            f"the base's ODE gives log Z = {log_z:.3f} ± {error:.3f}, its memoryless chain "
            f"{by_chain:.3f} ± {by_chain_error:.3f}: the tilt is that of the chain's distribution. "
            "Either the grid is coarse (more steps), or the base is not the flow of independent "
            "noise (optimal-transport coupling, reflow, distillation, guidance)",
            stacklevel=4,
        )
