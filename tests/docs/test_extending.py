"""The page on extending, from top to bottom in an empty folder: files, Python and commands."""

import importlib
import importlib.metadata
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from helpers.pages import ROOT, Page, run

from adjoint import TiltConfig, tilt
from flows import Callback, GaussianMixture

PAGE = Page("docs/extending.md")
FILE = re.compile(r"# (my_\w+\.py)\n")
FEWER = (
    (r"\biterations=\d+", "iterations=4"),
    (r"TiltConfig\(", "TiltConfig(certificate_samples=64, base_samples=64, "),
    (r"RunConfig\(", "RunConfig(base_iterations=20, samples=2000, "),
    (r"offline_steps=\d+", "offline_steps=20"),
    (r"eval_every=\d+", "eval_every=20"),
)
"""Options of the Python blocks, made smaller."""
SMALLER = (
    (r"--iterations \d+", "--iterations 4 --base-iterations 20 --samples 2000 --no-animation"),
    (r"--offline-steps [1-9]\d*", "--offline-steps 20"),
    (r"--eval-every \d+", "--eval-every 20"),
    (r"--checkpoint-every \d+", "--checkpoint-every 20"),
)
"""Options of the commands, made smaller."""


def steps():
    """The blocks of the page in order: (name of the file, python or bash; code)."""
    for language, code in re.findall(r"^```(python|bash)\n(.*?)^```$", PAGE.text, re.S | re.M):
        file = FILE.match(code)
        if file:
            yield file[1], code
        elif language == "python":
            yield language, code
        else:
            for command in code.replace("\\\n", " ").strip().splitlines():
                yield language, command


def changed(code, changes):
    """The code with every pattern replaced."""
    for pattern, replacement in changes:
        code = re.sub(pattern, replacement, code)
    return code


def installed(package):
    """Whether a package is there."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def execute(command, folder):
    """Run a command as a user does who has installed the package, in ``folder``."""
    command = changed(command, SMALLER)
    if " sweep " in command and not installed("ray"):
        command += " --dry-run"
    program, *arguments = shlex.split(command)
    assert program == "python"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


class Seen(Callback):
    """Count the iterations."""

    iterations = 0

    def on_step(self, trainer, iteration, metrics):
        self.iterations = iteration


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, the current one; modules imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


@pytest.mark.slow
def test_the_page_from_top_to_bottom(folder):
    pytest.importorskip("gymnasium", reason="needs the packages of the extra rl")
    names, done = {}, []
    for kind, code in steps():
        if kind == "bash":
            execute(code, folder)
        elif kind == "python":
            names = run(changed(code, FEWER), names)
        else:
            (folder / kind).write_text(code)
        done.append(kind)
    mine = {
        f"my_{name}.py"
        for name in ("reward", "callback", "target", "kernel", "environment", "agent", "policy")
    }
    assert mine <= set(done)
    assert (folder / "outputs").is_dir()


@pytest.mark.slow
def test_the_callback_of_the_page_ends_a_training(folder):
    files = {kind: code for kind, code in steps() if kind.endswith(".py")}
    (folder / "my_callback.py").write_text(files["my_callback.py"])
    early = importlib.import_module("my_callback").EarlyStop(1e9)
    base = GaussianMixture.isotropic(torch.zeros(1, 2), 1.0)
    config = TiltConfig(iterations=15, certificate_samples=64, base_samples=64)
    seen = Seen()
    tilted = tilt(base, lambda x, c: x[:, 0], shape=(2,), config=config, callbacks=[early, seen])
    assert seen.iterations == 10
    assert tilted.certificate is not None
