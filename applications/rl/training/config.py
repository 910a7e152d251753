"""The options of a training; see `applications.rl.training.train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from applications.rl.agents.base import AgentConfig
from applications.rl.training.agent_loss import Phases
from applications.rl.training.seeds import SEEDS


@dataclass(frozen=True)
class TrainConfig:
    """Train an agent on a task, offline, online, or both; options of the agent come last."""

    task: str
    """Task, such as cube-single-play-singletask-task1-v0; `list` shows the names."""
    agent: str = "qam"
    """Agent; `list` shows the names."""
    preset: str = "published"
    """Where the agent's options come from: published (by domain), or small (for a small machine).
    """
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--seed"]), SEEDS] = (0,)
    """Seeds, numbers or ranges such as 0-11, each a run of its own in a folder of its own."""
    together: int = 0
    """Seeds trained at a time, by one evaluation of their losses; 0 is all of them on a GPU and one
    on a CPU, which has no time to gain.  Changes results by rounding only."""
    offline_steps: int = 1_000_000
    """Updates on the data alone."""
    online_steps: int = 0
    """Environment steps after that; 500000 as published."""
    start_training: int = 5000
    """Online step from which there is one update per environment step."""
    batch_size: int = 256
    """Windows in a batch."""
    use_data: bool = True
    """Learn from the task's data; without, from what comes online alone."""
    data: Path | None = None
    """Folder of the data, $OGBENCH_DATA or ~/.ogbench/data if not given; or an .npz file of your
    own: observations, actions in [-1, 1], rewards, terminals (1 at the last row of an episode),
    masks (0 where it truly ended; without, every terminal is a true end, also of a time limit) and
    next_observations (without, rows are states, and the last of an episode is only its end)."""
    shard_every: int = 1000
    """Where the data are shards: updates after which the next one takes the place of the last."""
    eval_every: int = 50_000
    """Steps between two evaluations; 0 is none."""
    eval_episodes: int = 50
    """Episodes of an evaluation."""
    environments: int = 4
    """Environments that play at once in an evaluation; changes no result."""
    workers: int = 0
    """Processes of an evaluation with one environment each, instead; changes no result."""
    background_eval: bool = False
    """Evaluate in a process beside training, which goes on meanwhile; takes a core more and some
    seconds to start.  Changes no result on a CPU; what is trained on a GPU is evaluated on the CPU
    then."""
    checkpoint_every: int = 5000
    """Updates between two checkpoints."""
    log_every: int = 500
    """Updates between two rows of the metrics."""
    tensorboard: bool = False
    """Log to TensorBoard too."""
    wandb: str | None = None
    """Project of Weights & Biases to log to."""
    folder: Path | None = None
    """Where the runs are written; outputs/rl/TASK/AGENT if not given."""
    resume: bool = False
    """Continue from the checkpoints in the folder; seeds that are finished are left alone."""
    overwrite: bool = False
    """Begin anew where the folder holds a run already."""
    device: str = "auto"
    """Where the agent is trained: cpu, cuda, or auto, which is cuda where there is one."""
    threads: int = 0
    """Threads of PyTorch; 0 leaves it the choice."""
    compile: bool = False
    """Compile the loss: a fifth less time on a CPU, a minute or more before the first update.
    Changes results by rounding only."""
    graph: int = 0
    """Offline updates made by one launch of a CUDA graph (10 say; `flows.training.cuda_graphs`);
    without it a GPU waits for the host between small products.  Changes no result; 0 is none."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Of matrix products: tf32 (on a GPU) rounds their inputs to 10 bits, bfloat16 (autocast; on a
    CPU fast only where it has instructions for it) inputs and results to 7, but for the output
    layers, which stay in float32, on a GPU in tf32.  `benchmarks.speed --check` says what it does
    to the numbers."""
    options: Annotated[AgentConfig | None, tyro.conf.AvoidSubcommands, tyro.conf.arg(name="")] = (
        None
    )
    """Options of the agent; those of the preset if not given."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            ValueError: naming the option, its value and what was expected.
        """
        minima = {"batch_size": 1, "shard_every": 1, "eval_every": 0, "eval_episodes": 1}
        minima |= {"environments": 1, "workers": 0, "checkpoint_every": 1, "log_every": 1}
        minima |= {"start_training": 1}
        for name, least in (minima | {"threads": 0, "together": 0, "graph": 0}).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers of at least 0, got {self.seeds}")
        for name in ("eval_every", "checkpoint_every") if self.graph else ():
            if getattr(self, name) % self.graph:
                raise ValueError(
                    f"{name} must be a multiple of graph={self.graph}, got {getattr(self, name)}"
                )
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite must not both be given")
        if not self.schedule.updates:
            raise ValueError("offline_steps and online_steps must not both be 0")
        if not self.use_data and self.offline_steps:
            raise ValueError(
                f"offline_steps must be 0 where no data are used, got {self.offline_steps}"
            )

    @property
    def schedule(self) -> Phases:
        """The phases."""
        return Phases(self.offline_steps, self.online_steps, self.start_training)

    @property
    def path(self) -> Path:
        """Folder of the runs."""
        return self.folder or Path("outputs/rl") / self.task.replace(":", "-") / self.agent
