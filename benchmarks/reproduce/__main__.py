"""Does the published agent reach the published success here?  QAM at full size on the scene.

    python -m benchmarks.reproduce --dry-run       # the plan, with estimated times
    python -m benchmarks.reproduce                 # all of it: a quarter of an hour of an H200
    python -m benchmarks.reproduce --minutes 9     # nine minutes of it; the next call continues
    python -m benchmarks.reproduce --quick         # the same path in two minutes of one core

The data are made by OGBench's experts, a million transitions as in the published data
(`applications.rl.data.generate`).  QAM with the published options (`preset`: four layers of 512,
ten critics, batches of 256, τ = 1) then learns tasks 1 and 2 with the sparse reward, all seeds of a
task together, on a GPU compiled and in CUDA graphs, while evaluations are played on the CPU's
cores.  Success is compared with the published curves at those steps which were reached; `bands` has
the derivation.  What differs from the published runs: the data are not the published file but made
by the same experts, there are fewer seeds, and a GPU multiplies in bfloat16 unless ``--precision
tf32`` is given.

Each evaluation at a step of the published curves is a row {task, agent, seed, step, phase, success,
episodes, published_low, published_mean, published_high, inside, seconds, device, ...} of
``results/reproduce.json``.  The published mean is that of 12 seeds, and ``published_low`` and
``published_high`` are the ends of the interval in which one more seed is expected; ``seconds`` are
those of the training of all seeds of the task up to the step, over all calls.  Figures have the
name of the rows and of the task.
"""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Callable
from typing import Any

import tyro

from applications.rl import ReportConfig, run_report, train
from applications.rl.data.manifest import manifest_path
from applications.rl.report.published import published_curves
from applications.rl.report.results import read_folder
from benchmarks.reproduce.bands import band, verdict
from benchmarks.reproduce.config import METHOD, ReproduceConfig
from benchmarks.reproduce.pieces import Clock, Piece, Times, facts_of, make_data
from benchmarks.reproduce.plan import estimate, show
from flows.training import prepare_process, write_json

Row = dict[str, Any]


def main(config: ReproduceConfig, *, now: Callable[[], float] = time.monotonic) -> list[Row]:
    """Show the plan, do as much of it as the minutes allow, and report; return the rows.

    Raises:
        ValueError: the minutes do not suffice to start a training.
        RunError: the data could not be made, or another call works in the folder.
    """
    piece = Piece(config.minutes, now)
    _warn_of_physics(config)
    times = Times(config.home / "times.json")
    done = {number: _updates(config, number) for number in config.tasks}
    print(show(config, has_data=_has_data(config), done=done))
    if config.dry_run:
        return []
    plan = estimate(config)
    if piece.left < plan.start + plan.closing:
        least = math.ceil((plan.start + plan.closing) / 60)
        raise ValueError(
            f"minutes must be 0 or at least {least}, the time to start a training and to evaluate "
            f"its seeds here, got {config.minutes:g}"
        )
    finished = _make_data(config, piece, times)
    for number in config.tasks:
        if finished:
            finished = _train(config, number, piece, times)
    rows = read_rows(config, times)
    if rows:
        write_json(config.record, rows)
        print(f"\nwrote {config.record}")
        _draw(config)
    print(summary(config, rows))
    print("" if finished else "\nnot finished: the same command continues")
    return rows


def _has_data(config: ReproduceConfig) -> bool:
    return manifest_path(config.data / "scene-play-v0.npz").exists()


def _make_data(config: ReproduceConfig, piece: Piece, times: Times) -> bool:
    """Make the data as far as the time allows; say whether they are complete."""
    if _has_data(config):
        return True
    began = piece.now()
    complete = make_data(config, piece)
    times.add("data", piece.now() - began)
    return complete


def _train(config: ReproduceConfig, number: int, piece: Piece, times: Times) -> bool:
    """Train a task as far as the time allows; say whether it is finished."""
    if _updates(config, number) == config.last:
        return True
    plan, name = estimate(config), config.task(number)
    if piece.left < plan.start + plan.closing:
        return False
    training = config.training(number)
    clock = Clock(
        piece,
        reserve=plan.closing,
        times=times,
        part=name,
        every=config.every,
        unit=training.cuda_graphs or 1,
        facts=facts_of(config),
    )
    runs = train(training, callbacks=[clock])
    times.add(name, piece.now() - clock.began)
    return all(run.stopped is None for run in runs)


def _rates(config: ReproduceConfig, number: int, seed: int) -> dict[int, tuple[float, int]]:
    """Return success and episodes of a seed by step, where the published grid has the step."""
    folder = config.training(number).run_folder(seed)
    if not (folder / "config.json").exists():
        return {}
    found = {step: rate for (step, _), rate in read_folder(folder).rates.items()}
    return {step: rate for step, rate in found.items() if step and step % config.every == 0}


def _updates(config: ReproduceConfig, number: int) -> int:
    """Return the last step at which all seeds of a task have been evaluated, 0 if there is none."""
    reached = (max(_rates(config, number, seed), default=0) for seed in config.seeds)
    return min(*reached, config.last)


def read_rows(config: ReproduceConfig, times: Times) -> list[Row]:
    """Return a row for each evaluation at a step of the published grid."""
    rows = []
    for number in config.tasks:
        task = config.task(number)
        curve = published_curves(task)[METHOD]
        for seed in config.seeds:
            for step, (success, episodes) in sorted(_rates(config, number, seed).items()):
                expected = band(curve, step, seeds=1, episodes=episodes)
                rows.append(
                    {
                        "task": task,
                        "agent": "qam",
                        "preset": config.training(number).preset,
                        "transitions": config.size,
                        "seed": seed,
                        "step": step,
                        "phase": "offline",
                        "success": success,
                        "episodes": episodes,
                        "published_low": expected and expected.low,
                        "published_mean": expected and expected.mean,
                        "published_high": expected and expected.high,
                        "inside": expected and expected.holds(success),
                        **times.facts(task, step),
                    }
                )
    return rows


def summary(config: ReproduceConfig, rows: list[Row]) -> str:
    """Return a line for each step that all seeds of a task have reached, and the verdicts."""
    lines = [""]
    for number in config.tasks:
        task = config.task(number)
        curve = published_curves(task)[METHOD]
        own = [row for row in rows if row["task"] == task]
        success: dict[int, list[float]] = {}
        for row in own:
            success.setdefault(row["step"], []).append(row["success"])
        complete = {s: rates for s, rates in success.items() if len(rates) == len(config.seeds)}
        episodes = own[0]["episodes"] if own else config.episodes
        for step, rates in sorted(complete.items()):
            expected = band(curve, step, seeds=len(rates), episodes=episodes)
            beside = expected and f"{expected.mean:.1%} [{expected.low:.1%}, {expected.high:.1%}]"
            shown = " ".join(f"{rate:.0%}" for rate in rates)
            lines.append(f"task {number}, step {step}: {shown}; expected {beside or 'unknown'}")
        judged = verdict(curve, complete, episodes=episodes, differences=config.differences())
        lines.append(f"task {number}: {judged}")
    return "\n".join(lines)


def _draw(config: ReproduceConfig) -> None:
    """Draw the learning curves of each task with the published ones, beside the rows."""
    runs = [config.training(number).path for number in config.tasks]
    names = tuple(str(path) for path in runs if any(path.glob("*/evaluation.csv")))
    report = run_report(ReportConfig(runs=names, folder=config.home / "report"))
    for number in config.tasks:
        for drawn in report.files:
            if drawn.name == f"{config.task(number)}.png":
                copy = config.record.with_name(f"{config.record.stem}_task{number}.png")
                print(f"wrote {shutil.copyfile(drawn, copy)}")


def _warn_of_physics(config: ReproduceConfig) -> None:
    """Warn where MuJoCo has other contact physics than that of the published runs.

    Warns:
        UserWarning: MuJoCo is 3.5 or newer.
    """
    version = facts_of(config)["mujoco"]
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) >= (3, 5):
        warnings.warn(
            f"mujoco is {version}: from 3.5 on the contact physics of the scene differ from those "
            "of the published runs; install 'mujoco<3.5'",
            stacklevel=2,
        )


if __name__ == "__main__":
    prepare_process()
    main(tyro.cli(ReproduceConfig, prog="python -m benchmarks.reproduce", description=__doc__))
