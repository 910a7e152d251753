"""The options of a run on handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from adjoint import RefineLoss, TiltConfig
from applications.common.kernels import load_scheme
from applications.toy2d.digits.data import CLASSES, DIM
from applications.toy2d.kernels import KernelOption, by_name
from flows.training import choose_device
from flows.training.renamed import RefusesOldNames, Renamed


@dataclass(frozen=True)
class DigitsConfig(RefusesOldNames):
    """Tilt a flow of handwritten digits toward one digit, and see how good the tilt is."""

    renamed: ClassVar[Renamed] = {"refine": "refine_fraction", "variates": "control_variates"}
    """New names of options by their names in version 0.1."""
    digit: int = 3
    """The digit whose log-probability is the reward."""
    temperature: float = 1.0
    """The target is p(x) P(digit | x)^(1 / temperature)."""
    kernel: KernelOption = "moment_matched"
    """Scheme of the memoryless chain: a name that `list` shows, or an `adjoint.Scheme` of your own,
    as module:Name."""
    steps: int = 20
    """Steps K of the training chain."""
    iterations: int = 400
    """Number of updates of the tilt."""
    batch_size: int = 128
    """Number of trajectories in an update."""
    lr: float = 2e-3
    """Learning rate of the tilt."""
    importance: bool = True
    """Weight trajectories by their importance."""
    min_ess: float = 0.5
    """Effective sample size / B below which a batch goes unweighted."""
    control_variates: bool = False
    """Subtract control variates from the adjoints (`adjoint.chain.control_variates`)."""
    refine_fraction: float = 0.5
    """Fraction of the updates, the last ones, that refine the tilt with ``refine_loss``."""
    refine_loss: RefineLoss = "auto"
    """Loss of these updates: flow_matching on samples of the exact tilt, log_variance, or auto,
    which is flow_matching where these samples are good enough; see `adjoint.TiltConfig`."""
    refine_steps: int | None = None
    """Steps of the chain that these updates sample, and of the certificate; chosen if not given."""
    compile: bool = False
    """Compile the networks for the updates; for long trainings."""
    device: str = "cpu"
    """Device of the tilt, its training (on cuda by CUDA graphs) and its report: cpu, cuda or auto;
    classifier and base train on the CPU."""
    informed: bool = False
    """Train a model that sees the reward (`adjoint.reward_informed`), not a copy of the base."""
    width: int = 256
    """Width of the hidden layers, three each, of the base flow and of an informed model."""
    base_iterations: int = 2000
    """Number of updates of the base flow."""
    base_batch_size: int = 256
    """Number of images in an update of the base flow."""
    classifier_iterations: int = 600
    """Number of updates of the classifier."""
    samples: int = 4096
    """Number of samples of the tilted flow, and half the number of samples of the base."""
    seed: int = 0
    """Seed of all random numbers."""
    folder: Path = Path("outputs/digits")
    """Folder of the run."""
    resume: bool = False
    """Continue from the checkpoints in the folder."""
    overwrite: bool = False
    """Begin anew where the folder holds a run already."""
    quick: bool = False
    """A tenth of the training, to see that everything works."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            ValueError: naming the option, its value and what was expected.
        """
        if not 0 <= self.digit < CLASSES:
            raise ValueError(f"digit must be one of 0 … {CLASSES - 1}, got {self.digit}")
        scheme = load_scheme(self.kernel)
        if scheme.max_dim is not None and scheme.max_dim < DIM:
            raise ValueError(
                f"kernel must be one for the {DIM} dimensions of an image, got {scheme.name!r}, "
                f"which serves up to {scheme.max_dim}"
            )
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite must not both be given")
        object.__setattr__(self, "device", str(choose_device(self.device)))
        minima = {"samples": 100, "width": 1, "base_batch_size": 1}
        minima |= {"base_iterations": 0, "classifier_iterations": 0}
        for name, least in minima.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def tilt_options(self) -> TiltConfig:
        """Return the options of the tilt itself.

        Raises:
            ValueError: an unknown kernel, or an option out of range.
        """
        return TiltConfig(
            kernel=by_name(load_scheme(self.kernel)),
            steps=self.steps,
            iterations=self.iterations,
            batch_size=self.batch_size,
            lr=self.lr,
            temperature=self.temperature,
            importance=self.importance,
            min_ess=self.min_ess,
            control_variates=self.control_variates,
            refine_fraction=self.refine_fraction,
            refine_loss=self.refine_loss,
            refine_steps=self.refine_steps,
            compile=self.compile,
            cuda_graphs=torch.device(self.device).type == "cuda",
            warmup=0,
            ema_decay=0.99,
            seed=self.seed,
            certificate_samples=self.samples,
            checkpoint_every=100,
        )

    @property
    def sized(self) -> DigitsConfig:
        """Return the options with the smaller sizes of ``quick`` written out."""
        if not self.quick:
            return self
        return replace(
            self,
            quick=False,
            iterations=max(1, self.iterations // 10),
            base_iterations=max(1, self.base_iterations // 10),
            classifier_iterations=max(1, self.classifier_iterations // 3),
            samples=min(self.samples, 1024),
        )
