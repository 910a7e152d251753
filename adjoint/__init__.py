"""Adjoint matching: tilt a flow toward a reward, p*(x) ∝ p(x) exp(r(x)), and certify the result.

Three levels, each built from the one below: `tilt` (one call), `TiltLoss` with `flows.Trainer` (a
loop of one's own), and the pure functions `rollout`, `lean_adjoint`, `adjoint_matching_loss` and
`certify` over a `Kernel`.
"""

# One call
from adjoint.tilt import tilt
from adjoint.config import RefineLoss, TiltConfig
from adjoint.tilted import Tilted
from adjoint.anneal import Annealed, Stage, anneal
from adjoint.cost import Cost, estimate_cost
from adjoint.certificate import Certificate
from adjoint.judgement import Judgement

# Rewards, and models to train
from adjoint.rewards.reward import (
    AbstractReward,
    Reward,
    Sum,
    ValueFunction,
    as_reward,
)
from adjoint.rewards.check import check_reward
from adjoint.rewards.decoded import decoded
from adjoint.models.lora import load_adapters, lora, merge, save_adapters
from adjoint.models.reward_informed import RewardInformed, reward_informed

# A loop of one's own
from adjoint.trajectory_source import CondSampler
from adjoint.tilt_loss import TiltLoss
from adjoint.evaluator import Evaluator, RewardEvaluator
from adjoint.exact_samples import flow_proposal, sample_exact

# Pure functions: the chain, its adjoints, the losses, the certificate
from adjoint.chain.kernels import (
    KERNELS,
    Kernel,
    Moments,
    Scheme,
    find_scheme,
    gaussian_kernel,
    make_kernel,
    measure_mmse,
    own_time_kernel,
    table_fingerprint,
)
from adjoint.chain.rollout import Trajectory, draw_noise, rollout
from adjoint.evaluator import velocity_along
from adjoint.chain.adjoints import Adjoint, full_adjoint, lean_adjoint, scalar_adjoint
from adjoint.loss import adjoint_matching_loss, importance_weights, log_variance_loss, select_steps
from adjoint.certificate import certify, log_mean_exp, path_log_ratio

from flows.version import __version__

__all__ = [
    "__version__",
    # One call
    "tilt",
    "TiltConfig",
    "RefineLoss",
    "Tilted",
    "anneal",
    "Annealed",
    "Stage",
    "Cost",
    "estimate_cost",
    "Certificate",
    "Judgement",
    # Rewards, and models to train
    "AbstractReward",
    "Reward",
    "Sum",
    "ValueFunction",
    "as_reward",
    "check_reward",
    "decoded",
    "load_adapters",
    "lora",
    "merge",
    "save_adapters",
    "RewardInformed",
    "reward_informed",
    # A loop of one's own
    "CondSampler",
    "TiltLoss",
    "Evaluator",
    "RewardEvaluator",
    "flow_proposal",
    "sample_exact",
    # Pure functions: the chain, its adjoints, the losses, the certificate
    "KERNELS",
    "Kernel",
    "Moments",
    "Scheme",
    "find_scheme",
    "gaussian_kernel",
    "make_kernel",
    "measure_mmse",
    "own_time_kernel",
    "table_fingerprint",
    "Trajectory",
    "draw_noise",
    "rollout",
    "velocity_along",
    "Adjoint",
    "full_adjoint",
    "lean_adjoint",
    "scalar_adjoint",
    "adjoint_matching_loss",
    "importance_weights",
    "log_variance_loss",
    "select_steps",
    "certify",
    "log_mean_exp",
    "path_log_ratio",
]
