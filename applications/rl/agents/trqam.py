r"""TRQAM: QAM in a trust region, whose multiplier adapts how far the policy leaves the data.

    L = L_Q + L_BC + L_AM

are the losses of QAM.  The option ``kl_budget``, which all agents of adjoint matching have, is on:
the tilt is exp(Q/Λ), and the temperature Λ = 3 λ follows from a budget ε of the path's
Kullback-Leibler divergence by dual ascent (`applications.rl.agents.trust_region`),

    a_K  = -∇_x mean_i Q̄_i(s, clip(x_K, -1, 1)),                 without a temperature,
    L_AM = mean_B Σ_k ‖(2/σ_k) (f - b̄)(s, x_k, t_k) + σ_k a_k‖²,  σ_k = g_k/√Λ,

with the noise g_k of the chain, which Λ does not enter.  The loss of an update has the λ of before
it.

Source: "TRQAM" (arXiv 2605.27079).
"""

from __future__ import annotations

from dataclasses import dataclass

from applications.rl.agents.domains import by_domain
from applications.rl.agents.options import BUDGET, Range, checked_option
from applications.rl.agents.qam import QAM, QAMConfig


@dataclass(frozen=True)
class TRQAMConfig(QAMConfig):
    """Options of TRQAM."""

    kl_budget: float | None = checked_option(1.0, BUDGET)
    """Path KL ε in nats per action at which the multiplier holds the policy; None is plain QAM."""
    discount: float = checked_option(0.995, Range("in (0, 1]", lambda value: 0 < value <= 1))
    """Discount γ per environment step."""


class TRQAM(QAM):
    """TRQAM: QAM in a trust region, whose multiplier adapts how far the policy leaves the data.

    All its methods are those of QAM; its options have other defaults.
    """

    config: TRQAMConfig
    config_class = TRQAMConfig
    color = "#d98a5f"
    page = "docs/agents/trqam.md"
    published = by_domain(
        kl_budget=(1, 1, 1, 1, 1, 0.5, 1, 2, 1, 1),
        discount=(0.995, 0.995, 0.995, 0.995, 0.999, 0.995, 0.995, 0.995, 0.995, 0.999),
    )
