"""The command `gallery`: every target tilted toward every reward, in one figure.

By default the panels are the exact tilts by quadrature, in seconds.  With ``learned`` each panel is
a tilt trained from the target's flow, and a run of its own with folder, report and checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from applications.common.pictures.arrays import density_of
from applications.toy2d.config import RunConfig
from applications.toy2d.pictures.grid import gallery
from applications.toy2d.pictures.of_a_run import plane_points
from applications.toy2d.rewards import REWARDS, make_reward
from applications.toy2d.run import run
from applications.toy2d.setup import validate
from applications.toy2d.targets import TARGETS, Target
from flows.training import ensure_writable
from flows.training.renamed import RefusesOldNames, Renamed

RESOLUTION = 120


@dataclass(frozen=True)
class GalleryConfig(RefusesOldNames):
    """Draw all targets, tilted toward all rewards, in one figure."""

    renamed: ClassVar[Renamed] = RunConfig.renamed
    """New names of options of ``run`` by their names in version 0.1."""
    folder: Path = Path("outputs/gallery")
    """Folder of gallery.png, and of the runs of a learned gallery."""
    learned: bool = False
    """Train every tilt (about half an hour) instead of drawing the exact ones."""
    resume: bool = False
    """Continue an interrupted learned gallery."""
    run: RunConfig = field(default_factory=lambda: RunConfig(animation=False))
    """Options of the learned runs; some of them the gallery sets itself."""

    def __post_init__(self) -> None:
        """Refuse options of runs that would have no effect.

        Raises:
            ValueError: naming the option and its value.
        """
        default = RunConfig(animation=False)
        for option in fields(RunConfig):
            value = getattr(self.run, option.name)
            if value == getattr(default, option.name):
                continue
            set_here = option.metadata.get("set_by") == "gallery"
            if set_here or not self.learned:
                where = "a gallery" if set_here else "a gallery without learned"
                raise ValueError(f"run.{option.name} has no effect in {where}, got {value!r}")


def exact_densities(target: Target) -> dict[str, Tensor]:
    """Compute the density of a target and of its tilt by each reward, (R, R) each."""
    assert target.log_density is not None
    points = plane_points(target.extent, RESOLUTION).double()
    log_p = target.log_density(points)
    panels = {"base": log_p}
    panels |= {name: log_p + make_reward(name, target)(points) for name in REWARDS}
    return {
        name: torch.softmax(values, 0).reshape(RESOLUTION, RESOLUTION)
        for name, values in panels.items()
    }


def learned_densities(config: GalleryConfig, target: Target) -> dict[str, Tensor]:
    """Estimate densities from samples of a trained base and of its learned tilts."""
    panels: dict[str, Tensor] = {}
    base = None
    for name in REWARDS:
        options = replace(
            config.run,
            target=target.name,
            reward=name,
            folder=config.folder / f"{target.name}-{name}",
            resume=config.resume,
            overwrite=not config.resume,
        )
        finished = run(options, base=base)
        base = finished.tilted.base
        samples = {"base": finished.base_samples, name: finished.tilted_samples}
        for label, x in samples.items():
            estimate = density_of(x.numpy(), target.extent, resolution=RESOLUTION)
            panels[label] = torch.as_tensor(estimate)
    return panels


def show_gallery(config: GalleryConfig) -> None:
    """Write folder/gallery.png and print its name.

    Raises:
        ValueError: an option of the learned runs is out of range, or no run of some target; before
            any work.
        OSError: the folder cannot be written; before any work.
    """
    for target in TARGETS.values():
        validate(replace(config.run, target=target.name), target)
    ensure_writable(config.folder / "gallery.png", "folder")
    panels: dict[str, dict[str, Tensor]] = {}
    for name, target in tqdm(TARGETS.items(), desc="gallery"):
        panels[name] = (
            learned_densities(config, target) if config.learned else exact_densities(target)
        )
    kind = "learned tilts" if config.learned else "exact tilts by quadrature"
    extent = next(iter(TARGETS.values())).extent
    path = gallery(config.folder / "gallery.png", panels, extent=extent, subtitle=kind)
    print(f"wrote {path}")
