"""The result of a tilt: the tilted flow with its certificates, and samples of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adjoint.certificate import Certificate
from adjoint.chain.kernels import Kernel
from adjoint.config import TiltConfig
from adjoint.evaluator import Evaluator, RewardEvaluator
from adjoint.exact_samples import check_request, sample_exact
from adjoint.judgement import Judgement
from adjoint.rejection import CUT, MAX_TRAJECTORIES
from adjoint.rewards.reward import AbstractReward
from flows.field import Cond, VelocityField
from flows.sampling import sample

LABELS = {"log_z": "log_z (chain)", "log_z_stderr": "log_z_stderr (chain)"}
"""Names in the table of numbers of the certificate that say whose they are."""


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
        judgement: what the numbers allow to conclude; None without certificate.
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
    judgement: Judgement | None = None
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
        """Return the certificates as a table, the judgement, and why the training was stopped."""
        stopped = [] if self.stopped is None else [self.stopped]
        if self.certificate is None or self.certificate_base is None:
            sizes = f"tilted flow, kernel {self.kernel.name}, {self.kernel.steps} steps"
            return "\n".join([sizes, *stopped])
        before, after = self.certificate_base.summary(), self.certificate.summary()
        for column in (before, after):
            column["reward"] *= self.config.temperature
        rows = [f"{'':<22}{'base':>12}{'tilted':>12}"]
        for name, value in after.items():
            rows.append(f"{LABELS.get(name, name):<22}{before[name]:>12.4f}{value:>12.4f}")
        if self.judgement is not None:
            if self.certificate.groups == 1:  # of conditions it is another mean
                rows.extend(self._log_z_of_the_flow(self.judgement))
            rows.append(str(self.judgement))
        return "\n".join([*rows, *stopped])

    def _log_z_of_the_flow(self, judgement: Judgement) -> list[str]:
        """Return the rows with log Z by the base's ODE, and the chain's distance from it."""
        error = f"± {self.log_z_ode_stderr:.4f}"
        gap, joint = judgement.log_z_gap, judgement.log_z_gap_stderr
        errors = "error unknown"
        if 0 < joint < math.inf:
            errors = f"{gap / joint:.1f} joint standard errors"
        return [
            f"{'log_z (flow, by ODE)':<22}{self.log_z_ode:>12.4f}{error:>12}",
            f"{'log_z, chain - flow':<22}{gap:>12.4f}   {errors}",
        ]
