"""Callbacks: files hold exactly what they should, also after a kill, and watching costs little."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from flows.networks.mlp import MLPVelocity
from flows.training import TrainerConfig, data_sampler, fit_flow
from flows.training.callbacks import Callback, ProgressBar, default_callbacks
from flows.training.loggers import CSVLogger, JSONLLogger, TensorBoardLogger

LOGGERS = [
    lambda folder, every=2: CSVLogger(folder / "log", every),
    lambda folder, every=2: JSONLLogger(folder / "log", every),
]


class Reading:
    """A metric that counts how often it is read, as reading waits for a device."""

    count = 0

    def __float__(self):
        self.count += 1
        return 0.5


def metrics_at(iteration):
    return {"loss": torch.tensor(1.0 / iteration), "norm": 2.0 * iteration}


def drive(callback, start, stop, *, iterations=12, metrics=metrics_at, end=True):
    """A run from iteration ``start`` to ``stop``, without ``on_end`` if it is killed there."""
    config = SimpleNamespace(iterations=iterations)
    trainer = SimpleNamespace(iteration=start, config=config, stopped=None)
    callback.on_start(trainer)
    for iteration in range(start + 1, stop + 1):
        trainer.iteration = iteration
        callback.on_step(trainer, iteration, metrics(iteration))
    if end:
        callback.on_end(trainer)


def test_csv_content(tmp_path):
    drive(CSVLogger(tmp_path / "new" / "log.csv", every=3), 0, 7)
    text = (tmp_path / "new" / "log.csv").read_bytes()
    assert text == b"iteration,loss,norm\n3,0.333333343,6.0\n6,0.166666672,12.0\n"


def test_jsonl_content_is_valid_json_even_for_nan(tmp_path):
    drive(JSONLLogger(tmp_path / "log", 2), 0, 2, metrics=lambda i: {"a": float("nan"), "b": 1.0})
    assert (tmp_path / "log").read_text() == '{"iteration": 2, "a": null, "b": 1.0}\n'


def test_nine_digits_restore_any_float32(tmp_path):
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    drive(JSONLLogger(tmp_path / "log", 1), 0, 50, metrics=lambda i: {"a": values[i - 1]})
    rows = [json.loads(line)["a"] for line in (tmp_path / "log").read_text().splitlines()]
    assert torch.equal(torch.tensor(rows), values)


@pytest.mark.parametrize("make", LOGGERS)
@pytest.mark.parametrize("tail", [b"", b"1", b"12,0.", b'{"iteration": 2, "lo'])
def test_a_killed_and_resumed_run_writes_the_same_file(tmp_path, make, tail):
    drive(make(tmp_path), 0, 12)
    undisturbed = (tmp_path / "log").read_bytes()
    drive(make(tmp_path), 0, 9, end=False)
    with (tmp_path / "log").open("ab") as file:
        file.write(tail)  # a row that the kill cut short
    drive(make(tmp_path), 5, 12)  # from the checkpoint of iteration 5
    assert (tmp_path / "log").read_bytes() == undisturbed


@pytest.mark.parametrize("make", LOGGERS)
def test_rows_are_in_the_file_when_the_checkpoint_is_written(tmp_path, make):
    logger = make(tmp_path)
    drive(logger, 0, 4, end=False)
    rows = (tmp_path / "log").read_text().splitlines()
    assert len([row for row in rows if "0.25" in row]) == 1
    file = logger._file
    logger.on_end(None)
    assert file.closed


@pytest.mark.parametrize("make", LOGGERS)
@pytest.mark.parametrize("old", ["iteration,other\n2,1.0\n", '{"iteration": 2}\n', "text\n"])
def test_a_fresh_run_replaces_the_file(tmp_path, make, old):
    drive(make(tmp_path), 0, 4)
    first = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_text(old)
    drive(make(tmp_path), 0, 4)
    assert (tmp_path / "log").read_bytes() == first


def test_a_late_metric_widens_the_table_also_across_a_resume(tmp_path):
    def late(iteration):
        return metrics_at(iteration) | ({"test, loss": 7.0} if iteration in (6, 10) else {})

    drive(CSVLogger(tmp_path / "log", 2), 0, 12, metrics=late)
    undisturbed = (tmp_path / "log").read_bytes()
    rows = undisturbed.decode().splitlines()
    assert rows[0] == 'iteration,loss,norm,"test, loss"'
    assert rows[2:4] == ["4,0.25,8.0,", "6,0.166666672,12.0,7.0"]
    drive(CSVLogger(tmp_path / "log", 2), 0, 9, metrics=late, end=False)
    drive(CSVLogger(tmp_path / "log", 2), 5, 12, metrics=late)
    assert (tmp_path / "log").read_bytes() == undisturbed


@pytest.mark.parametrize("make", LOGGERS)
def test_a_resume_does_not_touch_a_foreign_file(tmp_path, make):
    (tmp_path / "log").write_text("name,height\nAda,1.6\n")
    with pytest.raises(ValueError, match="log"):
        drive(make(tmp_path), 5, 12)
    assert (tmp_path / "log").read_text() == "name,height\nAda,1.6\n"


@pytest.mark.parametrize("make", [*LOGGERS, lambda f: TensorBoardLogger(f / "events")])
def test_unwritable_places_are_known_before_training(tmp_path, make):
    (tmp_path / "file").write_text("")
    logger = make(tmp_path / "file" / "below")
    with pytest.raises(OSError, match=r"[Ll]ogger: cannot write .*below.*Not a directory"):
        logger.on_start(SimpleNamespace(iteration=0, config=None))
    logger.on_end(SimpleNamespace(iteration=0, config=None))  # closing what never opened is fine


@pytest.mark.parametrize("make", [*LOGGERS, lambda f, n: ProgressBar(every=n)])
def test_metrics_are_read_once_in_every_n_iterations(tmp_path, make):
    reading = Reading()
    drive(make(tmp_path, 4), 0, 12, metrics=lambda i: {"loss": reading})
    assert reading.count == 3


@pytest.mark.parametrize("make", [*LOGGERS, lambda f, n: ProgressBar(every=n)])
def test_every_is_checked(tmp_path, make):
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        make(tmp_path, 0)


def test_progress_bar_shows_metrics_on_the_error_stream_only(capsys):
    drive(ProgressBar("fit", every=4, shown=1), 0, 12)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "fit: 100%" in printed.err
    assert "12/12" in printed.err
    assert "loss=0.0833" in printed.err
    assert "norm" not in printed.err


def test_progress_bar_starts_where_the_run_stands(capsys):
    drive(ProgressBar("fit"), 9, 10)
    assert "9/12" in capsys.readouterr().err


def test_tensorboard_round_trip_and_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    killed = TensorBoardLogger(tmp_path, 2)
    drive(killed, 0, 9, end=False)
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("norm")] == [2, 4, 6, 8]  # already written
    drive(TensorBoardLogger(tmp_path, 2), 5, 12)
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "norm"]
    assert [event.step for event in events.Scalars("norm")] == [2, 4, 6, 8, 10, 12]
    assert [event.value for event in events.Scalars("norm")] == [4, 8, 12, 16, 20, 24]


def test_tensorboard_missing_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"adjoint-matching\[logging\]"):
        drive(TensorBoardLogger(tmp_path), 0, 1)


def test_the_base_class_does_nothing():
    drive(Callback(), 0, 3)


# --- a bar by default ----------------------------------------------------------------------------


def bars(callbacks):
    return [callback for callback in callbacks if isinstance(callback, ProgressBar)]


def test_a_terminal_gets_a_bar_unless_there_is_one(monkeypatch):
    mine, other = ProgressBar("mine"), Callback()
    assert default_callbacks([other]) == [other]  # the stream of a test is no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    found = default_callbacks([other], description="fit")
    assert [bar.description for bar in bars(found)] == ["fit"]
    assert found[1] is other
    assert default_callbacks([mine, other]) == [mine, other]
    assert not bars(default_callbacks([other], progress=False))
    with pytest.raises(TypeError, match="callbacks must be a sequence"):
        default_callbacks(Callback)


@pytest.mark.parametrize(
    ("terminal", "progress", "shown"),
    [(True, None, 1), (True, False, 0), (False, None, 0), (False, True, 1)],
)
def test_fit_flow_shows_a_bar_on_a_terminal(monkeypatch, capsys, terminal, progress, shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    field = MLPVelocity(2, hidden=(4,))
    sampler = data_sampler(torch.zeros(4, 2))
    fit_flow(field, sampler, config=TrainerConfig(iterations=3), batch_size=4, progress=progress)
    assert ("3/3" in capsys.readouterr().err) == shown
