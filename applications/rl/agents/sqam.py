r"""SQAM: TRQAM with the scalar adjoint, and critics that are penalised at the policy's actions.

    L = L_Q + L_BC + L_AM + c [mean Q_i(s, clip x_1) - mean Q_i(s, A)]

are the losses of TRQAM and the value penalty, by the online critics and not weighted by windows.
The end x_1 is that of the policy's ODE, not clipped; there is no chain.  With fresh noise ε_j,

    x_j  = (1 - t_j) ε_j + t_j x_1,     t_j = j/K, j = 1, ..., K,
    a_j  = -t_j ∇ mean_i Q̄_i(s, clip(x_1, -1, 1)),
    L_AM = mean_B Σ_j ‖(2/σ_j) (f - b̄)(s, x_j, t_j) + σ_j a_j‖²,     σ_j = g_j/√Λ,

(`applications.rl.agents.bridge`), and Λ by the path KL at these states.  Penalty, adjoint and trust
region are the options ``value_penalty``, ``adjoint`` and ``kl_budget`` that all agents of adjoint
matching have.

Source: "SQAM" (arXiv 2610.10437).
"""

from __future__ import annotations

from dataclasses import dataclass

from applications.rl.agents.domains import by_domain
from applications.rl.agents.options import (
    BUDGET,
    Adjoint,
    Range,
    at_least,
    checked_option,
    one_of,
)
from applications.rl.agents.qam import QAM, QAMConfig


@dataclass(frozen=True)
class SQAMConfig(QAMConfig):
    """Options of SQAM."""

    kl_budget: float | None = checked_option(0.5, BUDGET)
    """Path KL ε in nats per action at which the multiplier holds the policy; None turns it off."""
    value_penalty: float = checked_option(0.3, at_least(0.0))
    """Weight c of the penalty of the critics at the policy's actions."""
    adjoint: Adjoint = checked_option("scalar", one_of("lean", "scalar"))  # noqa: RUF009 — a field
    """Adjoint: "scalar" as published, or "lean", which makes TRQAM with a value penalty."""
    discount: float = checked_option(0.995, Range("in (0, 1]", lambda value: 0 < value <= 1))
    """Discount γ per environment step."""


class SQAM(QAM):
    """SQAM: TRQAM with the scalar adjoint, and critics penalised at the policy's actions.

    All its methods are those of QAM; its options have other defaults.
    """

    config: SQAMConfig
    config_class = SQAMConfig
    color = "#c9a0dc"
    page = "docs/agents/sqam.md"
    published = by_domain(
        value_penalty=(0.3, 0.3, 0, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3),
        discount=(0.995, 0.995, 0.995, 0.995, 0.999, 0.995, 0.995, 0.995, 0.995, 0.999),
    )
