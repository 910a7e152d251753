"""Generative flows: velocity fields v(x, t, cond) from noise at t = 0 to data at t = 1.

Nothing here knows of rewards.  The package ``adjoint`` tilts what is built here.
"""

from flows.field import Cond, Guided, Residual, VelocityField, frozen
from flows.matching import flow_matching_loss
from flows.mixture import GaussianMixture
from flows.networks import MLPVelocity
from flows.path import OnCanonicalPath, convert
from flows.sampling import log_likelihood, sample
from flows.training import Trainer, TrainerConfig, data_sampler, fit_flow
from flows.unet import UNetVelocity

__all__ = [
    "Cond",
    "GaussianMixture",
    "Guided",
    "MLPVelocity",
    "OnCanonicalPath",
    "Residual",
    "Trainer",
    "TrainerConfig",
    "UNetVelocity",
    "VelocityField",
    "convert",
    "data_sampler",
    "fit_flow",
    "flow_matching_loss",
    "frozen",
    "log_likelihood",
    "sample",
]
