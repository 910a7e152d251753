"""One run: a two-dimensional base flow, its tilt, and the comparison with the exact tilt.

The base is the target's own flow in closed form (mixtures), or a network trained on its samples.
The tilt to reach is the tilt of *that base's* distribution: by quadrature for a closed form, and by
importance-resampling the base's own samples for a trained one, so that errors of the base are not
blamed on the tilt.  Where too few of those samples count, nothing is compared
(`exact_tilt.mask_unreliable`).

A run's folder holds ``config.json`` (options, versions), ``base.csv``, ``tilt.csv`` (metrics),
``base.pt``, ``tilt.pt`` (checkpoints), ``report.json`` and the pictures.

    run(RunConfig(target="moons", reward="peaks"))
    run(RunConfig(target=Target("cross", "two bars", draw), reward=my_reward, kernel=MyScheme()))
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adjoint import Tilted, tilt
from applications.common.callbacks import training_callbacks
from applications.common.lock import locked
from applications.common.run_folder import start_run, write_config
from applications.toy2d.config import RunConfig
from applications.toy2d.exact_tilt import GridTilt, ResampledTilt, grid_tilt, resample_tilt
from applications.toy2d.report import Report, make_report
from applications.toy2d.rewards import ToyReward
from applications.toy2d.run_folder import FILES
from applications.toy2d.setup import RunSetup, resolve
from applications.toy2d.targets import Target
from flows import MLPVelocity, VelocityField, data_sampler, fit_flow, sample
from flows.training import ensure_writable, write_json

SAMPLE_STEPS = 50
"""Midpoint steps of every ODE sample of a run."""


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run: options, target, reward, tilt, samples and report.

    Attributes:
        config: the options.
        target, reward: the target and the reward that the options name.
        tilted: the tilt, with the base and both certificates.
        base_samples, tilted_samples: ODE samples (N, 2).
        exact: the exact tilt of the base.
        report: content of report.json.
    """

    config: RunConfig
    target: Target
    reward: ToyReward
    tilted: Tilted
    base_samples: Tensor
    tilted_samples: Tensor
    exact: GridTilt | ResampledTilt
    report: Report


def run(config: RunConfig, *, base: VelocityField | None = None) -> Run:
    """Train or resume, certify, compare with the exact tilt, and write everything but pictures.

    Arguments:
        config: the options.
        base: a base of an earlier run of this target, instead of training it again.

    Raises:
        ValueError: an unknown target, reward or kernel, an option out of range, or a folder that
            is not free (`applications.common.run_folder`); before any file changes.
        OSError: the folder cannot be written; before any training.
        RunError: another run is in the folder.
        CheckpointError: resuming from a file that is damaged or of another run.
        TrainingDiverged: a loss became NaN; the last good checkpoint is kept.
    """
    setup = resolve(config)
    ensure_writable(config.path / "report.json", "folder")
    with locked(config.path):
        return _run(setup, base)


def _run(setup: RunSetup, base: VelocityField | None) -> Run:
    """Run in a folder that is locked, with options that are known to be in order."""
    started = time.perf_counter()
    config, identity = setup.config, setup.identity
    settings = config.described(target=identity["target"], reward=identity["reward"])
    start_run(config.path, FILES, settings, resume=config.resume, overwrite=config.overwrite)
    base = make_base(setup) if base is None else base
    tilted = tilt(
        base,
        setup.reward.for_tilt,
        shape=(2,),
        config=config.tilt_options,
        callbacks=training_callbacks("tilt", config.path / "tilt.csv"),
        checkpoint=config.path / "tilt.pt",
        resume=config.resume,
        identity=identity,
    )
    write_config(config.path, settings)  # once the checkpoints have accepted a resume
    exact = exact_tilt(setup, base)
    before = ode_samples(config, base, config.samples, stream=2)
    after = ode_samples(config, tilted.field, config.samples, stream=2)
    report = make_report(setup, tilted, after, before, exact)
    report["seconds"] = time.perf_counter() - started
    write_json(config.path / "report.json", report)
    return Run(config, setup.target, setup.reward, tilted, before, after, exact, report)


def make_base(setup: RunSetup) -> VelocityField:
    """Train or resume the base flow, or copy the closed form."""
    config, target = setup.config, setup.target
    if not config.trains_base:
        assert target.mixture is not None  # `resolve` has refused the others
        return copy.deepcopy(target.mixture).float()
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        network = MLPVelocity(2)
    data = target.sample(100_000, generator)
    return fit_flow(
        network,
        data_sampler(data),
        config=config.base_options,
        batch_size=512,
        callbacks=training_callbacks("base flow", config.path / "base.csv"),
        checkpoint=config.path / "base.pt",
        resume=config.resume,
        identity=setup.base_identity,
    )


def exact_tilt(setup: RunSetup, base: VelocityField) -> GridTilt | ResampledTilt:
    """Tilt the base's distribution exactly by the scaled reward; see the module docstring."""
    config, target = setup.config, setup.target

    def scaled(x: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        return setup.reward(x, cond) / config.temperature

    if not config.trains_base and target.mixture is not None:
        return grid_tilt(target.mixture.log_prob, scaled, target.extent + 2.0)
    return resample_tilt(ode_samples(config, base, 2 * config.samples, stream=1), scaled)


def ode_samples(config: RunConfig, field: VelocityField, n: int, *, stream: int) -> Tensor:
    """Draw ``n`` ODE samples (n, 2) from noise that depends only on the seed and ``stream``."""
    generator = torch.Generator().manual_seed(1000 * config.seed + stream)
    x0 = torch.randn(n, 2, generator=generator)
    parts = [sample(field, part, grid=SAMPLE_STEPS) for part in x0.split(4096)]
    return torch.cat(parts)
