"""The options of a sweep; see `applications.rl.sweep`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from applications.rl.agents.base import AgentConfig
from applications.rl.sweep.plan import Plan, make_plan
from applications.rl.training.config import TrainConfig
from applications.rl.training.seeds import parse_seeds

RESULTS = "results.json"


@dataclass(frozen=True)
class Setting(TrainConfig):
    """What all runs share: the options of `train` but those that a sweep decides."""

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
class SweepConfig:
    """Train agents on tasks with seeds, on this machine or on a cluster of Ray."""

    tasks: tuple[str, ...]
    """Tasks; `published` stands for the 50 of the published table."""
    agents: tuple[str, ...] = ("qam",)
    """Agents."""
    seeds: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--seed"])] = ("0-11",)
    """Seeds, numbers or ranges."""
    seeds_per_job: int = 1
    """Seeds of one agent and task that one worker trains."""
    cpus: float = 1.0
    """CPUs that a job takes; as many threads."""
    gpus: float = 0.0
    """GPUs that a job takes, at most 1; 0.25 has four jobs share one, 0 trains on CPUs."""
    address: str | None = None
    """Cluster of Ray to run on: HOST:PORT, ray://HOST:PORT, or auto for the one of this machine;
    without, an engine of its own on this machine."""
    max_cpus: int | None = None
    """CPUs of that engine; all of the machine if not given."""
    retries: int = 3
    """Times in a row that a job is begun again after its worker or node died without a new
    checkpoint."""
    folder: Path = Path("outputs/rl")
    """Where the runs and results.json are written; the same folder on all machines."""
    dry_run: bool = False
    """Say what there is to do and what it costs, and do nothing."""
    updates_per_second: float | None = None
    """Updates per second of a job, its seeds together, for the cost."""
    measure: bool = False
    """Measure that by some updates here."""
    devices: tuple[int, ...] = (1, 8, 64)
    """Numbers of GPUs, or of CPUs where a job takes no GPU, that the cost is told for."""
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
        """File of the rows."""
        return self.folder / RESULTS

    @property
    def plan(self) -> Plan:
        """The jobs.

        Raises:
            ValueError: as `make_plan`.
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
            seeds=parse_seeds(self.seeds),
            seeds_per_job=self.seeds_per_job,
            folder=self.folder,
        )
