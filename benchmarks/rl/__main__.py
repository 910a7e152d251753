"""Do the agents learn?  Point maze and cube-single, several seeds each, with learning curves.

    python -m benchmarks.rl --suites pointmaze          # three seeds of four agents
    python -m benchmarks.rl                             # everything; hours on two cores

``pointmaze``    BC, FQL, QAM and QAM-F;
``temperature``  QAM with a τ ten times too low and ten times too high;
``kernels``      QAM with the most exact kernel against the published one, at K = 5 and 10;
``online``       QAM offline on five episodes of data, then online;
``paths``        QAM with many evaluations while it learns, by each path of execution in `PATHS`;
                 the paths of a GPU are run where there is one;
``cube``         BC, FQL, QAM and QAM-F on cube-single, and QAM with the most exact kernel;
``agents``       all agents on the point maze and cube-single, the leading ones on scene and
                 puzzle-3x3 with sparse rewards; each starts from what one run of BC has cloned.
                 Not among the default suites: about 25 hours of one core.

A stopped run continues from its checkpoint, and a run whose rows are in the record is not repeated.
Each evaluation is a row {task, agent, seed, step, phase, success, episodes, hours, device, preset}
of ``results/rl.json``, or ``rl_agents.json`` for the suite ``agents``; ``preset`` names the changes
to the preset ``small``, and ``hours`` is the wall time of the process that finished the run,
evaluations included, on a machine that was shared with others.  The curves are drawn by

    python -m applications.rl report benchmarks/results/rl.json --by agent preset

The suite ``agents`` also times the updates of all its agents (`benchmarks.rl.cost`), writes their
costs to ``rl_agents_cost.json``, draws ``rl_agents.png``, and prints the time to 80 % of the best
agent's success relative to the published QAM.
"""

from __future__ import annotations

import json
from pathlib import Path

import tyro

from benchmarks.common.jobs import completed
from benchmarks.rl.cost import REFERENCE, measure, relative_times
from benchmarks.rl.experiments import comparison
from benchmarks.rl.figure import draw, label
from benchmarks.rl.runs import BenchmarkConfig, Row, key, make_data, pending, run
from flows.training import write_json


def summary(rows: list[Row]) -> str:
    """Return a table of success at the last step: mean and range over the seeds."""
    last: dict[tuple[object, ...], Row] = {}
    for row in rows:
        if key(row) not in last or row["step"] > last[key(row)]["step"]:  # type: ignore[operator]
            last[key(row)] = row
    lines = []
    for group in dict.fromkeys((row["task"], row["agent"], row["preset"]) for row in rows):
        own = [row for row in last.values() if (row["task"], row["agent"], row["preset"]) == group]
        values = [100 * float(row["success"]) for row in own]
        mean, low, high = sum(values) / len(values), min(values), max(values)
        where = f"{group[0]:<46} {group[1]:<6} {group[2]:<40}"
        lines.append(f"{where} {mean:5.1f} % [{low:.0f}, {high:.0f}], {len(values)} seeds")
    return "\n".join(lines)


def main(config: BenchmarkConfig) -> None:
    """Run the missing jobs and print the table."""
    rows = read(config.record)
    jobs = pending(config, rows)
    for experiment in {(job.task, job.transitions): job for job, _ in jobs}.values():
        make_data(config, experiment)
    cloning = [job for job in jobs if job[0].suite == "agents" and job[0].agent == "bc"]
    for some in (cloning, [job for job in jobs if job not in cloning]):
        calls = [(config, *job) for job in some]
        for new in completed(run, calls, workers=config.workers, name="runs"):
            rows += new
            write_json(config.record, rows)
    print(summary(rows))
    if "agents" in config.suites:
        compare(config, rows)


def compare(config: BenchmarkConfig, rows: list[Row]) -> None:
    """Time the agents of each task that has rows, draw the figure, and print relative times."""
    path = config.record.with_name(f"{config.record.stem}_cost.json")
    costs, done = read(path), {key(row)[:3] for row in rows}
    for task in dict.fromkeys(str(row["task"]) for row in rows):
        known = {key(row | {"seed": 0})[:3] for row in costs}
        ran = [e for e in comparison() if e.task == task and (e.task, e.agent, e.preset) in done]
        missing = [e for e in ran if (e.task, e.agent, e.preset) not in known]
        reference = [e for e in ran if (e.agent, e.preset) == REFERENCE]
        if missing and reference:
            others = [e for e in missing if e not in reference]
            costs = [row for row in costs if key(row | {"seed": 0})[:3] != (task, *REFERENCE)]
            costs += measure(config, [*reference, *others])
            write_json(path, costs)
        print(f"\n{task}\ntime to 80 % of the best success, and cost of an update; qam = 1")
        times = relative_times(rows, costs, task)
        for row in costs:
            if row["task"] == task:
                name = (str(row["agent"]), str(row["preset"]))
                time = times.get(name)
                reached = "-" if time is None else f"{time:.2f}"
                print(f"{label(*name):<40} {reached:>8} {float(row['relative']):8.2f}")
    if rows:
        print(f"wrote {draw(config.record.with_suffix('.png'), rows)}")


def read(path: Path) -> list[Row]:
    """Return the rows of a file, none if it does not exist."""
    return json.loads(path.read_text()) if path.exists() else []


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig, prog="python -m benchmarks.rl", description=__doc__))
