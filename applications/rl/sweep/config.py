"""The options of a sweep; see `applications.rl.sweep`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from applications.rl.agents.base import AgentConfig
from applications.rl.sweep.plan import Plan, make_plan
from applications.rl.training.config import TrainConfig
from applications.rl.training.seeds import parse_seeds
from flows.training.renamed import RefusesOldNames, Renamed

RESULTS = "results.json"


@dataclass(frozen=True)
class Setting(TrainConfig):
    """The options of `train` that all runs of a sweep share."""

    task: tyro.conf.Suppress[str] = ""
    agent: tyro.conf.Suppress[str] = "qam"
    seeds: tyro.conf.Suppress[tuple[int, ...]] = (0,)
    folder: tyro.conf.Suppress[Path | None] = None
    resume: tyro.conf.Suppress[bool] = False
    overwrite: tyro.conf.Suppress[bool] = False
    device: tyro.conf.Suppress[str] = "auto"
    threads: tyro.conf.Suppress[int] = 0
    options: tyro.conf.Suppress[AgentConfig | None] = None


@dataclass(frozen=True)
class SweepConfig(RefusesOldNames):
    """Train agents on tasks with seeds, on this machine or on a cluster of Ray."""

    renamed: ClassVar[Renamed] = Setting.renamed
    """New names of options of ``run`` by their names in version 0.1."""
    tasks: tuple[str, ...]
    """Tasks; `published` stands for the 50 tasks of the published table."""
    agents: tuple[str, ...] = ("qam",)
    """Agents: names that `list` shows, or module:Name of your own, whose module is imported."""
    kernel: str | None = None
    """Kernel of the agents that tilt by adjoint matching: a name that `train --help` shows, or
    module:Name of your own; that of the preset if not given."""
    seeds: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--seed"])] = ("0-11",)
    """Seeds, numbers or ranges such as 0-11."""
    seeds_per_job: int = 1
    """Number of seeds of one agent and task that one worker trains."""
    cpus: float = 1.0
    """CPUs of a job, and its number of threads."""
    gpus: float = 0.0
    """GPUs of a job, at most 1; with 0.25 four jobs share a GPU, 0 trains on CPUs."""
    address: str | None = None
    """Cluster of Ray to run on: HOST:PORT, ray://HOST:PORT, or auto for the cluster of this
    machine.  If not given, the sweep starts Ray on this machine for itself."""
    max_cpus: int | None = None
    """CPUs of the Ray that the sweep starts; all of the machine if not given."""
    retries: int = 3
    """Number of times in a row that a job is restarted after its worker or node died without a new
    checkpoint."""
    folder: Path = Path("outputs/rl")
    """Folder to write the runs and results.json to; the same folder on all machines."""
    dry_run: bool = False
    """Print the plan and its cost, and start nothing."""
    updates_per_second: float | None = None
    """Updates per second of a job, of all its seeds together, to compute the cost from."""
    measure: bool = False
    """Measure the updates per second by some updates on this machine."""
    devices: tuple[int, ...] = (1, 8, 64)
    """Numbers of GPUs, or of CPUs where a job takes no GPU, to print the duration for."""
    setting: Annotated[Setting, tyro.conf.arg(name="")] = field(default_factory=Setting)

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            ValueError: naming the option, its value and what was expected.
        """
        least = {"seeds_per_job": 1, "retries": 0, "max_cpus": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if not self.cpus > 0:
            raise ValueError(f"cpus must be above 0, got {self.cpus}")
        if not 0 <= self.gpus <= 1:
            raise ValueError(f"gpus must be between 0 and 1, got {self.gpus}")
        if not self.devices or min(self.devices) < 1:
            raise ValueError(f"devices must be numbers of at least 1, got {self.devices}")
        rate = self.updates_per_second
        if rate is not None and not 0 < rate < float("inf"):
            raise ValueError(f"updates_per_second must be positive, got {rate}")
        parse_seeds(self.seeds)

    @property
    def results(self) -> Path:
        """Path of the file of all results."""
        return self.folder / RESULTS

    @property
    def plan(self) -> Plan:
        """The runs and jobs of the sweep.

        Raises:
            ValueError: see `make_plan`.
        """
        data = self.setting.data
        return make_plan(
            replace(
                self.setting,
                data=None if data is None else data.expanduser().absolute(),
                resume=True,
                device="cuda" if self.gpus else "cpu",
                threads=max(1, int(self.cpus)),
            ),
            tasks=self.tasks,
            agents=self.agents,
            kernel=self.kernel,
            seeds=parse_seeds(self.seeds),
            seeds_per_job=self.seeds_per_job,
            folder=self.folder,
        )
