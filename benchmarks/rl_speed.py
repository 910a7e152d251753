r"""How long one update of QAM takes, where the time goes, and how that compares with its peer.

    python -m benchmarks.rl_speed [--peer CHECKOUT --peer-python PYTHON] [--compile] [--quick]

The update is the published one at full size: 4x512 networks, 10 critics, batch 256, K = 10, at the
dimensions of the scene tasks.  ``update`` is one step of the trainer, sampling from a replay
included.  The other rows are its parts, each run by itself through the functions that the update
calls, so that their sum may differ from the whole by what lies between them.

The peer is the published JAX implementation in the user's own checkout, run by an interpreter that
has its requirements (jax, flax, optax, distrax, ml_collections).  It makes one update of the same
sizes on a fixed batch, so the ratio is with ``update without sampling``.  Both take turns in blocks
of a few updates, and the order changes from round to round, because a machine shared with others is
never the same for two minutes.  Times are medians over blocks, the ratio that of paired blocks.
Warm-up and compilation are apart.  On a CPU both are kept to the first ``threads`` processors.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn

from adjoint.lean import lean_adjoint
from adjoint.loss import adjoint_matching_loss
from adjoint.reward import Reward
from adjoint.rollout import velocity_along
from applications.rl.agents import make_agent
from applications.rl.agents.qam import QAM, QAMConfig
from applications.rl.dataset import Dataset
from applications.rl.flow_policy import behaviour_loss, condition
from applications.rl.objective import Objective, Schedule
from applications.rl.replay import Replay
from benchmarks.rl_speed_peer import Peer
from flows.checkpoint import write_json
from flows.process import prepare_process
from flows.trainer import Trainer, TrainerConfig

Row = dict[str, Any]
Clock = Literal["wall", "cpu"]

WHOLE = "update"
FIXED = "update without sampling"
ROWS_OF_DATA = 100_000


@dataclass(frozen=True)
class SpeedConfig:
    """Time one update of QAM, its parts, and the published implementation."""

    device: str = "cpu"
    """Where the update runs: cpu or cuda."""
    threads: int = 1
    """Threads of a CPU."""
    rounds: int = 8
    """Blocks of updates of each implementation."""
    updates: int = 2
    """Updates in a block."""
    clock: Clock = "wall"
    """Time of the wall, or of the processor: the better one on a CPU that others use too, with one
    thread (with several it is their sum)."""
    peer: Path | None = None
    """Checkout of the published implementation."""
    peer_python: Path = Path(sys.executable)
    """Interpreter that has what the peer requires."""
    compile: bool = False
    """Compile the agent's loss (minutes; needs a C++ compiler on a CPU)."""
    quick: bool = False
    """Tiny sizes, to try the benchmark itself."""
    output: Path = Path("benchmarks/results/rl_speed.json")
    """Rows {name, device, threads, ms_per_update, ratio_to_peer, seeds}."""

    def __post_init__(self) -> None:
        for name in ("threads", "rounds", "updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.clock == "cpu" and not self.device.startswith("cpu"):
            raise ValueError(f"clock must be 'wall' on device {self.device!r}, got 'cpu'")
        if self.peer is not None and not (self.peer / "agents" / "qam.py").is_file():
            raise ValueError(f"peer must be a checkout that has agents/qam.py, got {self.peer}")


@dataclass(frozen=True)
class Sizes:
    """What both implementations are given."""

    observation: int = 40
    action: int = 5
    horizon: int = 5
    batch: int = 256
    critics: int = 10
    steps: int = 10
    hidden: tuple[int, ...] = (512, 512, 512, 512)


QUICK = Sizes(observation=6, action=2, horizon=3, batch=16, critics=2, steps=4, hidden=(32, 32))


class Ours:
    """An agent, a replay of random rows, and the trainer of both.

    Arguments:
        sizes: of the problem.
        device: where everything lies.
        compiled: compile the agent's loss.
    """

    def __init__(self, sizes: Sizes, device: str, *, compiled: bool = False) -> None:
        self.sizes = sizes
        config = QAMConfig(
            hidden=sizes.hidden,
            critics=sizes.critics,
            flow_steps=sizes.steps,
            horizon=sizes.horizon,
        )
        agent = make_agent("qam", config, sizes.observation, sizes.action, seed=0).to(device)
        assert isinstance(agent, QAM)
        self.agent = agent
        if compiled:
            agent.loss = torch.compile(agent.loss, dynamic=False)  # type: ignore[method-assign]
        self.replay = Replay.from_dataset(random_dataset(sizes), device=device)
        self.generator = torch.Generator(device).manual_seed(0)
        self.batch = self.sample()
        training = TrainerConfig(
            lr=config.lr, lr_schedule="constant", ema_decay=0.0, grad_clip=config.grad_clip
        )
        self.objective = Objective(self.replay, Schedule(10**9), batch_size=sizes.batch)
        self.trainer = Trainer(agent, self.objective, training)
        self.fixed = Trainer(agent, self._loss_of_the_batch, training)

    def sample(self) -> Any:
        """A batch of windows."""
        config = self.agent.config
        return self.replay.sample(
            self.sizes.batch,
            horizon=config.horizon,
            discount=config.discount,
            generator=self.generator,
        )

    def update(self) -> None:
        """One update of the training."""
        self.trainer.step()

    def update_without_sampling(self) -> None:
        """One update on the batch that is always the same; the noise is drawn."""
        self.fixed.step()

    def _loss_of_the_batch(self, module: nn.Module, generator: torch.Generator) -> Any:
        noise = self.agent.draw_noise(self.sizes.batch, generator)
        loss = self.agent.loss(self.batch, noise)
        self.agent.update_slow()  # the weights are still those of before the step
        return loss

    def parts(self) -> dict[str, Callable[[], object]]:
        """The parts of an update by name, each a function that does it once."""
        agent, batch = self.agent, self.batch
        noise = agent.draw_noise(self.sizes.batch, self.generator)
        s, cond = batch.observations, condition(batch.observations)
        chunks, kernel = agent.flatten(batch.actions), agent.kernel()
        xs = agent.trajectory(kernel, s, noise).xs
        adjoint = agent.adjoint(kernel, s, xs)
        target = agent.target(batch, noise)
        reward = Reward(agent.value, scale=agent.config.inverse_temperature)
        terminal = adjoint.values[-1]

        def sampling() -> None:
            self.sample()
            agent.draw_noise(self.sizes.batch, self.generator)

        def critic() -> None:
            agent.critic_loss(batch, target)[0].backward()

        def behaviour() -> None:
            behaviour_loss(agent.base, s, chunks, batch.valid, noise).backward()

        def matching() -> None:
            v = velocity_along(agent.velocity, xs[:-1], kernel.t[:-1], cond)
            adjoint_matching_loss(v, adjoint, kernel)[0].backward()

        online = [p for p in agent.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(agent.loss(batch, noise)[0], online)

        def step() -> None:
            for parameter, gradient in zip(online, gradients, strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(online, agent.config.grad_clip)
            agent.update_slow()
            self.trainer._optimizer.step()

        return {
            "sampling": sampling,
            "target": lambda: agent.target(batch, noise),
            "critic loss": self._afresh(critic),
            "behaviour loss": self._afresh(behaviour),
            "rollout": lambda: agent.trajectory(kernel, s, noise),
            "terminal gradient": lambda: reward.value_and_gradient(xs[-1], cond),
            "adjoint": lambda: lean_adjoint(agent.reference, kernel, xs, terminal, cond),
            "matching loss": self._afresh(matching),
            "clip, step, slow copies": step,
        }

    def _afresh(self, part: Callable[[], None]) -> Callable[[], None]:
        """The part with gradients dropped before it, as in an update."""

        def run() -> None:
            self.agent.zero_grad(set_to_none=True)
            part()

        return run


def random_dataset(sizes: Sizes) -> Dataset:
    """Rows of the right shapes in episodes of 200 steps; no time depends on the numbers."""
    generator = torch.Generator().manual_seed(0)

    def normal(*width: int) -> Any:
        return torch.randn(ROWS_OF_DATA, *width, generator=generator).numpy()

    ends = (torch.arange(1, ROWS_OF_DATA + 1) % 200 == 0).float().numpy()
    return Dataset(
        observations=normal(sizes.observation),
        actions=normal(sizes.action).clip(-0.99, 0.99),
        rewards=normal(),
        masks=1 - ends,
        terminals=ends,
        next_observations=normal(sizes.observation),
    )


@contextlib.contextmanager
def confined(config: SpeedConfig) -> Iterator[None]:
    """This process, and those it starts, on the first ``threads`` processors it may use."""
    before = torch.get_num_threads()
    pinned = config.device == "cpu" and hasattr(os, "sched_setaffinity")
    processors = os.sched_getaffinity(0) if pinned else set()
    torch.set_num_threads(config.threads)
    try:
        if pinned:
            os.sched_setaffinity(0, sorted(processors)[: config.threads])
        yield
    finally:
        if pinned:
            os.sched_setaffinity(0, processors)
        torch.set_num_threads(before)


def seconds(run: Callable[[], object], updates: int, config: SpeedConfig) -> float:
    """Seconds per run of a block of them."""
    clock = time.perf_counter if config.clock == "wall" else time.process_time
    cuda = config.device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    for _ in range(updates):
        run()
    if cuda:
        torch.cuda.synchronize()
    return (clock() - start) / updates


def measure(config: SpeedConfig) -> list[Row]:
    """Rows of the whole update, of the update on a fixed batch, of the parts and of the peer."""
    sizes = QUICK if config.quick else Sizes()
    with confined(config):
        ours = Ours(sizes, config.device, compiled=config.compile)
        runs: dict[str, Callable[[], object]] = {
            WHOLE: ours.update,
            FIXED: ours.update_without_sampling,
            **ours.parts(),
        }
        start = time.perf_counter()
        for run in runs.values():
            seconds(run, 2, config)
        print(f"warm-up {time.perf_counter() - start:.1f} s")
        peer = None
        if config.peer is not None:
            interpreter = (config.peer_python, config.device, config.threads)
            peer = Peer(asdict(sizes), config.peer, *interpreter)
        times: dict[str, list[float]] = {name: [] for name in runs}
        theirs: list[float] = []
        if peer is not None:
            print(f"warm-up of the peer {peer.compile_s:.1f} s")
            peer.block(2, config.clock)
        for i in range(config.rounds):
            if peer is not None and i % 2:
                theirs.append(peer.block(config.updates, config.clock))
            for name in (FIXED, WHOLE) if i % 2 else (WHOLE, FIXED):
                times[name].append(seconds(runs[name], config.updates, config))
            if peer is not None and not i % 2:
                theirs.append(peer.block(config.updates, config.clock))
            for name, run in runs.items():
                if name not in (WHOLE, FIXED):
                    times[name].append(seconds(run, config.updates, config))
        if peer is not None:
            peer.close()
    return table(config, times, theirs)


def table(config: SpeedConfig, times: dict[str, list[float]], theirs: list[float]) -> list[Row]:
    """Medians as rows; ``update without sampling, fastest block`` has the ratio of the minima."""

    def row(name: str, value: float, ratio: float | None = None) -> Row:
        return {
            "name": name,
            "device": config.device,
            "threads": config.threads,
            "ms_per_update": 1e3 * value,
            "ratio_to_peer": ratio,
            "seeds": 1,
        }

    def paired(name: str) -> float | None:
        if not theirs:
            return None
        return statistics.median(a / b for a, b in zip(times[name], theirs, strict=True))

    rows = [row(name, statistics.median(times[name]), paired(name)) for name in (WHOLE, FIXED)]
    fastest = min(times[FIXED])
    rows.append(row(f"{FIXED}, fastest block", fastest, fastest / min(theirs) if theirs else None))
    if theirs:
        rows.append(row("peer", statistics.median(theirs), 1.0))
        rows.append(row("peer, fastest block", min(theirs), 1.0))
    parts = [name for name in times if name not in (WHOLE, FIXED)]
    return rows + [row(name, statistics.median(times[name])) for name in parts]


def main(config: SpeedConfig) -> None:
    """Measure, print the table and write the rows."""
    rows = measure(config)
    for row in rows:
        ratio = "" if row["ratio_to_peer"] is None else f"{row['ratio_to_peer']:8.2f} of the peer"
        print(f"{row['name']:<40} {row['ms_per_update']:9.2f} ms{ratio}")
    write_json(config.output, rows)


if __name__ == "__main__":
    prepare_process()
    main(tyro.cli(SpeedConfig, prog="python -m benchmarks.rl_speed"))
