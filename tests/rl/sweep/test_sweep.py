"""A sweep without Ray: the plan, its cost, what folders tell, the table, and the command line."""

import fcntl
import io
import json
import re
import shlex
import socket
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pytest
import torch
from helpers.sweep_jobs import SETTING, TASK, sweep_config, train_corridor, train_or_fail

from applications.rl import (
    DataError,
    ReportConfig,
    RunError,
    Setting,
    SweepConfig,
    TrainConfig,
    run_report,
)
from applications.rl import __main__ as cli
from applications.rl.report import published
from applications.rl.sweep import describe, folders, worker
from applications.rl.sweep.cost import cost, measure
from applications.rl.sweep.folders import Work
from applications.rl.sweep.plan import (
    Run,
    State,
    duration,
    makespan,
    published_tasks,
    slots,
)
from applications.rl.sweep.ray import check_address
from applications.rl.sweep.table import Table
from applications.rl.training.seeds import parse_seeds

SCENE = "scene-sparse-play-singletask-task1-v0"


def test_the_published_tasks_are_those_of_the_published_curves():
    names = published_tasks()
    assert len(set(names)) == 50
    assert all({"QAM", "FQL"} <= set(published.published_curves(name)) for name in names)
    tasks = {name for name in published._table() if "-task" in name}
    assert {published.published_name(name) for name in names} == tasks


def test_seeds_are_numbers_and_ranges():
    assert parse_seeds(("0-3", "7", "5-5")) == (0, 1, 2, 3, 7, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": ("0-3", "2")}, "seeds must be different numbers, got 0-3 2"),
        ({"seeds": ("3-1",)}, "the range '3-1' is empty"),
        ({"seeds": ("x",)}, "numbers or ranges such as 0-11, got 'x'"),
        ({"seeds": ("1-",)}, "numbers or ranges such as 0-11, got '1-'"),
        ({"seeds": ()}, "got none"),
        ({"gpus": 2.0}, "gpus must be between 0 and 1, got 2.0"),
        ({"cpus": 0.0}, "cpus must be above 0, got 0.0"),
        ({"seeds_per_job": 0}, "seeds_per_job must be at least 1, got 0"),
        ({"max_cpus": 0}, "max_cpus must be at least 1, got 0"),
        ({"retries": -1}, "retries must be at least 0, got -1"),
        ({"devices": (0,)}, "devices must be numbers of at least 1"),
        ({"updates_per_second": 0.0}, "updates_per_second must be positive, got 0.0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SweepConfig(**({"tasks": (SCENE,)} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"agents": ("sac",)}, "agent must be one of"),
        ({"agents": ("bc", "bc")}, "agents: 'bc' is there twice"),
        ({"agents": ()}, "name at least one"),
        ({"tasks": (SCENE, "published")}, f"tasks: '{SCENE}' is there twice"),
        ({"tasks": ("cube-single-play-v0",) * 2}, "is there twice"),
        ({"tasks": ()}, "name at least one"),
        ({"tasks": ("scene-play-singletask-task7-v0",)}, "did you mean scene-play"),
        ({"setting": Setting(preset="huge")}, "preset must be one of"),
    ],
)
def test_names_that_cannot_be_run_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        _ = SweepConfig(**({"tasks": (SCENE,)} | options)).plan


def test_a_plan_has_every_run_once_in_the_folder_of_train(tmp_path):
    plan = SweepConfig(
        tasks=("cube-single-play-v0", TASK, "scene-play-singletask-task9-v0"),
        agents=("bc", "qam"),
        seeds=("0-4",),
        seeds_per_job=2,
        gpus=0.5,
        cpus=3.0,
        folder=tmp_path,
        setting=Setting(offline_steps=7, data=Path("data")),
    ).plan
    assert len(plan.jobs) == 2 * 2 * 3
    seeds = [job.config.seeds for job in plan.jobs]
    assert seeds == [(0, 1)] * 4 + [(2, 3)] * 4 + [(4,)] * 4  # breadth first
    assert len({*plan.runs}) == len(plan.runs) == 3 * 2 * 5
    cube = "cube-single-play-singletask-v0"
    assert plan.runs[0] == Run(cube, "bc", 0, tmp_path / cube / "bc" / "seed0")
    assert Run(TASK, "qam", 4, tmp_path / "gym-Pendulum-v1/qam/seed4") in plan.runs
    config = plan.jobs[0].config
    assert (config.resume, config.device, config.threads) == (True, "cuda", 3)
    assert (config.offline_steps, config.data) == (7, Path("data").absolute())
    assert len(plan.refused) == 10
    assert {"task9" in note and "did you mean" in note for note in plan.refused.values()} == {True}


def test_every_option_of_train_that_a_sweep_does_not_decide_is_one_of_the_command():
    common = "--preset small --offline-steps 5 --eval-every 0 --data x --batch-size 3"
    config, _ = cli.parse("sweep", f"--tasks {SCENE} --seeds 0-2 5 {common}".split())
    assert parse_seeds(config.seeds) == (0, 1, 2, 5)
    trained, _ = cli.parse("train", f"--task {SCENE} {common}".split())
    decided = ("task", "seeds", "folder", "options")
    ours, theirs = vars(config.setting), vars(trained)
    assert {k: v for k, v in ours.items() if k not in decided} == {
        k: v for k, v in theirs.items() if k not in decided
    }


def test_the_makespan_is_that_of_greedy_starts():
    assert makespan([3, 1, 1, 1, 4], 2) == 7  # 3 | 1 1 1, then 4
    assert makespan([2, 2, 2], 5) == 2
    assert [slots(8, 0.25), slots(8, 0.3), slots(8, 1), slots(8, 3), slots(1, 2)] == [
        32,
        24,
        8,
        2,
        0,
    ]


@pytest.mark.slow
def test_the_cost_is_what_the_published_table_would_take(tmp_path):
    config = SweepConfig(
        tasks=("published",),
        agents=("qam",),
        seeds=("0-11",),
        seeds_per_job=4,
        gpus=0.5,
        folder=tmp_path,
        dry_run=True,
        updates_per_second=250.0,
        devices=(1, 1000),
        setting=Setting(online_steps=500_000),
    )
    text = describe(config)
    updates = 600 * (1_000_000 + 495_001)
    assert "runs: 600 (tasks 50 × agents 1 × seeds 12)" in text
    assert text.count("\n  ") == 50
    assert f"to do: {updates} updates in 150 jobs" in text
    assert "as given: qam 250" in text
    hours = updates / 250 / 3600
    assert f"cost: {hours / 2:.3g} GPU-hours" in text
    assert f"on 1 GPU: {duration(hours / 2 * 3600)}" in text  # two jobs at a time
    assert f"on 1000 GPUs: {duration(hours / 150 * 3600)}" in text  # no more than one job each
    unknown = describe(replace(config, updates_per_second=None))
    assert "give --updates-per-second of a job" in unknown


def test_cost_per_agent_and_too_few_devices(tmp_path):
    jobs = sweep_config(tmp_path, agents=("bc", "qam")).plan.jobs
    text = cost(
        [(job, 3600) for job in jobs], {"bc": 2.0, "qam": 1.0}, cpus=4, gpus=0, devices=(2, 4)
    )
    assert "cost: 6 CPU-hours" in text
    assert "on 2 CPUs: too few for a job; on 4 CPUs: 1 h 30 min" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_rate_on_a_gpu_needs_one():
    with pytest.raises(ValueError, match="this machine has none; give --updates-per-second"):
        measure(TrainConfig(task=TASK, device="cuda"))


@pytest.mark.slow
def test_the_rate_is_measured_by_training_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(TASK, agent="bc", preset="small", batch_size=4, device="cpu", threads=1)
    started = perf_counter()
    rate = measure(config, seconds=0.3)
    assert 0.3 < perf_counter() - started < 30
    assert 1 < rate < 1e5
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_folders_tell_what_is_done_and_how_far_the_rest_is(tmp_path):
    config = sweep_config(tmp_path, seeds=("0-2",), seeds_per_job=3)
    (job,) = config.plan.jobs
    first, second, third = job.runs
    assert worker.work(job.only([first]), "one", train_corridor) == {}
    assert folders.started(first, "one")
    assert not folders.started(first, "two")

    second.folder.mkdir(parents=True)
    table = second.folder / "metrics.csv"
    table.write_text("iteration,loss\n3,1.0\n12,1.0\n13")  # a row is being written
    (second.folder / "evaluation.csv").write_text("step,phase,success,episodes\n")
    assert folders.updates_done(second.folder) == 12
    assert folders.latest_success(second.folder) is None
    assert folders.updates_done(third.folder) == 0

    work = Work.of(config.plan)
    assert work.states == {first: State("done")}
    (left,) = work.jobs
    assert left.config.seeds == (1, 2)
    assert work.updates(left) == 88 + 100
    text = describe(config)
    assert "1 finished, 1 begun" in text
    assert "to do: 188 updates in 1 jobs" in text

    written = {"batch_size": 16, "preset": "published", "offline_steps": 50, "log_every": 9}
    (second.folder / "config.json").write_text(json.dumps(written))
    assert describe(config) == text  # of these settings as far as a resume asks
    (second.folder / "config.json").write_text(json.dumps(written | {"batch_size": 8}))
    assert work.updates(left) == 100 + 100
    text = describe(config)
    assert "1 finished, 0 begun" in text
    assert f"will be refused: {second.folder} holds a run of other settings" in text
    assert "to do: 200 updates in 1 jobs" in text

    other = replace(config, setting=replace(config.setting, batch_size=8))
    assert not Work.of(other.plan).states  # a finished run of other settings is not this one
    quiet = replace(config, setting=replace(config.setting, log_every=5, environments=1))
    assert Work.of(quiet.plan).states  # what changes no result does not matter


@pytest.mark.slow
def test_rows_of_finished_runs_are_collected_and_reported(tmp_path):
    config = sweep_config(tmp_path, seeds=("0-1",), seeds_per_job=2)
    (job,) = config.plan.jobs
    assert worker.work(job, "one", train_corridor) == {}
    other = {"task": TASK, "agent": "a", "seed": 0, "step": 1, "phase": "offline"}
    other |= {"success": 1.0, "episodes": 2}
    stale = other | {"agent": "bc"}
    config.results.write_text(json.dumps([other, stale]))
    rows = folders.collect(config.results, job.runs)
    assert rows == json.loads(config.results.read_text())
    assert rows[0] == other
    assert stale not in rows
    own = rows[1:]
    steps = [(row["seed"], row["step"]) for row in own]
    assert steps == [(seed, step) for seed in (0, 1) for step in range(20, 101, 20)]
    recorded = json.loads((Path(__file__).parents[3] / "benchmarks/results/rl.json").read_text())
    assert {*own[0]} <= {*recorded[0]} | {"return", "device", "preset"}
    assert {"return", "hours", "device", "preset"} <= {*own[0]}
    assert all(row["hours"] > 0 and row["device"] == "cpu" for row in own)
    hours = own[0]["hours"]
    report = run_report(ReportConfig((str(config.results),), folder=tmp_path / "report"))
    assert {line.agent for line in report.lines} == {"a", "bc"}

    assert worker.work(job, "again", train_corridor) == {}  # finds them done
    assert folders.collect(config.results, job.runs)[1]["hours"] == hours
    config.results.write_text("{}")
    with pytest.raises(ValueError, match="must hold a list of rows"):
        folders.collect(config.results, job.runs)


@pytest.mark.slow
def test_a_seed_that_fails_leaves_the_others_of_its_job_alone(tmp_path):
    (job,) = sweep_config(tmp_path, seeds=("0-2",), seeds_per_job=3).plan.jobs
    notes = worker.work(job, "one", train_or_fail)
    assert {*notes} == {1}
    assert re.fullmatch(
        r"training stopped: loss is nan in iteration 31; .* \(iteration 28\)", notes[1]
    )
    finished = [(run.folder / "finished.json").exists() for run in job.runs]
    assert finished == [True, False, True]
    assert "TrainingDiverged" in (job.runs[1].folder / "error.txt").read_text()
    notes = worker.work(job.only([job.runs[1]]), "two", train_corridor)
    assert notes == {}
    assert not (job.runs[1].folder / "error.txt").exists()


def test_a_bug_is_named_by_its_type(tmp_path):
    (job,) = sweep_config(tmp_path, agents=("fql",)).plan.jobs
    assert worker.work(job, "one", train_or_fail) == {0: "KeyError: 'no such thing'"}
    assert worker.one_line(RunError("it failed:\n\nx\nCause: why\n")) == "it failed: Cause: why"
    assert worker.one_line(RuntimeError()) == "RuntimeError: "


def test_missing_data_are_one_line(tmp_path):
    (job,) = sweep_config(tmp_path).plan.jobs  # a gym task has none of its own
    notes = worker.work(job, "one", worker.train_task)
    assert "has no data of its own" in notes[0]
    assert "\n" not in notes[0]


def test_data_are_downloaded_by_one_worker_at_a_time(tmp_path, monkeypatch):
    data = tmp_path / "data"

    def download(task, folder):
        with (data / worker.LOCK).open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        raise DataError(f"no data for {task.name} in {folder}")

    monkeypatch.setattr(worker, "load_shards", download)
    setting = replace(SETTING, data=data)
    (job,) = sweep_config(tmp_path, tasks=(SCENE,), setting=setting).plan.jobs
    notes = worker.work(job, "one", worker.train_task)
    assert notes == {0: f"no data for {SCENE} in {data}"}


@pytest.mark.slow
def test_a_run_that_another_worker_has_is_not_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "PATIENCE", 0.1)
    (job,) = sweep_config(tmp_path).plan.jobs
    job.runs[0].folder.mkdir(parents=True)
    with (job.runs[0].folder / worker.LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        notes = worker.work(job, "one", train_corridor)
    assert "is in use by another worker" in notes[0]
    assert not (job.runs[0].folder / "config.json").exists()
    assert worker.work(job, "two", train_corridor) == {}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def progress(run, updates, success, attempt="a"):
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "worker.json").write_text(json.dumps({"attempt": attempt}))
    (run.folder / "metrics.csv").write_text(f"iteration,loss\n{updates},1\n")
    (run.folder / "evaluation.csv").write_text(f"step,phase,success,episodes\n1,x,{success},3\n")


def test_the_table_shows_what_the_folders_tell(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("applications.rl.sweep.table.monotonic", lambda: now)
    plan = sweep_config(tmp_path, seeds=("0-3",), tasks=(TASK, "no-v0")).plan
    work, out = Work.of(plan), io.StringIO()
    table = Table(work.configs, work.states, out, every=15.0)
    a, b, c, d = (job.runs[0] for job in plan.jobs)
    states = {run: State(attempt="a") for run in (a, b, c, d)}
    table.show(states)
    assert out.getvalue() == ""  # nothing has changed
    progress(a, 10, 0.25)
    now = 5.0
    table.show(states)
    now, _ = 10.0, progress(a, 40, 0.5)
    states |= {b: State("failed", "no data"), c: State("done"), d: State(attempt="b", deaths=1)}
    table.show(states)
    name = f"{TASK}  bc  seed"
    lines = [
        f"training  {name} 0, step 10/100, success 25%",
        f"failed    {name} 1: no data",
        f"done      {name} 2, step 100/100",
        f"waiting   {name} 3, workers lost: 1",
    ]
    assert out.getvalue().splitlines() == lines
    assert table.row(a) == f"training  {name} 0, step 40/100, 6 updates/s, 10 s left, success 50%"
    now = 20.0
    table.show(states)
    assert out.getvalue().splitlines()[4:] == [
        "8 runs: 1 training, 5 failed, 1 waiting, 1 done; 20 s, 8.67 updates/s, 18 s left"
    ]
    shown = table.lines(5, now)
    assert [line.split()[0] for line in shown] == ["training", "failed", "failed", "...", "8"]
    assert shown[3] == "... and 5 more"
    assert len(table.lines(40, now)) == 9


def test_on_a_terminal_the_table_is_drawn_in_place(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("LINES", "24")
    plan = sweep_config(tmp_path, seeds=("0-1",)).plan
    work, out = Work.of(plan), Terminal()
    table = Table(work.configs, work.states, out)
    states = {run: State(attempt="a") for run in plan.runs}
    table.show(states)
    table.show(states)
    table.close()
    first, second, end = re.split("\x1b\\[3F", out.getvalue())
    assert first == second
    rows = first.removeprefix("\x1b[J").splitlines()
    assert [len(row) for row in rows[:2]] == [29, 29]
    assert end.startswith("\x1b[J2 runs: 2 waiting")


def test_durations():
    found = [duration(s) for s in (0.4, 59, 60, 200, 3600, 18_600, 273_600)]
    assert found == ["0 s", "59 s", "1 min", "3 min 20 s", "1 h", "5 h 10 min", "3 d 4 h"]


def listening(answer):
    """The address of a server that sends ``answer`` to its first visitor."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        with suppress(OSError), server, server.accept()[0] as connection:
            connection.sendall(answer)
            while connection.recv(100):
                pass

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.slow
def test_an_address_without_a_cluster_is_refused_within_seconds(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        unused = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr("applications.rl.sweep.ray.PATIENCE", 0.5)
    for address, message in (
        (unused, "no Ray cluster answers at"),
        (f"ray://{unused}", "Connection refused"),
        (listening(b""), "timed out"),
        (listening(b"SSH-2.0-OpenSSH\r\n"), "is no Ray cluster"),
        ("nowhere", "address must be HOST:PORT"),
        ("host:port", "address must be HOST:PORT"),
        ("[::1", "address must be HOST:PORT"),
    ):
        with pytest.raises(RunError, match=re.escape(message)):
            check_address(address)
    check_address(listening(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])))
    check_address("auto")


@pytest.mark.slow
def test_the_dry_run_of_the_command_line_changes_nothing(tmp_path, capsys):
    command = f"sweep --tasks published --dry-run --folder {tmp_path / 'runs'} --gpus 1"
    assert cli.main([*command.split(), "--updates-per-second", "700"]) == 0
    assert "runs: 600" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]
    assert cli.main(["sweep", "--tasks", "scene-play-singletask-task7-v0"]) == 1
    assert capsys.readouterr().err.startswith("error: unknown task 'scene-play-singletask-task7")


def test_the_commands_of_the_page_parse():
    page = (Path(__file__).parents[3] / "docs/sweep.md").read_text()
    blocks = "".join(re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL))
    lines = blocks.replace("\\\n", " ").splitlines()
    commands = [line.split("#")[0] for line in lines if "applications.rl" in line]
    assert len(commands) > 4
    for command in commands:
        name, *options = shlex.split(command.partition("applications.rl ")[2])
        cli.parse(name, options)


def test_an_interrupted_sweep_says_that_the_same_command_continues(capsys, monkeypatch):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("applications.rl.sweep.show_sweep", interrupted)
    assert cli.main(["sweep", "--tasks", TASK]) == 130
    assert "interrupted; the same command continues" in capsys.readouterr().err
