"""One run: a two-dimensional base flow, its tilt, the report and the pictures.

The base is the target's own flow in closed form (mixtures), or a network trained on its samples.
What the tilt should be is then the tilt of *that base's* law: by quadrature for a closed form, and
by importance-resampling the base's own samples for a trained one, so that errors of the base are
not blamed on the tilt.  Where too few of those samples count, nothing is compared
(`exact_tilt.mask_unreliable`).

A run's folder holds ``config.json`` (options, versions), ``base.csv``, ``tilt.csv`` (metrics),
``base.pt``, ``tilt.pt`` (checkpoints), ``report.json`` and the pictures.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from adjoint import TiltConfig, Tilted, tilt
from applications.common.callbacks import training_callbacks
from applications.common.lock import locked
from applications.common.run_folder import start_run, write_config
from applications.toy2d.exact_tilt import (
    GridTilt,
    ResampledTilt,
    grid_tilt,
    mask_unreliable,
    mode_tv,
    resample_tilt,
    w2_ratio,
)
from applications.toy2d.rewards import ToyReward, make_reward
from applications.toy2d.run_folder import FILES
from applications.toy2d.targets import Target, find_target
from flows import MLPVelocity, TrainerConfig, VelocityField, data_sampler, fit_flow, sample
from flows.training import ensure_writable, write_json

SAMPLE_STEPS = 50
"""Midpoint steps of every ODE sample of a run."""

CHECKPOINT_EVERY = 50
"""Updates, a few seconds of work, between two checkpoints."""

COMPARED = ("reward_exact", "log_z_exact", "log_z_exact_stderr", "w2_ratio", "mode_tv")
"""Numbers of a report that are made with the exact tilt."""


@dataclass(frozen=True)
class RunConfig:
    """Tilt one two-dimensional flow toward one reward, and see how good the tilt is."""

    target: str = "pinwheel"
    """What the base flow generates; `list` shows the names."""
    reward: str = "half_plane"
    """What it is tilted toward; `list` shows the names."""
    base: Literal["trained", "closed_form"] = "trained"
    """A network trained on samples of the target, or its exact flow (mixtures only)."""
    kernel: str = "moment_matched"
    """Memoryless scheme of the tilt; `list` shows the names."""
    steps: int = 20
    """Steps K of the training chain."""
    iterations: int = 600
    """Updates of the tilt."""
    batch_size: int = 256
    """Trajectories an update."""
    lr: float = 2e-3
    """Learning rate of the tilt."""
    temperature: float = 1.0
    """The target of the tilt is p(x) exp(r(x) / temperature)."""
    refine_fraction: float = 0.5
    """Fraction of the updates, the last ones, that minimise the variance of log w instead."""
    importance: bool = False
    """Weight trajectories by their importance."""
    base_iterations: int = 1500
    """Updates of the trained base."""
    samples: int = 20_000
    """Samples of base and tilted flow that the report and the pictures are made of."""
    seed: int = 0
    """Seed of everything random."""
    folder: Path | None = None
    """Where the run is written; outputs/TARGET-REWARD if not given."""
    resume: bool = False
    """Continue from the checkpoints in the folder."""
    overwrite: bool = False
    """Begin anew where the folder holds a run already."""
    animation: bool = True
    """Write the animation too."""

    def __post_init__(self) -> None:
        """Refuse to resume and to begin anew at once.

        Raises:
            ValueError: both are asked for.
        """
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite must not both be given")

    @property
    def path(self) -> Path:
        """Folder of the run."""
        return self.folder or Path("outputs") / f"{self.target}-{self.reward}"

    @property
    def identity(self) -> dict[str, str | int | float | bool]:
        """What identifies the run: a checkpoint of another run is refused."""
        identity: dict[str, str | int | float | bool] = {
            "target": self.target,
            "reward": self.reward,
            "base": self.base,
        }
        return identity | ({"base_iterations": self.base_iterations} if self.trains_base else {})

    @property
    def trains_base(self) -> bool:
        """Whether the base is a network to train."""
        return self.base == "trained"

    @property
    def tilt_options(self) -> TiltConfig:
        """Options of the tilt itself.

        Raises:
            ValueError: an unknown kernel, or an option out of range.
        """
        return TiltConfig(
            kernel=self.kernel,
            steps=self.steps,
            iterations=self.iterations,
            batch_size=self.batch_size,
            lr=self.lr,
            temperature=self.temperature,
            refine_fraction=self.refine_fraction,
            importance=self.importance,
            seed=self.seed,
            checkpoint_every=CHECKPOINT_EVERY,
        )

    @property
    def base_options(self) -> TrainerConfig:
        """How a base is trained.

        Raises:
            ValueError: an option out of range.
        """
        if self.base_iterations < 0:
            raise ValueError(f"base_iterations must be at least 0, got {self.base_iterations}")
        return TrainerConfig(
            iterations=self.base_iterations,
            lr=2e-3,
            seed=self.seed,
            checkpoint_every=CHECKPOINT_EVERY,
        )


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run, as the pictures need it.

    Attributes:
        config: its options.
        target, reward: the identity.
        tilted: the tilt, with the base and both certificates.
        base_samples, tilted_samples: (N, 2) by the ODE.
        exact: the exact tilt of the base's law.
        report: what report.json holds.
    """

    config: RunConfig
    target: Target
    reward: ToyReward
    tilted: Tilted
    base_samples: Tensor
    tilted_samples: Tensor
    exact: GridTilt | ResampledTilt
    report: dict[str, str | int | float]


def validate(config: RunConfig, target: Target) -> None:
    """Refuse what cannot be run, before any file of the folder changes.

    Raises:
        ValueError: an option out of range, or a closed form where the target has none.
    """
    if not config.trains_base and target.mixture is None:
        raise ValueError(
            f"base 'closed_form' needs a mixture target, got {config.target!r}; use 'trained'"
        )
    if config.samples < 100:
        raise ValueError(f"samples must be at least 100, got {config.samples}")
    _ = config.tilt_options, config.base_options


def make_base(config: RunConfig, target: Target) -> VelocityField:
    """The base flow of a run, whose options are valid."""
    if not config.trains_base:
        assert target.mixture is not None
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
        identity={
            "target": config.target,
            "seed": config.seed,
            "base_iterations": config.base_iterations,
        },
    )


def exact_tilt(
    config: RunConfig, target: Target, reward: ToyReward, base: VelocityField
) -> GridTilt | ResampledTilt:
    """The exact tilt of the base's law by the scaled reward; see the module docstring."""

    def scaled(x: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        return reward(x, cond) / config.temperature

    if not config.trains_base and target.mixture is not None:
        return grid_tilt(target.mixture.log_prob, scaled, target.extent + 2.0)
    return resample_tilt(base_samples(config, base, 2 * config.samples, stream=1), scaled)


def base_samples(config: RunConfig, field: VelocityField, n: int, *, stream: int) -> Tensor:
    """``n`` ODE samples (n, 2) from noise that depends only on the seed and ``stream``."""
    generator = torch.Generator().manual_seed(1000 * config.seed + stream)
    x0 = torch.randn(n, 2, generator=generator)
    parts = [sample(field, part, grid=SAMPLE_STEPS) for part in x0.split(4096)]
    return torch.cat(parts)


def make_report(
    config: RunConfig,
    target: Target,
    tilted: Tilted,
    samples: Tensor,
    reward: ToyReward,
    base: Tensor,
    exact: GridTilt | ResampledTilt,
) -> dict[str, str | int | float]:
    """The numbers of a run, flat; rewards are those of the ODE's samples, unscaled.

    Comparisons with an exact tilt of too few effective samples are NaN
    (`exact_tilt.mask_unreliable`).
    """
    assert tilted.certificate is not None
    assert tilted.certificate_base is not None
    assert target.modes is not None
    generator = torch.Generator().manual_seed(config.seed)
    size = min(2500, config.samples // 4)
    sets = [exact.sample(4 * size, generator) for _ in range(2)]
    after = tilted.certificate
    report: dict[str, str | int | float] = {
        "target": config.target,
        "reward": config.reward,
        "temperature": config.temperature,
        "kernel": config.kernel,
        "steps": config.steps,
        "reward_base": float(reward(base).mean()),
        "reward_tilted": float(reward(samples).mean()),
        "reward_exact": exact.reward_tilted * config.temperature,
        "log_z": after.log_z,
        "log_z_stderr": after.log_z_stderr,
        "log_z_exact": exact.log_z,
        "log_z_exact_stderr": exact.log_z_stderr,
        "log_weight_std_base": tilted.certificate_base.log_weight_std,
        "log_weight_std": after.log_weight_std,
        "ess": after.ess,
        "path_kl": after.path_kl,
        "w2_ratio": w2_ratio(samples, *sets, size=size, generator=generator),
        "mode_tv": mode_tv(samples, exact, target.modes),
    }
    return mask_unreliable(report, COMPARED, exact, "the base")


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
    target = find_target(config.target)
    reward = make_reward(config.reward, target)
    validate(config, target)
    ensure_writable(config.path / "report.json", "folder")
    with locked(config.path):
        return _run(config, target, reward, base)


def _run(config: RunConfig, target: Target, reward: ToyReward, base: VelocityField | None) -> Run:
    """What ``run`` does once options and folder are known to be in order."""
    started = time.perf_counter()
    settings = asdict(config)
    start_run(config.path, FILES, settings, resume=config.resume, overwrite=config.overwrite)
    base = make_base(config, target) if base is None else base
    tilted = tilt(
        base,
        reward,
        shape=(2,),
        config=config.tilt_options,
        callbacks=training_callbacks("tilt", config.path / "tilt.csv"),
        checkpoint=config.path / "tilt.pt",
        resume=config.resume,
        identity=config.identity,
    )
    write_config(config.path, settings)  # once the checkpoints have accepted a resume
    exact = exact_tilt(config, target, reward, base)
    before = base_samples(config, base, config.samples, stream=2)
    after = base_samples(config, tilted.field, config.samples, stream=2)
    report = make_report(config, target, tilted, after, reward, before, exact)
    report["seconds"] = time.perf_counter() - started
    write_json(config.path / "report.json", report)
    return Run(config, target, reward, tilted, before, after, exact, report)


def table(report: Mapping[str, str | int | float]) -> str:
    """The report as an aligned table of names and values."""
    width = max(map(len, report))
    rows = [
        f"{name:<{width}}  {value:>12.4f}"
        if isinstance(value, float)
        else f"{name:<{width}}  {value:>12}"
        for name, value in report.items()
    ]
    return "\n".join(rows)
