"""The tilt that test_tilt_killed.py kills.

Everything of a tilt that a checkpoint has to restore takes part: a replay buffer that is refreshed
only now and then, importance weights, a running cap, a random subset of the steps, averaging,
accumulation, the refinement, and a logger.
"""

import torch

from adjoint.tilt import TiltConfig, tilt
from flows.field import Residual
from flows.networks.mlp import MLPVelocity
from flows.training.loggers import CSVLogger
from helpers.tilt_problems import PROBLEMS

ITERATIONS = 102
CONFIG = TiltConfig(
    iterations=ITERATIONS,
    kernel="moment_matched",
    steps=5,
    batch_size=32,
    replay_size=96,
    losses_per_rollout=3,
    refine_fraction=0.4,
    refine_steps=8,
    importance=True,
    clip_quantile=True,
    late_fraction=0.4,
    early_fraction=0.5,
    accumulate=2,
    warmup=10,
    ema_decay=0.99,
    checkpoint_every=4,
    certificate_samples=64,
)


def train(folder, report):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = PROBLEMS["three"].base
    tilted = tilt(
        base,
        PROBLEMS["three"].reward,
        shape=(2,),
        config=CONFIG,
        model=Residual(base, MLPVelocity(2, hidden=(16,), zero_init=True)),
        callbacks=[CSVLogger(folder / "metrics.csv", every=3), report],
        checkpoint=folder / "checkpoint.pt",
        resume=True,
        identity={"base": "three"},
    )
    torch.save(tilted.certificate.log_weights, folder / "log_weights.pt")
