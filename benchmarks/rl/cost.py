"""The cost of learning: what an update of each agent takes, and how many it needs to succeed.

The wall-clock time of runs that share a machine is no measure of an agent.  The updates of all
agents of a task are therefore timed in one process, a few of each in turn, and given as multiples
of an update of ``qam``, the published agent; evaluations are not counted.  The relative time to a
success rate is that multiple times the number of updates after which the mean over the seeds first
reaches the rate, divided by the number that ``qam`` needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median

import torch
from tqdm import tqdm

from applications.rl import AgentLoss, Phases, Replay, find_task, load_dataset, make_agent
from benchmarks.common.clock import seconds
from benchmarks.rl.experiments import Experiment
from benchmarks.rl.runs import BenchmarkConfig, Row, agent_options, data_folder
from flows import Trainer, TrainerConfig

REFERENCE = ("qam", "small behaviour")
"""Agent and preset that all times are relative to."""
ENDLESS = 10**9


def update(experiment: Experiment, replay: Replay) -> Callable[[], object]:
    """Return a function that makes one update of a new agent of an experiment."""
    options = agent_options(experiment)
    agent = make_agent(options, *replay.widths["observations"], *replay.widths["actions"])
    config = TrainerConfig(
        iterations=ENDLESS,
        lr=options.lr,
        lr_schedule="constant",
        ema_decay=0.0,
        grad_clip=options.grad_clip,
    )
    return Trainer(agent, AgentLoss(replay, Phases(ENDLESS)), config).step


def measure(
    config: BenchmarkConfig, experiments: Sequence[Experiment], *, rounds: int = 15, calls: int = 4
) -> list[Row]:
    """Time the updates of experiments on one task, and return a row for each.

    Arguments:
        config: names the folder of the data.
        experiments: agents of one task, one of them that of `REFERENCE`.
        rounds: number of turns; a row has the median over them.
        calls: number of updates of each agent in a turn.

    Returns: rows {task, agent, preset, milliseconds, relative}; ``relative`` is the median over the
    turns of the ratio to the reference in the same turn.
    """
    torch.set_num_threads(1)
    first = experiments[0]
    data = load_dataset(find_task(first.task), folder=data_folder(config, first))
    replay = Replay.from_dataset(data)
    updates = [update(experiment, replay) for experiment in experiments]
    times: list[list[float]] = [[] for _ in experiments]
    for turn in tqdm(range(rounds + 1), desc="rounds of updates"):
        for own, run in zip(times, updates, strict=True):
            taken = seconds(run, calls, device="cpu", clock="cpu")
            if turn:  # the first makes buffers
                own.append(taken)
    names = [(experiment.agent, experiment.preset) for experiment in experiments]
    base = times[names.index(REFERENCE)]
    return [
        {
            "task": first.task,
            "agent": agent,
            "preset": preset,
            "milliseconds": 1000 * median(own),
            "relative": median(a / b for a, b in zip(own, base, strict=True)),
        }
        for (agent, preset), own in zip(names, times, strict=True)
    ]


def curves(rows: Sequence[Row], task: str) -> dict[tuple[str, str], dict[int, float]]:
    """Return the mean success over the seeds by step, for each agent and preset of a task."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        if row["task"] == task:
            own = found.setdefault((str(row["agent"]), str(row["preset"])), {})
            own.setdefault(int(row["step"]), []).append(float(row["success"]))
    return {
        name: {step: mean(values) for step, values in sorted(own.items())}
        for name, own in found.items()
    }


def updates_to(curve: Mapping[int, float], success: float) -> int | None:
    """Return the first step of a curve at which a success rate is reached, None if it never is."""
    return next((step for step, value in curve.items() if value >= success), None)


def relative_times(
    rows: Sequence[Row], costs: Sequence[Row], task: str, *, share: float = 0.8
) -> dict[tuple[str, str], float | None]:
    """Return each agent's time to a share of the best final success, relative to `REFERENCE`.

    None stands for an agent that does not reach it, or that was not timed; nothing is returned
    where the reference does not reach it.
    """
    found = curves(rows, task)
    goal = share * max((list(curve.values())[-1] for curve in found.values()), default=0.0)
    cost = {
        (str(row["agent"]), str(row["preset"])): float(row["relative"])
        for row in costs
        if row["task"] == task
    }
    reference = updates_to(found.get(REFERENCE, {}), goal)
    if reference is None:
        return {}
    times: dict[tuple[str, str], float | None] = {}
    for name, curve in found.items():
        steps = updates_to(curve, goal)
        known = steps is not None and name in cost
        times[name] = cost[name] * steps / reference if known and steps is not None else None
    return times
