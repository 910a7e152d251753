"""The options of a run in the plane."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from adjoint import RefineLoss, Scheme, TiltConfig, ValueFunction
from applications.common.kernels import load_scheme
from applications.common.objects import NAME_OR_OBJECT
from applications.toy2d.kernels import KernelOption, by_name
from applications.toy2d.targets import Target
from flows import TrainerConfig
from flows.training.renamed import RefusesOldNames, Renamed

CHECKPOINT_EVERY = 50
"""Updates, a few seconds of work, between two checkpoints."""

SET_BY_GALLERY = {"set_by": "gallery"}
"""Metadata of an option that a gallery sets itself or does not need."""


def name_of(value: Any) -> str:
    """Return the name of an option's value: a name, or that of the object or of its class."""
    if isinstance(value, str):
        return value.replace(":", "-")
    name = getattr(value, "name", None) or getattr(value, "__name__", None)
    return str(name or type(value).__name__)


@dataclass(frozen=True)
class RunConfig(RefusesOldNames):
    """Tilt one two-dimensional flow toward one reward, and see how good the tilt is."""

    renamed: ClassVar[Renamed] = {"refine": "refine_fraction"}
    """New names of options by their names in version 0.1."""
    target: Annotated[str | Target, NAME_OR_OBJECT] = field(
        default="pinwheel", metadata=SET_BY_GALLERY
    )
    """Distribution that the base flow generates: a name that `list` shows, or a
    `applications.toy2d.targets.Target` of your own, as module:Name."""
    reward: Annotated[str | ValueFunction, NAME_OR_OBJECT] = field(
        default="half_plane", metadata=SET_BY_GALLERY
    )
    """Reward of the tilt: a name that `list` shows, or a function r(x, cond) of your own, as
    module:Name."""
    base: Literal["trained", "closed_form"] = "trained"
    """A network trained on samples of the target, or its exact flow (mixtures only)."""
    kernel: KernelOption = "moment_matched"
    """Scheme of the memoryless chain: a name that `list` shows, or an `adjoint.Scheme` of your own,
    as module:Name."""
    steps: int = 20
    """Steps K of the training chain."""
    iterations: int = 600
    """Number of updates of the tilt."""
    batch_size: int = 256
    """Number of trajectories in an update."""
    lr: float = 2e-3
    """Learning rate of the tilt."""
    temperature: float = 1.0
    """The target of the tilt is p(x) exp(r(x) / temperature)."""
    refine_fraction: float = 0.5
    """Fraction of the updates, the last ones, that refine the tilt with ``refine_loss``."""
    refine_loss: RefineLoss = "auto"
    """Loss of these updates: flow_matching on samples of the exact tilt, log_variance, or auto,
    which is flow_matching where these samples are good enough; see `adjoint.TiltConfig`."""
    importance: bool = False
    """Weight trajectories by their importance."""
    base_iterations: int = 1500
    """Number of updates of the trained base."""
    samples: int = 20_000
    """Samples of base and tilted flow that the report and the pictures are made of."""
    seed: int = 0
    """Seed of all random numbers."""
    folder: Path | None = field(default=None, metadata=SET_BY_GALLERY)
    """Folder of the run; outputs/TARGET-REWARD if not given."""
    resume: bool = field(default=False, metadata=SET_BY_GALLERY)
    """Continue from the checkpoints in the folder."""
    overwrite: bool = field(default=False, metadata=SET_BY_GALLERY)
    """Begin anew where the folder holds a run already."""
    animation: bool = field(default=True, metadata=SET_BY_GALLERY)
    """Write the animation flow.gif too."""

    def __post_init__(self) -> None:
        """Refuse to resume and to begin anew at once.

        Raises:
            ValueError: both are asked for.
        """
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite must not both be given")

    @property
    def path(self) -> Path:
        """Return the folder of the run."""
        names = (name_of(self.target), name_of(self.reward))
        return self.folder or Path("outputs") / "-".join(names)

    @property
    def trains_base(self) -> bool:
        """Return whether the base is a network to train."""
        return self.base == "trained"

    @property
    def scheme(self) -> Scheme:
        """Return the scheme of the chain.

        Raises:
            ValueError: there is no such scheme.
        """
        return load_scheme(self.kernel)

    @property
    def tilt_options(self) -> TiltConfig:
        """Return the options of the tilt itself.

        Raises:
            ValueError: an unknown kernel, or an option out of range.
        """
        return TiltConfig(
            kernel=by_name(self.scheme),
            steps=self.steps,
            iterations=self.iterations,
            batch_size=self.batch_size,
            lr=self.lr,
            temperature=self.temperature,
            refine_fraction=self.refine_fraction,
            refine_loss=self.refine_loss,
            importance=self.importance,
            seed=self.seed,
            checkpoint_every=CHECKPOINT_EVERY,
        )

    @property
    def base_options(self) -> TrainerConfig:
        """Return the options of the training of a base.

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

    def described(self, **objects: object) -> dict[str, Any]:
        """Return all options as plain values, with ``objects`` in place of target and reward."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return values | {"kernel": str(by_name(self.scheme))} | objects
