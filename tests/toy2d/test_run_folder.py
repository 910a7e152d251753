"""Folders of runs: none is written over unasked, and one that begins anew holds nothing stale."""

import json
from dataclasses import fields

import pytest

from applications.common.lock import locked
from applications.common.run_folder import CONFIG, start_run
from applications.toy2d import commands, gallery, run
from applications.toy2d.__main__ import main
from applications.toy2d.commands import Demo
from applications.toy2d.config import RunConfig
from applications.toy2d.digits.config import DigitsConfig
from applications.toy2d.run_folder import FILES
from flows.training import checkpoint as checkpoints
from flows.training.callbacks import Callback

OPTIONS = {"base_iterations": 1}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(commands, "save_pictures", lambda finished: [])


def command(folder, *extra: str) -> list[str]:
    identity = ["--target", "two_gaussians", "--reward", "linear", "--base-iterations", "5"]
    sizes = ["--iterations", "5", "--batch-size", "16", "--steps", "4", "--samples", "400"]
    return ["run", *identity, *sizes, "--folder", str(folder), "--no-animation", *extra]


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_a_run_is_written_over_only_if_asked_and_then_without_stale_files(tmp_path, capsys):
    assert main(command(tmp_path)) == 0
    (tmp_path / "flow.gif").write_text("of this run")
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    assert set(before) <= {CONFIG, "notes.txt", *FILES.names}
    capsys.readouterr()
    assert main(command(tmp_path)) == 1
    error = capsys.readouterr().err
    assert f"folder: {tmp_path} holds a run already; --resume" in error
    assert "--overwrite" in error
    assert contents(tmp_path) == before
    assert main(command(tmp_path, "--overwrite", "--iterations", "4")) == 0
    assert json.loads((tmp_path / CONFIG).read_text())["iterations"] == 4
    assert not (tmp_path / "flow.gif").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_a_finished_run_without_its_checkpoints_is_not_resumed_to_nothing(tmp_path, capsys):
    assert main(command(tmp_path)) == 0
    for path in tmp_path.glob("*.pt"):
        path.unlink()
    before = contents(tmp_path)
    assert main(command(tmp_path, "--resume")) == 1
    assert "holds a finished run whose checkpoints are gone" in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("extra", [{}, {"overwrite": True}, {"resume": True}])
@pytest.mark.parametrize("name", ["report.json", "flow.gif", CONFIG])
def test_files_that_are_not_of_a_run_are_left_alone(tmp_path, name, extra):
    (tmp_path / name).write_text('{"model": "another"}')
    with pytest.raises(ValueError, match=f"holds files that are not of this application: {name}"):
        start_run(tmp_path, FILES, OPTIONS, **({"resume": False, "overwrite": False} | extra))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("command", ["run", "digits"])
@pytest.mark.parametrize("name", ["base.pt", "tilt.pt", "classifier.pt"])
def test_foreign_checkpoints_are_refused_even_with_overwrite(tmp_path, capsys, command, name):
    (tmp_path / name).write_text("work")
    assert main([command, "--folder", str(tmp_path), "--overwrite"]) == 1
    assert f"not of this application: {name}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_digits_are_not_written_over(tmp_path, capsys):
    start_run(tmp_path, FILES, OPTIONS, resume=False, overwrite=False)
    (tmp_path / "base.pt").write_text("work")
    assert main(["digits", "--folder", str(tmp_path)]) == 1
    assert "holds a run already" in capsys.readouterr().err
    assert (tmp_path / "base.pt").read_text() == "work"


@pytest.mark.parametrize("config", [RunConfig, DigitsConfig])
def test_resume_and_overwrite_exclude_each_other(config):
    with pytest.raises(ValueError, match="resume and overwrite must not both be given"):
        config(resume=True, overwrite=True)


@pytest.mark.parametrize("resume", [False, True])
def test_the_demonstration_takes_the_place_of_its_last_one(monkeypatch, resume):
    asked = []
    monkeypatch.setattr(commands, "show_run", asked.append)
    monkeypatch.setattr(commands, "show_digits", asked.append)
    commands.show_demo(Demo(resume=resume))
    assert [(c.resume, c.overwrite) for c in asked] == [(resume, not resume)] * 2


@pytest.mark.parametrize("resume", [False, True])
def test_a_learned_gallery_takes_the_place_of_its_last_one(monkeypatch, tmp_path, resume):
    class Asked(Exception):
        pass

    def ask(options, base=None):
        raise Asked(options)

    monkeypatch.setattr(gallery, "run", ask)
    config = gallery.GalleryConfig(folder=tmp_path, learned=True, resume=resume)
    with pytest.raises(Asked) as asked:
        gallery.show_gallery(config)
    (options,) = asked.value.args
    assert (options.resume, options.overwrite) == (resume, not resume)


@pytest.mark.slow
def test_a_resume_says_where_it_begins(tmp_path, capsys):
    assert main(command(tmp_path, "--resume")) == 0
    assert f"nothing to resume in {tmp_path}: begins anew" in capsys.readouterr().err
    assert main(command(tmp_path, "--resume")) == 0
    shown = capsys.readouterr().err
    assert "base flow: resumed at iteration 5 of 5\n" in shown
    assert "tilt: resumed at iteration 5 of 5\n" in shown
    assert "begins anew" not in shown


@pytest.mark.parametrize("name", ["base flow", "tilt"])
@pytest.mark.slow
def test_an_interrupt_loses_fifty_updates_at_most(tmp_path, monkeypatch, name):
    class Interrupt(Callback):
        def on_step(self, trainer, iteration, metrics):
            if iteration == 70:
                raise KeyboardInterrupt

    training_callbacks = run.training_callbacks

    def interrupting(what, log):
        return training_callbacks(what, log) + [Interrupt()] * (what == name)

    monkeypatch.setattr(run, "training_callbacks", interrupting)
    lengths = ["--base-iterations", "80", "--iterations", "80"]
    assert main(command(tmp_path, *lengths)) == 130
    file = tmp_path / ("base.pt" if name == "base flow" else "tilt.pt")
    assert checkpoints.load(file)["iteration"] == 50


def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    pytest.importorskip("fcntl")
    with locked(tmp_path):
        assert main(command(tmp_path)) == 1
        assert f"folder: {tmp_path} is in use by another run" in capsys.readouterr().err
        assert main(["digits", "--folder", str(tmp_path)]) == 1
        assert "in use by another run" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        pass


def test_an_interrupted_overwrite_is_continued_by_a_resume(tmp_path, monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "show_run", interrupted)
    assert main(command(tmp_path, "--overwrite")) == 130
    assert "the same command with --resume instead of --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_in_place_of_the_folder_is_called_one(tmp_path, capsys, below):
    file = tmp_path / "file"
    file.write_text("in the way")
    assert main(command(file / below)) == 1
    assert f"'{file}' is a file, expected a folder" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--refine", "--refine=0.1", "--variates", "--no-variates"])
def test_options_of_an_earlier_version_are_refused_by_their_new_name(tmp_path, capsys, flag):
    name = flag.partition("=")[0].removeprefix("--")
    new = {
        "refine": "refine-fraction",
        "variates": "control-variates",
        "no-variates": "no-control-variates",
    }[name]
    assert main(["digits", "--folder", str(tmp_path / "a"), flag]) == 1
    option = flag.partition("=")[0]
    assert capsys.readouterr().err == f"error: the option {option} was renamed to --{new}\n"


def test_a_run_of_an_earlier_version_says_which_and_what_to_do(tmp_path, capsys):
    old = {"base_iterations": 5, "refine": 0.5, "versions": {"torch": "2.6"}}
    (tmp_path / CONFIG).write_text(json.dumps(old))
    (tmp_path / "base.pt").write_text("work")
    assert main(command(tmp_path, "--resume")) == 1
    shown = capsys.readouterr().err
    assert "holds a run written by version 0.1 of adjoint-matching" in shown
    assert "refine is now refine_fraction" in shown
    assert "--overwrite" in shown
    assert (tmp_path / "base.pt").read_text() == "work"


def test_new_names_exist_and_old_ones_do_not():
    known = {option.name for config in (RunConfig, DigitsConfig) for option in fields(config)}
    assert set(FILES.renamed.values()) <= known
    assert not set(FILES.renamed) & known
