"""Updates of agents on random data, whole and in parts, which `benchmarks.speed` times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from adjoint import adjoint_matching_loss, lean_adjoint, velocity_along
from applications.rl import (
    QAM,
    AgentLoss,
    Batch,
    Dataset,
    Noise,
    Phases,
    QAMConfig,
    Replay,
    behaviour_loss,
    condition,
    critic_loss,
    make_agent,
    td_target,
)
from applications.rl.agents.losses import chain_adjoint
from flows import Trainer, TrainerConfig
from flows.training import SplitLoss, StackedTrainers, UpdateGraph

Execution = Literal["eager", "compiled", "graph"]
"""Way of execution: eager; with a compiled loss; or ten at a time from a CUDA graph, compiled."""

ROWS_OF_DATA = 100_000
LAUNCHED = 10
"""Number of updates in a launch of a graph."""


@dataclass(frozen=True)
class Sizes:
    """Sizes for both implementations: the published ones at the dimensions of the scene tasks."""

    observation: int = 40
    action: int = 5
    horizon: int = 5
    batch: int = 256
    critics: int = 10
    steps: int = 10
    hidden: tuple[int, ...] = (512, 512, 512, 512)


QUICK = Sizes(observation=6, action=2, horizon=3, batch=16, critics=2, steps=4, hidden=(32, 32))


class FixedBatch(SplitLoss):
    """An agent's loss on one fixed batch with fresh noise.

    Arguments:
        loss: the loss, whose first batch stays.
    """

    def __init__(self, loss: AgentLoss) -> None:
        self.loss, self.compiled = loss, loss.compiled
        self.batch: Batch | None = None

    def host_step(self, module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """Count an update."""
        return self.loss.host_step(module, generator)

    def sample(self, module: nn.Module, generator: torch.Generator) -> tuple[Batch, Noise]:
        """Return the fixed batch and new noise."""
        if self.batch is None:
            self.batch, _ = self.loss.sample(module, generator)
        assert isinstance(module, QAM)
        return self.batch, module.draw_noise(self.loss.batch_size, generator)

    def evaluate(
        self, module: nn.Module, inputs: tuple[Batch, Noise]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the agent's loss on a batch and its noise, and metrics."""
        return self.loss.evaluate(module, inputs)

    def updates_without_host(self) -> int:
        """Return how many updates from the next on do not need the host."""
        return self.loss.updates_without_host()

    def follow(self, module: nn.Module, metrics: dict[str, Tensor]) -> None:
        """Let the agent's state follow the metrics."""
        self.loss.follow(module, metrics)

    def before_update(self, module: nn.Module) -> None:
        """Move the target networks."""
        self.loss.before_update(module)


class Update:
    """Updates of one or several agents.

    Arguments:
        sizes: sizes of the problem.
        device: device of agents and data.
        seeds: number of agents trained at once.
        execution: way of execution, see `Execution`.
        fixed: train on one fixed batch, without sampling from the replay.
        autocast: bfloat16 where PyTorch finds it safe.

    Attributes:
        calls: number of updates of each agent in a call.
    """

    def __init__(
        self,
        sizes: Sizes,
        device: str,
        *,
        seeds: int = 1,
        execution: Execution = "eager",
        fixed: bool = False,
        autocast: bool = False,
    ) -> None:
        replay = Replay.from_dataset(random_dataset(sizes), device=device)
        self.trainers = [
            make_trainer(
                sizes,
                replay,
                seed,
                fixed=fixed,
                compiled=execution != "eager",
                autocast=autocast,
            )
            for seed in range(seeds)
        ]
        self.stacked = StackedTrainers(self.trainers) if seeds > 1 else None
        self.update_graph = UpdateGraph(LAUNCHED) if execution == "graph" else None
        self.calls = LAUNCHED if self.update_graph else 1

    def __call__(self) -> None:
        """Make ``calls`` updates of each agent."""
        if self.update_graph is not None:
            self.update_graph(tuple(self.trainers), self.stacked)
            for trainer in self.trainers:
                trainer.iteration += len(trainer.unreported)
                trainer.unreported.clear()
        elif self.stacked is not None:
            self.stacked.step()
        else:
            self.trainers[0].step()


def make_trainer(
    sizes: Sizes,
    replay: Replay,
    seed: int,
    *,
    fixed: bool = False,
    compiled: bool = False,
    autocast: bool = False,
) -> Trainer:
    """Make a trainer of a new QAM agent on the device of the replay.

    Arguments:
        fixed: train on one fixed batch, without sampling from the replay.
    """
    config = QAMConfig(
        hidden=sizes.hidden, critics=sizes.critics, flow_steps=sizes.steps, horizon=sizes.horizon
    )
    agent = make_agent(config, sizes.observation, sizes.action, seed=seed)
    endless = 10**9
    loss = AgentLoss(replay, Phases(endless), batch_size=sizes.batch, compiled=compiled)
    return Trainer(
        agent.to(replay.device),
        FixedBatch(loss) if fixed else loss,
        TrainerConfig(
            iterations=endless,
            lr=config.lr,
            lr_schedule="constant",
            ema_decay=0.0,
            grad_clip=config.grad_clip,
            autocast=autocast,
            seed=seed,
        ),
    )


def parts(sizes: Sizes, device: str) -> dict[str, Callable[[], object]]:
    """Return the parts of an update: functions, by name, that each run one part once."""
    replay = Replay.from_dataset(random_dataset(sizes), device=device)
    trainer = make_trainer(sizes, replay, 0)
    agent, loss, generator = trainer.module, trainer.loss, trainer.generator
    assert isinstance(agent, QAM)
    assert isinstance(loss, AgentLoss)
    batch, noise = loss.sample(agent, generator)
    s, cond = batch.observations, condition(batch.observations)
    config, flow, reward = agent.config, agent.flow, agent.reward
    actions = agent.flatten(batch.actions)
    next_actions, chain, _ = agent.rollouts(batch, noise)
    xs, kernel = chain.xs, chain.kernel
    adjoint = chain_adjoint(flow, chain, s, reward)
    terminal = adjoint.values[-1]

    def target() -> Tensor:
        critics, discount = agent.target_critic, config.window_discount
        return td_target(critics, batch, next_actions, discount, config.rho)

    y = target()

    def critic() -> None:
        critic_loss(agent.critic, s, actions, y, batch.valid)[0].backward()

    def behaviour() -> None:
        behaviour_loss(agent.behaviour, s, actions, batch.valid, noise)[0].backward()

    def matching() -> None:
        v = velocity_along(flow.velocity, xs[:-1], kernel.t[:-1], cond)
        adjoint_matching_loss(v, adjoint, kernel)[0].backward()

    def afresh(part: Callable[[], None]) -> Callable[[], None]:
        """Return the part preceded by dropping the gradients, as in an update."""

        def run() -> None:
            agent.zero_grad(set_to_none=True)
            part()

        return run

    online = [p for p in agent.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(agent.loss(batch, noise)[0], online)

    def step() -> None:
        for parameter, gradient in zip(online, gradients, strict=True):
            parameter.grad = gradient
        trainer.loss_metrics[:] = [{"loss": gradients[0].new_zeros(())}]
        trainer.apply()

    return {
        "sampling": lambda: loss.sample(agent, generator),
        "chain and actions": lambda: agent.rollouts(batch, noise),
        "target": target,
        "critic loss": afresh(critic),
        "behaviour loss": afresh(behaviour),
        "terminal gradient": lambda: reward.value_and_gradient(xs[-1], cond),
        "adjoint": lambda: lean_adjoint(flow.reference, kernel, xs, terminal, cond),
        "matching loss": afresh(matching),
        "clip, step, target networks": step,
    }


class Operations(TorchDispatchMode):
    """Count floating-point operations of matrix products in ``total``.

    `FlopCounterMode` follows modules by hooks, which do not work within a vector-Jacobian product.
    """

    total = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return the result of the operation and count it."""
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def operations(run: Callable[[], object]) -> float:
    """Return the floating-point operations of the matrix products in a call of ``run``."""
    with Operations() as counter:
        run()
    return counter.total


def largest_rate(device: str, time: Callable[[Callable[[], object]], float]) -> float:
    """Return the operations per second of float32 matrix products of the sizes in an update.

    Arguments:
        time: function that returns the seconds of a call of its argument.
    """
    width, rows = 512, 2560
    a, b = (torch.randn(n, width, device=device) for n in (rows, width))
    out: Tensor = torch.empty(rows, width, device=device)

    def product() -> None:
        torch.mm(a, b, out=out)

    time(product)  # the first call loads the library
    return 2 * rows * width * width / time(product)


def random_dataset(sizes: Sizes) -> Dataset:
    """Make a dataset of random numbers in episodes of 200 steps."""
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
