"""The cost of a sweep before it starts.

The cost follows from the updates per second of a job, which are given or measured by some updates
of a training on this machine, on random numbers with the task's shapes.  Evaluations are not
included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import torch

from applications.rl.data.dataset import Dataset
from applications.rl.environments.spaces import Spaces, spaces_of
from applications.rl.environments.tasks import find_task, make_environment
from applications.rl.sweep.plan import Job, duration, makespan, slots
from applications.rl.training.config import TrainConfig
from applications.rl.training.train import train
from flows import Callback
from flows.training import Training
from flows.training.callbacks import Metrics

WARM = 5
"""Number of updates before the clock starts."""
MOST = 500
"""Number of updates after which a measurement ends."""
ROWS = 4096
"""Number of random transitions to measure with."""


class _Enough(Exception):  # noqa: N818  (no error: a measurement is complete)
    pass


class _Clock(Callback):
    def __init__(self, seconds: float) -> None:
        self.seconds, self.began, self.rate = seconds, 0.0, 0.0

    def on_step(self, trainer: Training, iteration: int, metrics: Metrics) -> None:
        if iteration <= WARM:
            float(metrics["loss"])  # waits for the device
            self.began = perf_counter()
        elif iteration == WARM + MOST or perf_counter() - self.began > self.seconds:
            float(metrics["loss"])
            self.rate = (iteration - WARM) / (perf_counter() - self.began)
            raise _Enough


def measure(config: TrainConfig, seconds: float = 10.0) -> float:
    """Measure the updates per second of one seed alone on this machine, trained by ``config``.

    Raises:
        ValueError: the training is for a GPU and this machine has none.
        ValueError, ImportError: see `applications.rl.train`.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "measure: with gpus above 0 updates are timed on a GPU, and this machine has none; "
            "give --updates-per-second instead"
        )
    environment = make_environment(find_task(config.task))
    spaces = spaces_of(environment)
    environment.close()
    clock = _Clock(seconds)
    with TemporaryDirectory() as folder:
        brief = replace(
            config,
            seeds=config.seeds[:1],
            folder=Path(folder),
            data=None,
            use_data=True,
            offline_steps=WARM + MOST + 1,
            online_steps=0,
            eval_every=0,
            checkpoint_every=WARM + MOST + 1,
            resume=False,
            tensorboard=False,
            wandb=None,
        )
        with contextlib.suppress(_Enough):
            train(brief, dataset=_any_data(spaces), callbacks=[clock])
    return clock.rate


def cost(
    updates: Sequence[tuple[Job, int]],
    rates: dict[str, float],
    *,
    cpus: float,
    gpus: float,
    devices: Sequence[int],
) -> str:
    """Describe the cost of jobs in device-hours, and their duration on some numbers of devices.

    Arguments:
        updates: jobs in order, and the number of updates that each has to do.
        rates: updates per second of a job, by agent.
        cpus, gpus: CPUs and GPUs of a job.
        devices: numbers of GPUs, or of CPUs where a job takes no GPU.
    """
    name, share = ("GPU", gpus) if gpus else ("CPU", cpus)
    seconds = [number / rates[job.config.agent] for job, number in updates]
    total = sum(seconds) * share
    times = []
    for number in devices:
        places = slots(number, share)
        time = duration(makespan(seconds, places)) if places else "too few for a job"
        times.append(f"on {number} {name}{'s' * (number > 1)}: {time}")
    return f"cost: {total / 3600:.3g} {name}-hours, without evaluations; {'; '.join(times)}"


def _any_data(spaces: Spaces) -> Dataset:
    rng = np.random.default_rng(0)
    shapes = [(ROWS, spaces.observation_dim), (ROWS, spaces.action_dim)]
    observations, actions = (rng.uniform(-0.9, 0.9, s).astype(np.float32) for s in shapes)
    ones = np.ones(ROWS, np.float32)
    return Dataset(observations, actions, -ones, ones, 0 * ones, observations, source="any")
