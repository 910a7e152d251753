"""Do the agents learn?  Point maze and cube-single, several seeds each, with learning curves.

    python -m benchmarks.rl --suites pointmaze          # three seeds of four agents
    python -m benchmarks.rl                             # everything; hours on two cores

``pointmaze``    BC, FQL, QAM and QAM-F;
``temperature``  QAM with a τ ten times too low and ten times too high;
``kernels``      QAM with the most exact kernel against the published one, at K = 5 and 10;
``online``       QAM offline on five episodes of data, then online;
``paths``        QAM with many evaluations while it learns, by each path of execution in `PATHS`;
                 the paths of a GPU are run where there is one;
``cube``         BC, FQL, QAM and QAM-F on cube-single, and QAM with the most exact kernel.

A stopped run continues from its checkpoint, and a run whose rows are in the record is not repeated.
Each evaluation is a row {task, agent, seed, step, phase, success, episodes, hours, device, preset}
of ``results/rl.json``; ``preset`` names the changes to the preset ``small``, and ``hours`` is the
wall time of the process that finished the run, evaluations included, on a machine that was shared
with others.  The curves are drawn by

    python -m applications.rl report benchmarks/results/rl.json --by agent preset
"""

from __future__ import annotations

import json

import tyro

from benchmarks.common.jobs import completed
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
    rows: list[Row] = json.loads(config.output.read_text()) if config.output.exists() else []
    jobs = pending(config, rows)
    for experiment in {(job.task, job.transitions): job for job, _ in jobs}.values():
        make_data(config, experiment)
    calls = [(config, *job) for job in jobs]
    for new in completed(run, calls, workers=config.workers, name="runs"):
        rows += new
        write_json(config.output, rows)
    print(summary(rows))


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig, prog="python -m benchmarks.rl", description=__doc__))
