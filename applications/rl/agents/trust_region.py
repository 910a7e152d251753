r"""The trust region of a tilt: a multiplier that holds the policy's path KL at a budget.

The policy flow f solves

    max_f E Q - Λ KL(chain of f ‖ chain of b̄),      Λ = 3 λ,

which is the tilt by exp(Q/Λ): Λ is the temperature.  Adjoint matching finds it from the adjoint a
of Q by the residual residual_v (f - b̄) + residual_a a / Λ.  As published, the term of each step is
also multiplied by Λ, so that the loss is that of a chain with the noise σ = g/√Λ,

    L_AM = mean_B Σ_k ‖√Λ residual_v (f - b̄) + residual_a a / √Λ‖²
         = mean_B Σ_k ‖(2/σ_k)(f - b̄) + σ_k a_k‖²                (the published kernel).

λ itself is not in the simulated chain.  The path KL of two chains with one kernel, per action of
the chunk, is that of `adjoint.certificate.path_log_ratio`,

    D̂ = 1/h mean_B Σ_k ½ ‖(mean_v/std)_k (f - b̄)(s, x_k, t_k)‖²
       = 1/h mean_B Σ_k (2/(K g_k²)) ‖f - b̄‖²                   (the published kernel),

and dual ascent moves λ until D̂ is the budget ε:

    D̄ <- 0.9 D̄ + 0.1 min(D̂, 2ε),      λ <- clip(λ + 0.01 (D̄ - ε), 0.01, 100),

from D̄ = 0 and λ = 1.  A noiseless last step has no density ratio.  It counts all the same, by its
weight in the loss relative to that of the step before: with the published kernel this is 2/(K g²),
as published, and with a consistent one, which does not train that step, 0.

The KL of the actions is at most that of the paths.

Source: "TRQAM" (arXiv 2605.27079).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from adjoint import Kernel
from applications.rl.agents.options import AgentConfig, MatchingOptions
from applications.rl.agents.running_state import RunningState

SCALE = 3.0
"""Temperature Λ of a multiplier of 1."""

RATE = 0.01
"""Step of the dual ascent."""

AVERAGE_RATE = 0.1
"""Weight of the newest estimate in the average of the path KL."""

CAP = 2.0
"""Largest estimate that enters the average, in budgets."""

BOUNDS = (0.01, 100.0)
"""Smallest and largest multiplier."""


def path_kl(kernel: Kernel, control: Tensor) -> Tensor:
    """Compute the path KL (B,) in nats between two chains of one kernel.

    Arguments:
        kernel: table of both chains, without a state-dependent noise.
        control: (K, B, d) difference of their velocities at the states of the first.
    """
    noisy = kernel.steps - int(kernel.noiseless_last)
    weight = 0.5 * (kernel.mean_v[:noisy] / kernel.std[:noisy]).square()
    if kernel.noiseless_last:
        before, last = kernel.residual_v[-2:].unbind()
        relative = last / torch.where(before == 0, torch.inf, before)
        weight = torch.cat([weight, (weight[-1] * relative.square())[None]])
    return (weight.to(control.dtype)[:, None] * control.square().sum(2)).sum(0)


class TrustRegion(RunningState):
    """The multiplier λ of a budget of the path KL, and the running average of that KL.

    Arguments:
        budget: ε, in nats per action of a chunk.
        chunk_length: actions of a chunk.

    Attributes:
        multiplier: λ, a scalar.
        kl_average: D̄ in nats per action, a scalar.
    """

    multiplier: Tensor
    kl_average: Tensor

    def __init__(self, budget: float, chunk_length: int) -> None:
        super().__init__()
        self.budget, self.chunk_length = budget, chunk_length
        self.register_buffer("multiplier", torch.ones(()))
        self.register_buffer("kl_average", torch.zeros(()))

    @property
    def temperature(self) -> Tensor:
        """Return the temperature Λ of the tilt, a scalar."""
        return SCALE * self.multiplier

    def tempered(self, kernel: Kernel) -> Kernel:
        """Return the kernel with the residual of the tilt at temperature Λ; its chain stays."""
        root = self.temperature.sqrt()
        return replace(
            kernel, residual_v=kernel.residual_v * root, residual_a=kernel.residual_a / root
        )

    def metrics(self, kernel: Kernel, control: Tensor) -> dict[str, Tensor]:
        """Compute the path KL of an update, and the state that follows from it.

        Arguments:
            kernel: table of the chain.
            control: (K, B, d) f - b̄ at the states of the policy's chain.
        """
        kl = path_kl(kernel, control.detach()).mean() / self.chunk_length
        average = self.kl_average.lerp(kl.clamp_max(CAP * self.budget), AVERAGE_RATE)
        multiplier = self.multiplier + RATE * (average - self.budget)
        return {
            "actor/path_kl": kl,
            "actor/path_kl_average": average,
            "actor/multiplier": multiplier.clamp(*BOUNDS),
            "actor/kl_budget": torch.full_like(kl, self.budget),
        }

    def follow(self, metrics: Mapping[str, Tensor]) -> None:
        """Copy the new average and multiplier from the metrics of an update."""
        self.kl_average.copy_(metrics["actor/path_kl_average"])
        self.multiplier.copy_(metrics["actor/multiplier"])


def trust_region(options: AgentConfig) -> TrustRegion | None:
    """Make the trust region of an agent's options; None where there is no ``kl_budget``."""
    if not isinstance(options, MatchingOptions) or options.kl_budget is None:
        return None
    return TrustRegion(options.kl_budget, options.chunk_length)
