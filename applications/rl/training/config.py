"""The options of a training; see `applications.rl.training.train`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from applications.common.objects import NAME_OR_OBJECT, is_reference
from applications.rl.agents.options import AgentConfig
from applications.rl.agents.pretrained import describe
from applications.rl.agents.registry import agent_name
from applications.rl.training.phases import Phases
from applications.rl.training.seeds import SEEDS
from flows.training import check_types
from flows.training.renamed import RefusesOldNames, Renamed

EXECUTION = {"execution": True}
"""Metadata of an option that says how a run is executed or logged, not what is learned.

Runs that differ in such options alone are seeds of one setting; see `EXECUTION_OPTIONS`."""


@dataclass(frozen=True)
class TrainConfig(RefusesOldNames):
    """Train an agent on a task, offline, online, or both; options of the agent come last."""

    renamed: ClassVar[Renamed] = {
        "eval_beside": "background_eval",
        "together": "stacked",
        "graph": "cuda_graphs",
        "slow_rate": "target_rate",
        "slow_gradient": "target_gradient",
        "slow_base": "target_behaviour",
    }
    """New names of options, also the agents', by their names in version 0.1."""
    task: str
    """Task, such as cube-single-play-singletask-task1-v0; `list` shows the names."""
    agent: str = ""
    """Agent: a short name, which `list` shows, or module:Name of one of your own, whose module is
    then imported.  If not given, the agent that the options belong to, else qam."""
    preset: str = "published"
    """Source of the agent's options: published (by domain), or small (for a small machine)."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--seed"]), SEEDS] = (0,)
    """Seeds, numbers or ranges such as 0-11; each seed is a run with a folder of its own."""
    stacked: int = field(default=0, metadata=EXECUTION)
    """Number of seeds trained at a time, their losses evaluated as one.  0 stands for all seeds on
    a GPU and for one on a CPU, where stacking saves no time.  Changes results by rounding only."""
    offline_steps: int = 1_000_000
    """Updates on the data alone."""
    online_steps: int = 0
    """Environment steps after the offline updates; 500000 as published."""
    start_training: int = 5000
    """Online step from which there is one update per environment step."""
    batch_size: int = 256
    """Windows in a batch."""
    balanced_sampling: bool = False
    """Online, draw one half of each batch from the data and the other from the online transitions,
    and act at random before start_training, as RLPD does; otherwise all transitions are drawn
    alike, and the agent acts from the first step."""
    use_data: bool = True
    """Learn from the task's data; --no-use-data learns from online transitions alone."""
    data: Path | None = None
    """Folder of the data, $OGBENCH_DATA or ~/.ogbench/data if not given; or an .npz file of your
    own: observations, actions in [-1, 1] or between action_low and action_high, rewards, terminals
    (1 at the last row of an episode), masks (0 where it truly ended; without, every terminal is a
    true end), timeouts, truncations or episode_terminals (ends that are only time limits) and
    next_observations (without, rows are states, and the last of an episode is only its end)."""
    shard_every: int = 1000
    """Updates on one shard before the next one takes its place, where the data come in shards."""
    behaviour: Annotated[Any, NAME_OR_OBJECT] = None
    """Behaviour flow that the agent starts from: the folder of a run, such as `train --agent bc`
    wrote, in which {task} and {seed} stand for the folder of the task and the number of the seed;
    or a flow policy of your own, as module:Name.  Behaviour, target network and policy flow begin
    with its weights."""
    freeze_behaviour: bool = False
    """Keep the behaviour as it is, instead of fitting it to the data further."""
    weights: Path | None = None
    """Run of this agent whose weights all networks start from, with a new optimiser: training then
    goes on from it on other data or in another phase; {task} and {seed} as in behaviour."""
    eval_every: int = 50_000
    """Steps between two evaluations; 0 turns them off."""
    eval_episodes: int = 50
    """Episodes of an evaluation."""
    environments: int = field(default=4, metadata=EXECUTION)
    """Environments that play at once in an evaluation; changes no result."""
    workers: int = field(default=0, metadata=EXECUTION)
    """Processes with one environment each that play in their place; changes no result."""
    background_eval: bool = field(default=False, metadata=EXECUTION)
    """Evaluate in a separate process while training goes on; takes one more core and some seconds
    to start.  Changes no result on a CPU; an agent trained on a GPU is then evaluated on the
    CPU."""
    checkpoint_every: int = field(default=5000, metadata=EXECUTION)
    """Updates between two checkpoints."""
    log_every: int = field(default=500, metadata=EXECUTION)
    """Updates between two rows of the metrics."""
    tensorboard: bool = field(default=False, metadata=EXECUTION)
    """Log to TensorBoard too."""
    wandb: str | None = field(default=None, metadata=EXECUTION)
    """Project of Weights & Biases to log to."""
    folder: Path | None = field(default=None, metadata=EXECUTION)
    """Folder to write the runs to; outputs/rl/TASK/AGENT if not given."""
    resume: bool = field(default=False, metadata=EXECUTION)
    """Continue from the checkpoints in the folder; finished seeds are left alone."""
    overwrite: bool = field(default=False, metadata=EXECUTION)
    """Begin anew where the folder holds a run already."""
    device: str = field(default="auto", metadata=EXECUTION)
    """Device of the training: cpu, cuda, or auto, which is cuda where there is one."""
    threads: int = field(default=0, metadata=EXECUTION)
    """Threads of PyTorch; 0 keeps its default."""
    compile: bool = field(default=False, metadata=EXECUTION)
    """Compile the loss: a fifth less time on a CPU, a minute or more before the first update.
    Changes results by rounding only."""
    cuda_graphs: int = field(default=0, metadata=EXECUTION)
    """Offline updates made by one launch of a CUDA graph (10 say; `flows.training.update_graph`).
    Without graphs, a GPU waits for the host between small products.  Changes no result; 0 turns
    graphs off."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Precision of matrix products: tf32 (on a GPU) rounds their inputs to 10 bits, bfloat16
    (autocast; on a CPU fast only where it has instructions for it) inputs and results to 7, but for
    the output layers, which stay in float32, on a GPU in tf32.  `benchmarks.speed --check` says
    what it does to the numbers."""
    options: Annotated[AgentConfig | None, tyro.conf.AvoidSubcommands, tyro.conf.arg(name="")] = (
        None
    )
    """Options of the agent; those of the preset if not given."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            TypeError, ValueError: naming the option, its value and what was expected.
        """
        check_types(self)
        if not self.agent:
            name = "qam" if self.options is None else agent_name(self.options)
            object.__setattr__(self, "agent", name)
        minima = {"batch_size": 1, "shard_every": 1, "eval_every": 0, "eval_episodes": 1}
        minima |= {"environments": 1, "workers": 0, "checkpoint_every": 1, "log_every": 1}
        minima |= {"start_training": 1, "threads": 0, "stacked": 0, "cuda_graphs": 0}
        for name, least in minima.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers of at least 0, got {self.seeds}")
        for name in ("eval_every", "checkpoint_every") if self.cuda_graphs else ():
            if getattr(self, name) % self.cuda_graphs:
                raise ValueError(
                    f"{name} must be a multiple of cuda_graphs={self.cuda_graphs}, got "
                    f"{getattr(self, name)}"
                )
        if isinstance(self.behaviour, str | Path) and not is_reference(str(self.behaviour)):
            if not str(self.behaviour):
                raise ValueError("behaviour must name the folder of a run, got ''")
            path = Path(self.behaviour).expanduser().absolute()
            object.__setattr__(self, "behaviour", str(path))
        elif self.behaviour is None and self.freeze_behaviour:
            raise ValueError("freeze_behaviour must be off where no behaviour is given, got True")
        if self.weights is not None:
            if self.behaviour is not None:
                raise ValueError(
                    f"behaviour must not be given beside weights, which include it, got "
                    f"{self.behaviour_name!r}"
                )
            object.__setattr__(self, "weights", self.weights.expanduser().absolute())
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite must not both be given")
        if not self.phases.updates:
            raise ValueError("offline_steps and online_steps must not both be 0")
        if not self.use_data and self.balanced_sampling:
            raise ValueError("balanced_sampling must be off where no data are used, got True")
        if not self.use_data and self.offline_steps:
            raise ValueError(
                f"offline_steps must be 0 where no data are used, got {self.offline_steps}"
            )

    @property
    def phases(self) -> Phases:
        """The offline and the online phase."""
        return Phases(self.offline_steps, self.online_steps, self.start_training)

    @property
    def path(self) -> Path:
        """Folder that holds a folder for each seed."""
        return self.folder or Path("outputs/rl") / folder_name(self.task) / folder_name(self.agent)

    def behaviour_run(self, seed: int) -> str | None:
        """Return the run whose behaviour that of ``seed`` starts from; None if it is no run."""
        if not isinstance(self.behaviour, str) or is_reference(self.behaviour):
            return None
        return self._named(self.behaviour, seed)

    def weights_run(self, seed: int) -> str | None:
        """Return the run whose weights those of ``seed`` start from; None if there is none."""
        return None if self.weights is None else self._named(str(self.weights), seed)

    def _named(self, run: str, seed: int) -> str:
        return run.replace("{task}", folder_name(self.task)).replace("{seed}", str(seed))

    @property
    def behaviour_name(self) -> str | None:
        """The behaviour as files record it: as given, or a description of an object."""
        return None if self.behaviour is None else describe(self.behaviour)

    @property
    def plain(self) -> dict[str, Any]:
        """The options as plain data by name, as files record them."""
        content = asdict(replace(self, behaviour=None, freeze_behaviour=False))
        named = {"behaviour": self.behaviour_name, "freeze_behaviour": self.freeze_behaviour}
        return content | named

    def run_folder(self, seed: int) -> Path:
        """Return the folder of the run of ``seed``."""
        return self.path / f"seed{seed}"


def folder_name(name: str) -> str:
    """Return the name of a task or an agent as that of a folder: without colons."""
    return name.replace(":", "-")


EXECUTION_OPTIONS = tuple(option.name for option in fields(TrainConfig) if option.metadata)
"""Options by which runs of one setting may differ."""
