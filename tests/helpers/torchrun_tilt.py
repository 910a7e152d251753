"""The program that test_distributed_tilt.py starts by torchrun: it says nothing of processes.

In the first start, which finds no checkpoint, one process is killed in the midst of training.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from adjoint.tilt import TiltConfig, tilt
from flows.field import Residual
from flows.networks.mlp import MLPVelocity
from flows.training.callbacks import Callback
from flows.training.loggers import JSONLLogger
from helpers.tilt_problems import PROBLEMS

CONFIG = TiltConfig(
    iterations=10,
    steps=4,
    batch_size=16,
    replay_size=32,
    losses_per_rollout=2,
    importance=True,
    clip_quantile=True,
    ema_decay=0.9,
    checkpoint_every=3,
    base_samples=128,
    certificate_samples=64,
)


class Killer(Callback):
    def on_step(self, trainer, iteration, metrics):
        if iteration == 5 and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, *callbacks):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = PROBLEMS["three"].base
    return tilt(
        base,
        PROBLEMS["three"].reward,
        shape=(2,),
        config=CONFIG,
        model=Residual(base, MLPVelocity(2, hidden=(8,), zero_init=True)),
        callbacks=[*callbacks, JSONLLogger(folder / "log.jsonl", every=1)],
        checkpoint=folder / "c.pt",
        resume=True,
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    tilted = train(folder, *([] if (folder / "c.pt").exists() else [Killer()]))
    print(f"log Z of {len(tilted.certificate.samples)}: {tilted.certificate.log_z!r}")
