"""Functions that jobs of tests run in their workers: trainings in the corridor, and failures."""

import os
import signal
from dataclasses import replace

import torch

from applications.rl import Setting, SweepConfig, train
from flows.training.callbacks import Callback
from helpers.tiny import Corridor, corridor_data, options

TASK = "gym:Pendulum-v1"
"""A name that exists; the corridor is trained."""


SETTING = Setting(
    offline_steps=100,
    batch_size=16,
    eval_every=20,
    eval_episodes=2,
    environments=2,
    checkpoint_every=7,
    log_every=3,
)


def sweep_config(folder, **changes):
    base = {"tasks": (TASK,), "agents": ("bc",), "seeds": ("0",), "setting": SETTING}
    return SweepConfig(**(base | {"folder": folder} | changes))


class Starts(Callback):
    """Notes the iteration that each process begins a run at."""

    def __init__(self, folder):
        self.folder = folder

    def on_start(self, trainer):
        with (self.folder / f"seed{trainer.config.seed}" / "starts.txt").open("a") as file:
            file.write(f"{trainer.iteration}\n")


def starts(run):
    return [int(line) for line in (run.folder / "starts.txt").read_text().split()]


def train_corridor(config, callbacks=()):
    own = replace(config, options=options(config.agent, horizon=3, discount=0.9))
    callbacks = [Starts(config.path), *callbacks]
    return train(own, environment=Corridor, dataset=corridor_data(), callbacks=callbacks)


class Poison(Callback):
    """Makes the weights of seed 1 NaN after 30 updates."""

    def on_step(self, trainer, iteration, metrics):
        if trainer.config.seed == 1 and iteration == 30:
            with torch.no_grad():
                next(trainer.module.parameters()).fill_(torch.nan)


class Death(Callback):
    """Kills the process of seed 0 after ten updates, if it began with the first."""

    def on_start(self, trainer):
        self.fresh = trainer.iteration == 0 and trainer.config.seed == 0

    def on_step(self, trainer, iteration, metrics):
        if self.fresh and iteration == 10:
            os.kill(os.getpid(), signal.SIGKILL)


def train_or_fail(config):
    """bc diverges with seed 1, ifql kills its worker, bam once and later; fql is a bug."""
    if config.agent == "ifql":
        os.kill(os.getpid(), signal.SIGKILL)
    if config.agent == "fql":
        return {}["no such thing"]
    return train_corridor(config, [Death() if config.agent == "bam" else Poison()])
