"""Generative flows: velocity fields v(x, t, cond) from noise at t = 0 to data at t = 1.

Nothing here knows of rewards: the package `adjoint` tilts what is built here.  `flows.pretrained`
reads published models, and `flows.training` has the training loop with its callbacks.
"""

# A velocity field, its wrappers, and its derivatives
from flows.field import (
    Cond,
    Corrected,
    Guided,
    Residual,
    VelocityField,
    batch_time,
    check_cond,
    check_velocity,
    frozen,
)
from flows.autodiff import pullback, velocity_and_vjp
from flows.weights import copy_sharing, fingerprint

# Paths and time grids
from flows.path import OnCanonicalPath, convert, interpolate
from flows.grid import shifted, uniform

# Samples and densities
from flows.sampling import log_likelihood, sample

# A flow in closed form, and small networks
from flows.mixture import GaussianMixture
from flows.networks.mlp import MLPVelocity
from flows.networks.unet import UNetVelocity

# Training
from flows.matching import flow_matching_loss
from flows.training.config import TrainerConfig
from flows.training.fit import data_sampler, fit_flow
from flows.training.trainer import Trainer
from flows.training.callbacks import Callback, ProgressBar, StopTraining

# Published models
from flows.pretrained import load

from flows.version import __version__

__all__ = [
    "__version__",
    # A velocity field, its wrappers, and its derivatives
    "Cond",
    "Corrected",
    "Guided",
    "Residual",
    "VelocityField",
    "batch_time",
    "check_cond",
    "check_velocity",
    "frozen",
    "pullback",
    "velocity_and_vjp",
    "copy_sharing",
    "fingerprint",
    # Paths and time grids
    "OnCanonicalPath",
    "convert",
    "interpolate",
    "shifted",
    "uniform",
    # Samples and densities
    "log_likelihood",
    "sample",
    # A flow in closed form, and small networks
    "GaussianMixture",
    "MLPVelocity",
    "UNetVelocity",
    # Training
    "flow_matching_loss",
    "TrainerConfig",
    "data_sampler",
    "fit_flow",
    "Trainer",
    "Callback",
    "ProgressBar",
    "StopTraining",
    # Published models
    "load",
]
