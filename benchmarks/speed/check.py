"""Check of the golden values for every execution: eager, compiled, graph; one seed and three.

The recorded cases of the published implementation (tests/rl/golden), three updates each, are
repeated by the trainers of `benchmarks.speed`'s executions on one device.  Losses, norms of the
gradient and weights must equal the published ones to rtol 1e-5 and atol 1e-6, the latter in units
of a tensor's largest entry; on a GPU, whose products sum in another order, to ten times that.  Then
the error of lower precision is measured, as the largest error of any tensor in the same units.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.update import Execution
from flows import Trainer, TrainerConfig
from flows.training import SplitLoss, StackedTrainers, UpdateGraph

UPDATES = 3
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}


class Recorded(SplitLoss):
    """A loss on the recorded batches and noises."""

    def __init__(self, case: Any, device: str, compiled: bool) -> None:
        moved = [
            (
                type(batch := case.batch(u))(*(x.to(device) for x in batch)),
                {name: x.to(device) for name, x in case.noise(u).items()},
            )
            for u in range(UPDATES)
        ]
        self.inputs, self.compiled = moved, compiled
        self.sampled = 0

    def sample(self, module: Any, generator: torch.Generator) -> tuple[Any, ...]:
        """Return the next recorded inputs, starting again after the last."""
        self.sampled += 1
        return self.inputs[(self.sampled - 1) % UPDATES]

    def evaluate(self, module: Any, inputs: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics at the given inputs."""
        return module.loss(*inputs)

    def updates_without_host(self) -> int:
        """Return how many updates need no host: all of a launch."""
        return UPDATES

    def follow(self, module: Any, metrics: dict[str, Tensor]) -> None:
        """Let the agent's state follow the metrics."""
        module.follow(metrics)

    def before_update(self, module: Any) -> None:
        """Move the target networks."""
        module.update_targets()


def make_trainer(case: Any, device: str, compiled: bool = False, autocast: bool = False) -> Trainer:
    """Make a trainer of the case's agent."""
    agent = case.make().to(device)
    config = TrainerConfig(
        iterations=100 * UPDATES,
        lr=agent.config.lr,
        lr_schedule="constant",
        ema_decay=0.0,
        grad_clip=agent.config.grad_clip,
        autocast=autocast,
        checkpoint_every=UPDATES,
    )
    return Trainer(agent, Recorded(case, device, compiled), config)


def largest_error(
    case: Any, device: str, execution: Execution, seeds: int = 1, *, autocast: bool = False
) -> float:
    """Return the largest error of losses, norms and weights after three updates.

    Errors are in units of a tensor's largest entry, or of 1 if that is larger.  A graph is launched
    once more after warming up and recording, from the initial state, so that a launch is checked
    and not only the eager updates that it was recorded from.
    """
    trainers = [make_trainer(case, device, execution != "eager", autocast) for _ in range(seeds)]
    stacked = StackedTrainers(trainers) if seeds > 1 else None
    results: list[list[dict[str, Tensor]]] = []
    if execution == "graph":
        update_graph = UpdateGraph(UPDATES)
        before = [_snapshot(trainer) for trainer in trainers]
        for _ in range(3):  # warm, recorded and launched, launched
            for trainer, state in zip(trainers, before, strict=True):
                trainer.unreported.clear()
                _restore(trainer, state)
            update_graph(tuple(trainers), stacked)
        results = [list(of_all) for of_all in zip(*(t.unreported for t in trainers), strict=True)]
    for _ in range(UPDATES - len(results)):
        results.append(stacked.step() if stacked else [trainers[0].step()])
    worst = 0.0
    for trainer, metrics in zip(trainers, zip(*results, strict=True), strict=True):
        for u, numbers in enumerate(metrics):
            for name, published in (("loss", "total_loss"), ("grad_norm", "grad_global_norm")):
                worst = max(worst, _error(numbers[name], case.get(f"u{u}.out.{published}")))
        for name, weight in case.leaves(trainer.module):
            key = f"u{UPDATES - 1}.out.params.modules_{name}"
            if case.has(key):
                worst = max(worst, _error(weight, _golden().ours(name, case.get(key))))
    return worst


def _snapshot(trainer: Trainer) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in _state(trainer)]


def _restore(trainer: Trainer, before: Sequence[Tensor]) -> None:
    """Restore weights and buffers and reset the optimiser, in the same memory."""
    with torch.no_grad():
        for tensor, value in zip(_state(trainer), before, strict=True):
            tensor.copy_(value)
        for state in trainer.optimizer.adam.state.values():
            for tensor in state.values():
                tensor.zero_()


def _state(trainer: Trainer) -> list[Tensor]:
    return [*trainer.module.parameters(), *trainer.module.buffers()]


def _error(found: Tensor, expected: Tensor) -> float:
    found = found.detach().cpu().double().reshape(expected.shape)
    scale = max(1.0, float(expected.abs().max()))
    return float((found - expected.double()).abs().max()) / scale


def _golden() -> Any:
    """Return the module of the tests that reads the recorded cases."""
    folder = Path(__file__).parents[2] / "tests"
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    from helpers import golden_values

    return golden_values


def main(device: str, executions: Sequence[Execution], *, quick: bool = False) -> None:
    """Check every execution and print the errors.

    Raises:
        AssertionError: an execution does not reproduce the golden values.
    """
    cases = [case for case in _golden().CASES if not quick or case.agent == "ifql"]
    allowed = TOLERANCE[device.split(":", maxsplit=1)[0]]
    for execution in executions:
        # Agents differ in their losses alone: two compiled agents represent the rest.
        some = [c for c in cases if execution == "eager" or c.agent in ("qam", "ifql")]
        for case in [c for c in some if execution == "eager" or c.name == "default"]:
            for seeds in (1, 3):
                error = largest_error(case, device, execution, seeds)
                print(f"golden {case} {execution}, {seeds} at once: {error:.1e}", flush=True)
                if error > allowed:
                    raise AssertionError(
                        f"{case}, {execution}, {seeds} at once on {device}: {error:.1e} from the "
                        f"golden values, expected at most {allowed:g}"
                    )
    case = cases[0]
    before = torch.get_float32_matmul_precision()
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
        print(f"error of {case} in tf32: {largest_error(case, device, 'eager'):.1e}")
    bf16 = largest_error(case, device, "eager", autocast=True)
    print(f"error of {case} in bfloat16: {bf16:.1e}")
    torch.set_float32_matmul_precision(before)
