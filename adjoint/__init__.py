"""Adjoint matching: tilt a flow toward a reward, p*(x) ∝ p(x) exp(r(x)), and certify the result.

Three levels, each built from the one below: `tilt` (one call), `TiltLoss` with
`flows.training.Trainer` (a loop of one's own), and the pure functions `rollout`, `lean_adjoint`,
`adjoint_matching_loss`, `certify` over a `Kernel` table.
"""

from adjoint.certificate import Certificate, certify, path_log_ratio
from adjoint.decoding import decoded
from adjoint.informed import Informed, informed
from adjoint.kernel import KERNELS, Kernel, make_kernel, measure_mmse, own_time_kernel
from adjoint.lean import Adjoint, full_adjoint, lean_adjoint, scalar_adjoint
from adjoint.lora import lora, merge
from adjoint.loss import (
    adjoint_matching_loss,
    importance_weights,
    log_variance_loss,
    select_steps,
)
from adjoint.objective import TiltLoss
from adjoint.rejection import sample_exact
from adjoint.reward import Reward
from adjoint.rollout import Trajectory, draw_noise, rollout, velocity_along
from adjoint.tilt import Tilted, tilt
from adjoint.tilt_config import TiltConfig

__all__ = [
    "KERNELS",
    "Adjoint",
    "Certificate",
    "Informed",
    "Kernel",
    "Reward",
    "TiltConfig",
    "TiltLoss",
    "Tilted",
    "Trajectory",
    "adjoint_matching_loss",
    "certify",
    "decoded",
    "draw_noise",
    "full_adjoint",
    "importance_weights",
    "informed",
    "lean_adjoint",
    "log_variance_loss",
    "lora",
    "make_kernel",
    "measure_mmse",
    "merge",
    "own_time_kernel",
    "path_log_ratio",
    "rollout",
    "sample_exact",
    "scalar_adjoint",
    "select_steps",
    "tilt",
    "velocity_along",
]
