"""Groups of runs: the seeds of one setting, at the evaluations that all of them reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from applications.rl.report.results import PHASES, Result
from applications.rl.training.config import EXECUTION_OPTIONS

RECORDED = ("seed", "versions", "dataset", "hours")
"""Recorded facts of a run that are not settings of it."""


@dataclass(frozen=True, eq=False)
class Group:
    """The seeds of one setting on one task, at the steps that all of them reached.

    Attributes:
        task, agent: task and agent of the runs.
        label: name of the setting, unique within the task.
        preset: presets of the runs, as a text.
        seeds: seeds (N,) in order.
        steps: steps (T,), not decreasing.
        phases: name of the phase at each step (T,).
        success: success rates (N, T) in [0, 1].
        episodes: number of episodes of each rate (N, T).
        returns: mean returns (N, T), NaN where they were not recorded.
    """

    task: str
    agent: str
    label: str
    preset: str
    seeds: tuple[int, ...]
    steps: np.ndarray
    phases: tuple[str, ...]
    success: np.ndarray
    episodes: np.ndarray
    returns: np.ndarray

    @property
    def online_from(self) -> int | None:
        """Last step before the online phase, or None if there is no online phase."""
        if "online" not in self.phases:
            return None
        offline = self.steps[np.array(self.phases) == "offline"]
        return int(offline[-1]) if len(offline) else 0

    def last(self, phase: str) -> int | None:
        """Return the index of the last evaluation of ``phase``, or None."""
        places = [i for i, name in enumerate(self.phases) if name == phase]
        return places[-1] if places else None


def grouped(
    results: Sequence[Result], by: Sequence[str] = ("agent",)
) -> tuple[list[Group], list[str]]:
    """Group runs by task and setting.

    Arguments:
        results: runs of any tasks; runs without evaluations are left out with a remark.
        by: settings whose values tell the curves of one task apart; they make up the label.

    Returns:
        the groups, and remarks on the runs and evaluations that were left out.

    Raises:
        ValueError: two runs have equal task, label and seed, the seeds of a group share no step, or
            a run lacks a setting of ``by``.
    """
    members: dict[tuple[str, str], dict[int, Result]] = {}
    bare = [result.source for result in results if not result.rates]
    remarks = [f"left out, without evaluations: {', '.join(bare)}"] if bare else []
    for result in (result for result in results if result.rates):
        absent = [name for name in by if name not in result.settings]
        if absent:
            known = ", ".join(sorted(result.settings))
            raise ValueError(f"by: {result.source} has no setting {absent[0]!r}; it has {known}")
        label = " ".join(_named(name, result.settings[name]) for name in by)
        seeds = members.setdefault((str(result.settings["task"]), label), {})
        seed = int(result.settings["seed"])
        if seed in seeds:
            raise ValueError(_collision(label, seeds[seed], result))
        seeds[seed] = result
    groups = []
    for (task, label), seeds in sorted(members.items()):
        runs = [seeds[s] for s in sorted(seeds)]
        common = sorted(set.intersection(*(set(run.rates) for run in runs)))
        if not common:
            steps = "; ".join(f"seed {s}: {_steps(seeds[s])}" for s in sorted(seeds))
            raise ValueError(f"the seeds of {label} on {task} share no evaluation: {steps}")
        most = max(len(run.rates) for run in runs)
        if len(common) < most:
            short = [s for s in sorted(seeds) if len(seeds[s].rates) < most]
            behind = f", behind which seeds {short} are" if short else ""
            remarks.append(f"{label} on {task}: {len(common)} of {most} evaluations shown{behind}")
        pairs = np.array([[run.rates[point] for point in common] for run in runs])
        groups.append(
            Group(
                task=task,
                agent=str(runs[0].settings["agent"]),
                label=label,
                preset=", ".join(sorted({str(r.settings.get("preset", "unknown")) for r in runs})),
                seeds=tuple(sorted(seeds)),
                steps=np.array([step for step, _ in common]),
                phases=tuple(PHASES[phase] for _, phase in common),
                success=pairs[..., 0],
                episodes=pairs[..., 1].astype(int),
                returns=np.array([[run.returns[point] for point in common] for run in runs]),
            )
        )
    return groups, remarks


def _named(name: str, value: object) -> str:
    return str(value) if name in ("agent", "preset") else f"{name.rpartition('.')[2]}={value}"


def _collision(label: str, one: Result, other: Result) -> str:
    names = sorted({*one.settings, *other.settings})
    differ = [
        n
        for n in names
        if one.settings.get(n) != other.settings.get(n)
        and n.partition(".")[0] not in (*RECORDED, *EXECUTION_OPTIONS)
    ]
    seed, task = one.settings["seed"], one.settings["task"]
    advice = f"they differ in {', '.join(differ)}: add it to `by`" if differ else "name one of them"
    where = f"{one.source} and {other.source}"
    return f"two runs of {label} on {task} have seed {seed}, {where}; {advice}"


def _steps(result: Result) -> str:
    steps = sorted(result.rates)
    return f"{len(steps)} from {steps[0][0]} to {steps[-1][0]}"
