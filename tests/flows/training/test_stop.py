"""A callback ends a training cleanly, and a resume goes on from there."""

from dataclasses import replace

import pytest
import torch
from helpers.processes import agreed, several
from torch import nn

from flows import Callback, ProgressBar, StopTraining
from flows.training import Trainer, TrainerConfig, train_stacked
from flows.training import checkpoint as checkpoints
from flows.training.loss import SplitLoss
from flows.training.update_graph import UpdateGraph

CONFIG = TrainerConfig(iterations=12, lr=0.02, checkpoint_every=5)


class Regression(SplitLoss):
    """A regression on random points, with a state."""

    def __init__(self):
        self.count = 0

    def host_step(self, module, generator):
        self.count += 1
        return {}

    def sample(self, module, generator):
        return (torch.randn(8, 3, generator=generator),)

    def evaluate(self, module, inputs):
        return (module(inputs[0]) - inputs[0].sum(1, keepdim=True)).square().mean(), {}

    def updates_without_host(self):
        return 12 - self.count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Stop(Callback):
    """Stops after an iteration."""

    def __init__(self, iteration, message="that will do"):
        self.iteration, self.message = iteration, message

    def on_step(self, trainer, iteration, metrics):
        if iteration == self.iteration:
            raise StopTraining(*([self.message] if self.message else []))


class Events(Callback):
    """What callbacks are told."""

    def __init__(self):
        self.events = []

    def on_step(self, trainer, iteration, metrics):
        self.events.append(iteration)

    def on_end(self, trainer):
        self.events.append("end")


def make(seed=0, callbacks=(), config=CONFIG, **options):
    torch.manual_seed(seed)
    module = nn.Linear(3, 1)
    return Trainer(module, Regression(), replace(config, seed=seed), callbacks=callbacks, **options)


def test_a_callback_stops_a_training_and_a_resume_goes_on(tmp_path):
    whole, events = make(), Events()
    expected = whole.fit()
    trainer = make(callbacks=[Stop(7), events], checkpoint=tmp_path / "c.pt")
    reached = trainer.fit()
    assert events.events == [1, 2, 3, 4, 5, 6, 7, "end"]  # also those after the one that stopped
    assert trainer.stopped == "that will do"
    assert trainer.iteration == 7
    assert reached is trainer.ema
    assert not reached.training
    saved = checkpoints.load(tmp_path / "c.pt")
    assert saved["iteration"] == saved["loss"]["count"] == 7
    assert torch.equal(saved["ema"]["weight"], reached.weight)
    again = make(seed=0, checkpoint=tmp_path / "c.pt")
    found = again.fit(resume=True)
    assert again.stopped is None
    assert torch.equal(found.weight, expected.weight)
    # The same trainer goes on too.
    trainer.callbacks = ()
    assert torch.equal(trainer.fit().weight, expected.weight)
    assert trainer.stopped is None


def test_a_stop_without_a_message_names_the_callback():
    trainer = make(callbacks=[Stop(2, None), Stop(2)])
    trainer.fit()
    assert trainer.stopped == "Stop raised StopTraining"  # the first of two


def test_one_of_several_runs_stops_alone(tmp_path):
    trainers = [
        make(seed, [Stop(4)] if seed == 1 else [], checkpoint=tmp_path / f"{seed}.pt")
        for seed in range(3)
    ]
    assert train_stacked([trainer.training() for trainer in trainers]) == [None] * 3
    assert [trainer.iteration for trainer in trainers] == [12, 4, 12]
    assert [trainer.stopped for trainer in trainers] == [None, "that will do", None]
    assert checkpoints.load(tmp_path / "1.pt")["iteration"] == 4
    alone = make(2)
    alone.fit()
    torch.testing.assert_close(trainers[2].module.weight, alone.module.weight)


def test_a_stop_within_updates_made_at_once_comes_at_their_end(tmp_path):
    """The weights are those of the last of them, and so is the checkpoint."""
    config = replace(CONFIG, lr_schedule="constant", ema_decay=0, checkpoint_every=4)
    events = Events()
    trainer = make(callbacks=[Stop(6), events], config=config, checkpoint=tmp_path / "c.pt")
    graph = UpdateGraph(4, capture=lambda block, generators: block)
    train_stacked([trainer.training()], update_graph=graph)
    assert events.events == [1, 2, 3, 4, 5, 6, 7, 8, "end"]
    assert (trainer.iteration, trainer.stopped) == (8, "that will do")
    plain = make(config=replace(config, iterations=8))
    plain.fit()
    saved = checkpoints.load(tmp_path / "c.pt")
    assert saved["iteration"] == 8
    torch.testing.assert_close(saved["module"]["weight"], plain.module.weight.detach())


def stopped_in_one(rank, folder):
    """The callback of the second process stops both."""
    callbacks = [Stop(3, "enough")] if rank == 1 else []
    trainer = make(callbacks=callbacks, checkpoint=folder / "c.pt")
    trainer.fit()
    return trainer.iteration, trainer.stopped


def test_all_processes_stop_where_one_does(tmp_path):
    assert agreed(several(stopped_in_one, tmp_path)) == [(3, "enough")] * 2
    assert checkpoints.load(tmp_path / "c.pt")["iteration"] == 3


class StopAt(Callback):
    """Stops in one of the hooks beside ``on_step``."""

    def __init__(self, hook):
        self.hook = hook

    def on_start(self, trainer):
        if self.hook == "on_start":
            raise StopTraining("not today")

    def on_end(self, trainer):
        if self.hook == "on_end":
            raise StopTraining("not today")


def test_a_stop_before_the_first_iteration_leaves_a_checkpoint_to_go_on_from(tmp_path):
    expected, events = make().fit(), Events()
    trainer = make(callbacks=[StopAt("on_start"), events], checkpoint=tmp_path / "c.pt")
    trainer.fit()
    assert (trainer.iteration, trainer.stopped, events.events) == (0, "not today", ["end"])
    again = make(checkpoint=tmp_path / "c.pt")
    assert torch.equal(again.fit(resume=True).weight, expected.weight)


def test_a_stop_at_the_end_lets_the_other_callbacks_end(tmp_path):
    events = Events()
    trainer = make(callbacks=[StopAt("on_end"), events])
    trainer.fit()
    assert (trainer.iteration, trainer.stopped, events.events[-1]) == (12, "not today", "end")

    class Broken(Callback):
        def on_step(self, trainer, iteration, metrics):
            raise KeyError("disk")

    with pytest.raises(KeyError, match="disk"):  # not hidden by the stop
        make(callbacks=[Broken(), StopAt("on_end")]).fit()


def test_a_run_that_stops_before_it_begins_leaves_the_others_alone():
    trainers = [make(seed, [StopAt("on_start")] if seed == 1 else []) for seed in range(3)]
    train_stacked([trainer.training() for trainer in trainers])
    assert [trainer.iteration for trainer in trainers] == [12, 0, 12]


def test_a_progress_bar_says_where_and_why_a_training_was_stopped(capsys):
    make(callbacks=[Stop(7), ProgressBar("line")]).fit()
    shown = capsys.readouterr().err
    assert shown.splitlines()[-1] == "line: stopped after 7 of 12 updates: that will do"
    make(callbacks=[ProgressBar("line")]).fit()
    assert "stopped" not in capsys.readouterr().err


def test_other_errors_of_a_callback_are_raised():
    class Broken(Callback):
        def on_step(self, trainer, iteration, metrics):
            raise KeyError("disk")

    with pytest.raises(KeyError, match="disk"):
        make(callbacks=[Broken()]).fit()
