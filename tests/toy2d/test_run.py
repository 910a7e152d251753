"""Runs and the command line: reports, resume, and one clear error for each bad input."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
import warnings

import matplotlib
import pytest
import torch

from adjoint.chain.kernels import KERNELS
from applications.toy2d import commands, rewards
from applications.toy2d.__main__ import main
from applications.toy2d.config import RunConfig
from applications.toy2d.pictures.of_a_run import save_pictures
from applications.toy2d.report import COMPARED, table
from applications.toy2d.run import run
from flows.training import checkpoint as checkpoints

FIELDS = [
    "target",
    "reward",
    "temperature",
    "kernel",
    "steps",
    "reward_base",
    "reward_tilted",
    "reward_exact",
    "log_z",
    "log_z_stderr",
    "log_z_exact",
    "log_z_exact_stderr",
    "log_weight_std_base",
    "log_weight_std",
    "ess",
    "path_kl",
    "w2_ratio",
    "mode_tv",
    "seconds",
]

BRIEF = {"base": "trained", "base_iterations": 5, "samples": 1000}


def small(folder, **changes) -> RunConfig:
    options = {
        "target": "two_gaussians",
        "reward": "linear",
        "base": "closed_form",
        "iterations": 40,
        "batch_size": 128,
        "steps": 10,
        "samples": 4000,
        "folder": folder,
        "animation": False,
    }
    return RunConfig(**(options | changes))


def arguments(config: RunConfig, *extra: str) -> list[str]:
    names = ("target", "reward", "base", "iterations", "batch_size", "steps", "samples", "folder")
    flags = [part for n in names for part in (f"--{n.replace('_', '-')}", str(getattr(config, n)))]
    return ["run", *flags, "--no-animation", *extra]


def texts(figure) -> str:
    return " | ".join(t.get_text() for t in figure.findobj(matplotlib.text.Text))


@pytest.mark.slow
def test_a_run_writes_a_flat_report_and_moves_toward_the_exact_tilt(tmp_path):
    finished = run(small(tmp_path / "a", iterations=150))
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert list(report) == FIELDS
    assert report == pytest.approx(finished.report)
    gained = report["reward_tilted"] - report["reward_base"]
    assert gained > 0.7 * (report["reward_exact"] - report["reward_base"])
    assert report["log_weight_std"] < 0.6 * report["log_weight_std_base"]
    # The closed form and the quadrature must agree on log Z whatever the training did.
    mixture, form = finished.target.mixture, finished.reward.quadratic_form
    assert report["log_z_exact"] == pytest.approx(float(mixture.tilt(*form)[1]), abs=1e-5)
    assert report["log_z_exact_stderr"] == 0
    assert report["temperature"] == 1
    assert "reward_exact" in table(report)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_a_trained_base_is_judged_by_its_own_samples(tmp_path):
    finished = run(small(tmp_path / "b", base="trained", base_iterations=60, target="moons"))
    assert finished.exact.samples.shape == (8000, 2)
    assert 0 < finished.report["log_z_exact_stderr"] < 0.1
    assert (tmp_path / "b" / "base.csv").read_text().startswith("iteration,loss")


@pytest.mark.slow
def test_what_too_few_samples_know_is_not_reported(tmp_path, drawn):
    """The tilt of a cold reward is that of one sample of the base, and so would agree with any."""
    config = small(tmp_path / "a", **BRIEF, iterations=5, temperature=0.001)
    with pytest.warns(UserWarning, match=r"are too few \(below 10\).*log_z_exact_stderr, w2_ratio"):
        finished = run(config)
    report = json.loads((config.path / "report.json").read_text())
    assert {name for name, value in report.items() if value is None} >= {*COMPARED}
    shown = {path.stem: figure for path, figure in zip(save_pictures(finished), drawn, strict=True)}
    assert "too few effective samples" in texts(shown["densities"])
    assert "exact log Z" not in texts(shown["certificate"])


@pytest.mark.slow
def test_pictures_tell_the_temperature_the_refinement_and_the_error(tmp_path, drawn):
    config = small(tmp_path / "a", **BRIEF, iterations=40, temperature=0.5)
    shown = {
        path.stem: figure for path, figure in zip(save_pictures(run(config)), drawn, strict=True)
    }
    for name in ("densities", "paths", "control", "certificate", "training"):
        assert "temperature 0.5" in texts(shown[name]), name
    training = texts(shown["training"])
    assert "reward / temperature" in training
    assert training.count("refinement") == 6
    loss = shown["training"].axes[0]
    assert [line.get_xdata()[0] for line in loss.lines if len(set(line.get_xdata())) == 1][-1] == 20
    assert re.search(r"exact log Z = [-\d.]+ ± 0\.0\d\d", texts(shown["certificate"]))


@pytest.mark.slow
def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(tmp_path):
    reports = [run(small(tmp_path / n, seed=s)).report for n, s in (("a", 0), ("b", 0), ("c", 1))]
    for report in reports:
        report.pop("seconds")
    assert reports[0] == reports[1]
    assert reports[0] != reports[2]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    """SIGKILL of the command line itself, in the middle of the tilt."""
    config = small(tmp_path / "killed", iterations=300)
    command = [sys.executable, "-m", "applications.toy2d", *arguments(config)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    checkpoint = config.path / "tilt.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoints.load(checkpoint)["iteration"] < 300
    assert not (config.path / "report.json").exists()
    undisturbed = small(tmp_path / "undisturbed", iterations=300)
    for rest in (arguments(config, "--resume"), arguments(undisturbed)):
        subprocess.run([*command[:3], *rest], check=True, capture_output=True)
    a, b = (checkpoints.load(c.path / "tilt.pt") for c in (config, undisturbed))
    for name, value in a["module"].items():
        assert torch.equal(value, b["module"][name]), name
    for name in ("tilt.csv", "densities.png"):
        assert (config.path / name).read_bytes() == (undisturbed.path / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "moon"}, "unknown target 'moon'; expected one of ring"),
        ({"reward": "lineal"}, "unknown reward 'lineal'; expected one of linear"),
        ({"target": "moons"}, "base 'closed_form' needs a mixture target"),
        ({"steps": 1}, "steps must be at least 2, got 1"),
        ({"samples": 10}, "samples must be at least 100, got 10"),
    ],
)
def test_bad_options_are_one_clear_line(tmp_path, capsys, changes, message):
    assert main(arguments(small(tmp_path / "x", **changes))) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_a_resume_with_another_length_of_the_base_is_refused(tmp_path, capsys):
    """Otherwise a base of one run and a tilt of another would be mixed."""
    config = small(tmp_path / "a", base="trained", base_iterations=20, iterations=5)
    run(config)
    before = contents(config.path)
    extra = ("--base-iterations", "40", "--resume")
    assert main(arguments(config, *extra)) == 1
    assert "base_iterations: 20 in the checkpoint, expected 40" in capsys.readouterr().err
    assert contents(config.path) == before


@pytest.mark.parametrize("resume", [[], ["--resume"]])
@pytest.mark.parametrize(
    "changes",
    [
        {"target": "moons"},
        {"steps": 1},
        {"samples": 10},
        {"reward": "lineal"},
        {"base": "trained", "base_iterations": -1},
    ],
)
def test_a_command_that_fails_leaves_the_folder_alone(tmp_path, changes, resume):
    folder = tmp_path / "a"
    folder.mkdir()
    for name in ("config.json", "report.json", "base.pt", "tilt.pt", "tilt.csv"):
        (folder / name).write_text("work")
    before = contents(folder)
    config = small(folder, **changes)
    extra = ["--base-iterations", str(config.base_iterations), *resume]
    assert main(arguments(config, *extra)) == 1
    assert contents(folder) == before


@pytest.mark.slow
def test_a_run_of_few_iterations_has_its_curves(tmp_path, drawn):
    config = small(tmp_path / "a", iterations=5)
    assert main(arguments(config)) == 0
    rows = (config.path / "tilt.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["iteration", "5"]
    assert (config.path / "training.png").exists()
    assert not any("temperature" in texts(figure) for figure in drawn)  # it is 1


def test_an_unwritable_folder_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(arguments(small(tmp_path / "file" / "run"))) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: folder: cannot write")
    assert str(tmp_path / "file") in error
    (tmp_path / "run" / "tilt.pt").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text('{"base_iterations": 1}')
    assert main(arguments(small(tmp_path / "run"), "--overwrite")) == 1
    assert capsys.readouterr().err.startswith(f"error: cannot access {tmp_path}/run/tilt.pt: ")


@pytest.mark.slow
def test_checkpoints_that_do_not_belong_are_refused(tmp_path, capsys):
    config = small(tmp_path / "a")
    assert main(arguments(config)) == 0
    before = contents(config.path)
    other = small(tmp_path / "a", reward="peaks")
    assert main(arguments(other, "--resume")) == 1
    assert "reward" in capsys.readouterr().err
    assert contents(config.path) == before
    checkpoint = config.path / "tilt.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    assert main(arguments(config, "--resume")) == 1
    assert "tilt.pt" in capsys.readouterr().err


def test_help_and_list_explain_themselves(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    shown = capsys.readouterr().out
    for text in ("--target", "Distribution that the base", "--resume", "Steps K"):
        assert text in shown
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for name in ("checkerboard", "half_plane", "moment_matched", "log P(label | x)"):
        assert name in shown
    assert "the ancestral kernel, adjoint read at its own time" in shown
    assert all(f"{name:<20}{kernel.summary}" in shown for name, kernel in KERNELS.items())


def test_a_warning_is_one_line(monkeypatch, capsys):
    def warn(_):
        warnings.warn("the grid\nis coarse", stacklevel=1)

    monkeypatch.setattr(commands, "show_list", warn)
    before = warnings.showwarning
    assert main(["list"]) == 0
    assert capsys.readouterr().err == "warning: the grid is coarse\n"
    assert warnings.showwarning is before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run.kernel", "ancestral"], "run.kernel has no effect in a gallery without learned"),
        (
            ["--learned", "--run.target", "ring"],
            "run.target has no effect in a gallery, got 'ring'",
        ),
        (["--learned", "--run.resume"], "run.resume has no effect in a gallery, got True"),
        (["--learned", "--run.kernel", "euler"], "kernel must be one of"),
        (["--learned", "--run.base", "closed_form"], "base 'closed_form' needs a mixture target"),
    ],
)
def test_options_without_effect_or_out_of_range_are_refused_by_a_gallery(
    tmp_path, monkeypatch, capsys, options, message
):
    def work(*_):
        raise AssertionError("begun")

    monkeypatch.setattr("applications.toy2d.gallery.learned_densities", work)
    monkeypatch.setattr("applications.toy2d.gallery.exact_densities", work)
    with contextlib.suppress(SystemExit):  # of the parser, which frames and wraps the error
        assert main(["gallery", "--folder", str(tmp_path / "g"), *options]) == 1
    shown = capsys.readouterr().err.replace("│", " ")
    assert message in " ".join(shown.split())
    assert not (tmp_path / "g").exists()


def test_listing_trains_nothing(monkeypatch):
    monkeypatch.setattr(rewards, "_train_classifier", None)
    assert main(["list"]) == 0


@pytest.mark.parametrize(("command", "resumes"), [("list", False), ("digits", True)])
def test_an_interrupt_suggests_resuming_only_where_that_exists(
    monkeypatch, capsys, command, resumes
):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, f"show_{command}", interrupted)
    assert main([command]) == 130
    shown = capsys.readouterr().err
    assert "interrupted" in shown
    assert ("--resume" in shown) == resumes
