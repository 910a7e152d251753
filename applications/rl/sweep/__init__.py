"""Sweeps: agents × tasks × seeds on one machine or many, ``python -m applications.rl sweep``.

    sweep --tasks published --agents qam --seeds 0-11 --online-steps 500000 --gpus 1 --dry-run

says what the published table costs; without ``--dry-run`` the command makes it.  Every run is
written where `train` would write it.  The same command again therefore leaves finished runs alone
and continues the others, and `report` reads either the folder or its ``results.json``.

A run fails alone, whether its task does not exist, its data are missing, its loss became NaN, or
its worker dies each time.  The other runs go on, and the exit status of the command tells of
failures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from applications.common.errors import RunError
from applications.rl.sweep.config import SweepConfig
from applications.rl.sweep.cost import cost, measure
from applications.rl.sweep.folders import Work, collect, is_other, progress
from applications.rl.sweep.plan import Job, Run, State
from applications.rl.sweep.ray import engine, execute, room
from applications.rl.sweep.table import Table
from applications.rl.sweep.worker import Train, train_task
from applications.rl.training.config import TrainConfig
from applications.rl.training.seeds import parse_seeds
from flows.training import ensure_writable

__all__ = ["SweepConfig", "describe", "run_sweep", "show_sweep"]


def run_sweep(
    config: SweepConfig, train: Train = train_task, *, poll: float = 2.0
) -> dict[Run, State]:
    """Train the unfinished runs, and write the rows of finished ones to ``results.json``.

    Arguments:
        config: the options.
        train: function that a job calls in its worker; with a function of your own a sweep trains
            in environments of your own.  It is pickled, so workers must be able to import it.
        poll: seconds between two looks at the runs.

    Returns:
        the state in which each run ended.

    Raises:
        ValueError: a name or option is refused, before anything starts.
        ImportError: Ray is not installed.
        RunError: there is no cluster, or no job fits on this machine.
        OSError: the folder cannot be written.
    """
    work = Work.of(config.plan)
    ensure_writable(config.results, "folder")
    states = dict(work.states)
    done = [run for run, state in states.items() if state.name == "done"]
    if done:
        collect(config.results, done)
    table = Table(work.configs, states)
    try:
        for now in _executed(config, work, train, poll):
            new = [r for r, s in now.items() if s.name == "done" and states.get(r) != s]
            states |= now
            if new:
                collect(config.results, new)
            table.show(now)
    finally:
        table.close()
    return states


def _executed(
    config: SweepConfig, work: Work, train: Train, poll: float
) -> Iterator[dict[Run, State]]:
    if not work.jobs:
        return
    with engine(config.address, config.max_cpus):
        places = room(config.cpus, config.gpus)
        if not places:
            what = f"a job takes {config.cpus:g} CPUs and {config.gpus:g} GPUs"
            if config.address is None:
                raise RunError(f"cpus, gpus: {what}, which this machine does not have")
            print(f"note: {what}, which no node has; waiting for one that has")
        yield from execute(
            work.jobs,
            train,
            cpus=config.cpus,
            gpus=config.gpus,
            retries=config.retries,
            poll=poll,
        )


def show_sweep(config: SweepConfig) -> None:
    """Print the plan of a sweep, run it, and print how it ended, as the command ``sweep``.

    Raises:
        RunError: a run failed; see `run_sweep` for other errors.
    """
    print(describe(config))
    if config.dry_run:
        return
    states = run_sweep(config)
    failed = {run: state for run, state in states.items() if state.name == "failed"}
    alike: dict[tuple[str, str, str], list[str]] = {}
    for run, state in failed.items():
        alike.setdefault((run.task, run.agent, state.note), []).append(str(run.seed))
    for (task, agent, note), seeds in alike.items():
        print(f"failed: {task} {agent} seed {', '.join(seeds)}: {note}")
    print(f"done: {len(states) - len(failed)} of {len(states)} runs")
    if config.results.exists():
        print(f"wrote {config.results}\nnext: python -m applications.rl report {config.results}")
    if failed:
        raise RunError(f"{len(failed)} of {len(states)} runs failed")


def describe(config: SweepConfig) -> str:
    """Describe the plan of a sweep and its cost in a few lines."""
    plan = config.plan
    work = Work.of(plan)
    tasks = {run.task for run in plan.runs} - {run.task for run in plan.refused}
    seeds = len(parse_seeds(config.seeds))
    left = [(job, work.updates(job)) for job in work.jobs]
    runs = [(run, job.config) for job in work.jobs for run in job.runs]
    begun = sum(progress(run, setting) > 0 for run, setting in runs)
    others = [str(run.folder) for run, setting in runs if is_other(run, setting)]
    done = sum(state.name == "done" for state in work.states.values())
    lines = [
        f"runs: {len(plan.runs) - len(plan.refused)} (tasks {len(tasks)} × agents "
        f"{len(config.agents)} × seeds {seeds}) in {config.folder}; {done} finished, {begun} begun",
        *dict.fromkeys(f"failed: {note}" for note in plan.refused.values()),
        *(
            f"will be refused: {folder} holds a run of other settings; name another --folder"
            for folder in others
        ),
        f"to do: {sum(n for _, n in left)} updates in {len(left)} jobs (of each: seeds "
        f"{config.seeds_per_job}, CPUs {config.cpus:g}, GPUs {config.gpus:g})",
    ]
    if config.dry_run:
        lines[1:1] = [f"  {task}" for task in sorted(tasks)]
    if left:
        lines += _cost(config, left)
    return "\n".join(lines)


def _cost(config: SweepConfig, left: Sequence[tuple[Job, int]]) -> list[str]:
    given = config.updates_per_second
    if given is not None:
        rates, source = dict.fromkeys(config.agents, given), "as given"
    elif config.measure:
        examples: dict[str, TrainConfig] = {}
        for job, _ in left:
            examples.setdefault(job.config.agent, job.config)
        rates = {agent: measure(example) for agent, example in examples.items()}
        source = "measured here, one seed alone"
    else:
        return ["cost: give --updates-per-second of a job to compute it, or --measure it here"]
    speeds = ", ".join(f"{agent} {rate:.3g}" for agent, rate in rates.items())
    text = cost(left, rates, cpus=config.cpus, gpus=config.gpus, devices=config.devices)
    return [f"updates per second of a job, {source}: {speeds}", text]
