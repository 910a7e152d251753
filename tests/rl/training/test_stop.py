"""A callback that raises `StopTraining` ends the training of its seed, and of no other."""

import pytest
import torch
from helpers.same_run import BOTH, SHORT, assert_same_run, equal, fit, numbers

from flows.training import Callback, StopTraining
from flows.training import checkpoint as checkpoints

torch.set_num_threads(1)


class Stop(Callback):
    def __init__(self, seed, iteration):
        self.place = (seed, iteration)

    def on_step(self, trainer, iteration, metrics):
        if (trainer.config.seed, iteration) == self.place:
            raise StopTraining("good enough")


def steps(folder):
    _, rows = numbers(folder / "evaluation.csv")
    return [int(row[0]) for row in rows]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.slow
def test_one_seed_is_saved_and_evaluated_where_it_stops(tmp_path, background):
    changes = {"background_eval": background, "tensorboard": True}
    (run,) = fit(tmp_path, seeds=(1,), callbacks=[Stop(1, 6)], **changes)
    assert run.stopped == "good enough"
    assert checkpoints.load(run.folder / "checkpoint.pt")["iteration"] == 6
    assert steps(run.folder) == [4, 6]
    assert run.evaluation is not None
    assert not run.agent.training
    assert not (run.folder / "snapshot.pt").exists()


@pytest.mark.parametrize("phases", [SHORT, BOTH], ids=["offline", "both"])
@pytest.mark.slow
def test_a_stopped_run_goes_on_as_an_undisturbed_one(tmp_path, phases):
    fit(tmp_path / "stopped", phases, callbacks=[Stop(0, 7)])
    (run,) = fit(tmp_path / "stopped", phases)
    assert run.stopped is None
    (whole,) = fit(tmp_path / "whole", phases)
    found, expected = (checkpoints.load(r.folder / "checkpoint.pt") for r in (run, whole))
    assert equal(found["module"], expected["module"])
    assert set(steps(run.folder)) >= set(steps(whole.folder))


def test_a_stop_at_an_evaluation_evaluates_once(tmp_path):
    (run,) = fit(tmp_path, callbacks=[Stop(0, 4)])
    assert steps(run.folder) == [4]


@pytest.mark.slow
def test_a_stacked_seed_stops_alone(tmp_path):
    alone = fit(tmp_path / "alone", seeds=(0, 1, 2), stacked=1)
    runs = fit(tmp_path / "stacked", seeds=(0, 1, 2), stacked=3, callbacks=[Stop(1, 6)])
    assert [run.stopped for run in runs] == [None, "good enough", None]
    assert steps(runs[1].folder) == [4, 6]
    assert checkpoints.load(runs[1].folder / "checkpoint.pt")["iteration"] == 6
    for i in (0, 2):
        assert_same_run(runs[i].folder, alone[i].folder)
