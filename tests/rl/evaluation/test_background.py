"""Background evaluations in a worker process: its rows, kills of either process, failures.

Judge: the same training with its evaluations in its own process.
"""

import csv
import fcntl
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.killed_rl import OFFLINE, ONLINE, configuration
from helpers.killing import PRELOADED, Report
from helpers.same_run import equal
from helpers.tiny import Corridor, corridor_data

from applications.rl import EpisodeEvaluator, Evaluation, Phases, RunError, train
from applications.rl.training.callbacks import WandbLogger
from applications.rl.training.evaluations import Evaluations
from flows.training import checkpoint as checkpoints
from flows.training.callbacks import Callback
from flows.training.config import TrainerConfig

torch.set_num_threads(1)

FILES = ("metrics.csv", "evaluation.csv")


def fit(folder, phases=OFFLINE, environment=Corridor, *, callbacks=(), **changes):
    config = configuration(folder, phases, **changes)
    return train(config, environment=environment, dataset=corridor_data(), callbacks=callbacks)


def rows(folder):
    with (folder / "evaluation.csv").open(newline="") as file:
        return [*csv.DictReader(file)]


def assert_same_run(found, expected):
    for name in FILES:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    assert {p.name for p in found.iterdir()} == {p.name for p in expected.iterdir()}
    a, b = (checkpoints.load(folder / "checkpoint.pt") for folder in (found, expected))
    assert all(equal(a[part], b[part]) for part in b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of seed 0 that nothing disturbs."""
    return fit(tmp_path_factory.mktemp("whole"))[0].folder


class Gated(Corridor):
    """A corridor in which nothing moves until a file is there; holds a lock while it lives."""

    def __init__(self, folder):
        self.gate = folder / "gate"
        self.lock = (folder / "lock").open("w")
        fcntl.flock(self.lock, fcntl.LOCK_SH)

    def step(self, action):
        while not self.gate.exists():
            time.sleep(0.01)
        return super().step(action)


def assert_over(folder):
    """The process that has the gated environments ends."""
    with (folder / "lock").open("w") as file:
        for _ in range(6000):
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.01)
    raise AssertionError("it still holds the lock")


class Failing(Corridor):
    """Fails in its episode 4, and takes its process with it in episode 8."""

    episodes = 0

    def reset(self, **options):
        self.episodes += 1
        if self.episodes == 4:
            raise ArithmeticError("the simulator is unstable")
        if self.episodes == 8 and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().reset(**options)


class Interrupt(Callback):
    """What Ctrl-C does, after an iteration."""

    def __init__(self, iteration):
        self.iteration = iteration

    def on_step(self, trainer, iteration, metrics):
        if iteration == self.iteration:
            raise KeyboardInterrupt


def train_gated(folder, report):
    torch.set_num_threads(1)
    fit(folder, environment=partial(Gated, folder), callbacks=[report], background_eval=True)


class Wandb:
    """What was sent, by run."""

    def __init__(self):
        self.sent = {}

    def init(self, *, name, **options):
        run = type("Run", (), {})()
        self.sent[name] = []
        run.define_metric = lambda *names, **options: None
        run.step, run.log = 0, partial(self.log, run, self.sent[name])
        run.finish = lambda: None
        return run

    @staticmethod
    def log(run, sent, values, step=None):
        """A step that goes back is dropped; without one it is the run's own, which then ends."""
        if step is None or step >= run.step:
            run.step = run.step if step is None else step
            sent.append((run.step, values))
            run.step += step is None


def told(folder, module):
    """The evaluations of a run as TensorBoard and Weights & Biases have them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / "evaluation")).Reload()
    points = [(p.step, p.value) for p in events.Scalars("evaluation/success")]
    sent = module.sent[f"corridor/qam/{folder.name}"]
    steps = [step for step, values in sent if "evaluation/success" in values]
    assert steps == sorted(set(steps))  # one row for a step
    evaluated = [values for _, values in sent if "evaluation/success" in values]
    return points, evaluated


@pytest.mark.slow
def test_two_seeds_leave_the_same_in_the_background_as_within(tmp_path, monkeypatch):
    logged = []
    options = {"seeds": (3, 1), "stacked": 2, "tensorboard": True, "wandb": "project"}
    for name, changes in (("within", {}), ("background", {"background_eval": True, "workers": 1})):
        monkeypatch.setitem(sys.modules, "wandb", module := Wandb())
        runs = fit(tmp_path / name, ONLINE, **options, **changes)
        logged.append([told(run.folder, module) for run in runs])
        if name == "within":
            expected = runs
    for run, other in zip(runs, expected, strict=True):
        for file in FILES:
            assert (run.folder / file).read_bytes() == (other.folder / file).read_bytes()
        assert run.evaluation == other.evaluation
        torch.testing.assert_close(run.agent.state_dict(), other.agent.state_dict(), rtol=0, atol=0)
        assert not (run.folder / "snapshot.pt").exists()
    assert logged[0] == logged[1]
    assert [step for step, _ in logged[1][0][0]] == [15, 31, 51, 71, 91, 111, 131, 146]
    assert rows(runs[0].folder) != rows(runs[1].folder)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_killed_run_asks_again_for_what_had_not_come(tmp_path, whole):
    """Killed after iteration 39, when the evaluation of iteration 20 had not come; then once more,
    by Ctrl-C."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=train_gated, args=(tmp_path, Report(sender)))
    process.start()
    sender.close()
    while receiver.recv() < 39:
        pass
    process.kill()
    process.join()
    assert_over(tmp_path)
    run = tmp_path / "seed0"
    assert checkpoints.load(run / "checkpoint.pt")["iteration"] == 35
    assert rows(run) == []
    other = tmp_path / "other"
    shutil.copytree(run, other / "seed0")

    (tmp_path / "gate").touch()
    with pytest.raises(KeyboardInterrupt):
        train_gated(tmp_path, Interrupt(41))
    assert not multiprocessing.active_children()
    assert_over(tmp_path)
    assert rows(run)[0] == rows(whole)[0]
    for folder in (tmp_path, other):
        fit(folder)
        assert_same_run(folder / "seed0", whole)


@pytest.mark.slow
def test_a_failure_in_the_background_ends_a_run_and_no_other(tmp_path, whole, capsys):
    """The second evaluation of the first seed fails, that of the second one kills the process."""
    with pytest.raises(RunError, match=r"^background_eval: an evaluation failed"):
        fit(tmp_path, environment=Failing, seeds=(0, 1), background_eval=True, environments=1)
    assert not multiprocessing.active_children()
    said = capsys.readouterr().err
    assert re.search(r"(?s)seed 0 failed: background_eval: an eval.*simulator is unstable", said)
    assert (
        "seed 1 failed: background_eval: a worker process ended with exit code -9; was mem" in said
    )
    for seed in (0, 1):
        assert [row["step"] for row in rows(tmp_path / f"seed{seed}")] == ["20"]
        state = checkpoints.load(tmp_path / f"seed{seed}" / "checkpoint.pt")
        assert 35 <= state["iteration"] < 60
    fit(tmp_path)
    assert_same_run(tmp_path / "seed0", whole)


def test_what_cannot_be_sent_to_a_process_is_refused(tmp_path):
    def local():
        return Corridor()

    message = r": what makes the environment cannot be sent to a worker process \(.*local"
    with pytest.raises(ValueError, match="^background_eval" + message):
        fit(tmp_path, environment=local, background_eval=True)
    assert not [*tmp_path.rglob("*.*")]
    with pytest.raises(ValueError, match="^workers" + message):
        EpisodeEvaluator(local, workers=1)


class Late:
    """An answer that has not come unless it is waited for."""

    def __init__(self, log, step):
        self.log, self.step = log, step

    def arrived(self):
        return False

    def result(self):
        self.log.append(("waited", self.step))
        return Evaluation((True,), (float(self.step),), (1,))


@pytest.mark.slow
def test_a_program_that_leaves_it_open_ends(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from applications.rl.evaluation.background import BackgroundEvaluator\n"
        "from helpers.tiny import Corridor\n"
        "if __name__ == '__main__':\n"
        "    evaluator = BackgroundEvaluator(Corridor)\n"
        "    print(evaluator.spaces.observation_dim)\n"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr


def test_one_evaluation_at_a_time(tmp_path):
    log = []

    def evaluate(agent, step, phase):
        log.append(("asked", step))
        return Late(log, step)

    class Stub:
        iteration, module = 0, torch.nn.Linear(1, 1)

    evaluations = Evaluations(tmp_path, Phases(10), 4, evaluate)
    evaluations.on_start(Stub())
    for iteration in range(1, 11):
        evaluations.on_step(Stub(), iteration, {})
        assert (tmp_path / "snapshot.pt").exists() == (4 <= iteration < 10)
    assert log == [(what, step) for step in (4, 8, 10) for what in ("asked", "waited")]
    assert [(row["step"], row["return"]) for row in rows(tmp_path)] == [
        ("4", "4"),
        ("8", "8"),
        ("10", "10"),
    ]
    assert [iteration for iteration, _ in evaluations.arrived] == [4, 8, 10]


def test_a_run_that_is_resumed_at_its_end_waits_for_what_had_not_come(tmp_path):
    log = []

    class Stub:
        iteration, module = 0, torch.nn.Linear(1, 1)

    first = Evaluations(tmp_path, Phases(10), 4, lambda agent, step, phase: Late(log, step))
    first.on_start(Stub())
    for iteration in range(1, 5):
        first.on_step(Stub(), iteration, {})
    assert rows(tmp_path) == []
    Stub.iteration = 4  # killed here, and resumed with no more to do
    again = Evaluations(tmp_path, Phases(4), 4, lambda agent, step, phase: Late(log, step))
    again.on_start(Stub())
    assert log == [("waited", 4)]
    assert [row["step"] for row in rows(tmp_path)] == ["4"]
    assert not (tmp_path / "snapshot.pt").exists()


def logger(tmp_path, monkeypatch, every, iteration=0):
    """A logger to Weights & Biases, evaluations for it to send, and what it sent."""
    monkeypatch.setitem(sys.modules, "wandb", module := Wandb())
    stub = SimpleNamespace(iteration=iteration, config=TrainerConfig(iterations=50), arrived=[])
    found = WandbLogger("project", "run", tmp_path / "id", {}, every, stub)
    found.on_start(stub)
    return found, stub, module.sent["run"]


def arrived(step):
    return step, Evaluation((True,), (float(step),), (1,))


def test_two_that_come_at_one_step_are_two_points(tmp_path, monkeypatch):
    """Weights & Biases has one row for a step, and none before that of the last row."""
    found, stub, sent = logger(tmp_path, monkeypatch, every=5)
    for iteration in range(1, 11):
        stub.arrived += {6: [arrived(4)], 10: [arrived(8), arrived(10)]}.get(iteration, [])
        found.on_step(stub, iteration, {"loss": 1.0})
    places = [(at, values.get("evaluation/iteration")) for at, values in sent]
    assert places == [(5, None), (5, 4), (10, None), (10, 8), (11, 10)]


def test_a_resumed_run_sends_what_comes_while_its_steps_are_behind(tmp_path, monkeypatch):
    found, stub, sent = logger(tmp_path, monkeypatch, every=1, iteration=35)
    found._run.step = 40  # what had been sent before it was killed
    stub.arrived.append(arrived(20))
    found.on_step(stub, 36, {"loss": 1.0})
    assert [values["evaluation/iteration"] for _, values in sent] == [20]
