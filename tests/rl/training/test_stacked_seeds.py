"""Stacked seeds are what each is alone: weights, files, resumes, failures."""

import math

import pytest
import torch
from helpers import agent_problems as problems
from helpers.killed_rl import OFFLINE, configuration
from helpers.same_run import BOTH, SHORT, assert_same_run, fit
from helpers.tiny import Corridor, corridor_data

from applications.rl import RunError, train
from flows.training import checkpoint as checkpoints
from flows.training.callbacks import Callback
from flows.training.config import TrainerConfig
from flows.training.divergence import TrainingDiverged
from flows.training.loss import SplitLoss
from flows.training.stacked import StackedTrainers
from flows.training.trainer import Trainer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folder of seeds 0, 1, 2, one trained after the other, by their phases."""
    folders = {}
    for name, phases in (("offline", SHORT), ("both", BOTH)):
        folders[name] = tmp_path_factory.mktemp(name)
        fit(folders[name], phases, seeds=(0, 1, 2), stacked=1)
    return folders


# --- every agent ----------------------------------------------------------------------------------


class Problem(SplitLoss):
    """The loss of an agent on batches in double precision, new ones for each update."""

    def __init__(self, seed):
        self.batches = iter(range(100 * seed, 100 * seed + 100))

    def sample(self, agent, generator):
        return problems.batch(next(self.batches)), agent.draw_noise(problems.B, generator)

    def evaluate(self, agent, inputs):
        return agent.loss(*inputs)

    def follow(self, agent, metrics):
        agent.follow(metrics)

    def before_update(self, agent):
        agent.update_targets()


def trainers(name, **options):
    config = TrainerConfig(lr=3e-4, lr_schedule="constant", ema_decay=0, grad_clip=1.0)
    return [
        Trainer(problems.make(name, seed=seed, **options), Problem(seed), config)
        for seed in range(3)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in problems.OPTIONS),
        ("qam", {"kernel": "moment_matched"}),
        ("qam-e", {"residual": True, "best_of_n": 2}),
        ("bam", {"residual": True}),
    ],
)
def test_updates_of_every_agent(name, options):
    single, stacked = trainers(name, **options), trainers(name, **options)
    start = [p.detach().clone() for p in stacked[0].module.parameters()]
    members, clipped = StackedTrainers(stacked), 0
    for _ in range(4):
        for each, found in zip(single, members.step(), strict=True):
            expected = each.step()
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            clipped += float(found["grad_norm"]) > 1
    assert clipped or name == "bc"  # by a factor of its own in each
    for each, found in zip(single, stacked, strict=True):
        torch.testing.assert_close(
            found.module.state_dict(), each.module.state_dict(), rtol=1e-9, atol=1e-9
        )
    moved = [
        not torch.equal(a, b) for a, b in zip(start, stacked[0].module.parameters(), strict=True)
    ]
    assert all(moved)


# --- whole runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "phases"), [("offline", SHORT), ("both", BOTH)])
@pytest.mark.slow
def test_seeds_leave_what_they_leave_alone(tmp_path, alone, name, phases):
    found = fit(tmp_path, phases, seeds=(0, 1, 2), stacked=3)
    assert [run.seed for run in found] == [0, 1, 2]
    for run in found:
        assert run.evaluation is not None
        assert not run.agent.training
        assert_same_run(run.folder, alone[name] / f"seed{run.seed}")


class Stop(Callback):
    """Ends the process, as far as Python can, after an iteration of a seed."""

    def __init__(self, seed, iteration):
        self.place = (seed, iteration)

    def on_step(self, trainer, iteration, metrics):
        if (trainer.config.seed, iteration) == self.place:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("name", "phases"), [("offline", SHORT), ("both", BOTH)])
@pytest.mark.slow
def test_a_run_may_change_between_alone_and_stacked(tmp_path, alone, name, phases):
    """Stopped at different updates, and in the midst of a stacked training."""
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, phases, seeds=(2,), callbacks=[Stop(2, 6)])
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, phases, seeds=(0, 1, 2), stacked=3, callbacks=[Stop(1, 5)])
    done = [
        checkpoints.load(tmp_path / f"seed{s}" / "checkpoint.pt")["iteration"] for s in range(3)
    ]
    assert done == [4, 4, 8]
    fit(tmp_path, phases, seeds=(0,))
    fit(tmp_path, phases, seeds=(0, 1, 2), stacked=2)
    for seed in range(3):
        assert_same_run(tmp_path / f"seed{seed}", alone[name] / f"seed{seed}")


class Poison(Callback):
    """Spoils the weights of some seeds after their iteration 5."""

    def __init__(self, *seeds):
        self.seeds = seeds

    def on_step(self, trainer, iteration, metrics):
        if trainer.config.seed in self.seeds and iteration == 5:
            next(trainer.module.parameters()).data.fill_(math.nan)


@pytest.mark.parametrize("stacked", [1, 3])
@pytest.mark.slow
def test_a_seed_that_diverges_does_not_stop_the_others(tmp_path, alone, capsys, stacked):
    with pytest.raises(TrainingDiverged, match=r"seed1/checkpoint.pt \(iteration 4\)"):
        fit(tmp_path, seeds=(0, 1, 2), stacked=stacked, callbacks=[Poison(1)])
    told = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert len(told) == 1
    assert "seed 1 failed: training stopped: loss is nan in iteration 6; the last good" in told[0]
    for seed in (0, 2):
        assert_same_run(tmp_path / f"seed{seed}", alone["offline"] / f"seed{seed}")
    assert checkpoints.load(tmp_path / "seed1" / "checkpoint.pt")["iteration"] == 4


def test_how_many_are_trained_at_a_time(tmp_path, monkeypatch):
    """On a CPU one, if nothing else is asked for."""
    sizes = []
    monkeypatch.setattr(
        "applications.rl.training.train._train_seeds",
        lambda setup, seeds, *_: sizes.append(len(seeds)) or [],
    )
    for stacked in (0, 2, 9):
        sizes.append(stacked)
        train_five = configuration(tmp_path, OFFLINE, seeds=range(5), stacked=stacked, eval_every=0)
        train(train_five, environment=Corridor, dataset=corridor_data())
    assert sizes == [0, 1, 1, 1, 1, 1, 2, 2, 2, 1, 9, 5]
    with pytest.raises(ValueError, match="stacked must be at least 0, got -1"):
        configuration(tmp_path, OFFLINE, stacked=-1)


def test_too_many_for_the_device(tmp_path, monkeypatch):
    def full(self, drawn):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(StackedTrainers, "backward", full)
    with pytest.raises(RunError, match=r"2 stacked seeds do not fit the device; --stacked with"):
        fit(tmp_path, seeds=(0, 1), stacked=2)
