"""Objects of one's own: targets, rewards, kernels, in Python and by command line."""

import json
import sys

import pytest
import torch

from adjoint import KERNELS
from applications.toy2d.__main__ import main
from applications.toy2d.config import RunConfig
from applications.toy2d.pictures.of_a_run import save_pictures
from applications.toy2d.rewards import ToyReward, make_reward
from applications.toy2d.run import run
from applications.toy2d.setup import resolve
from applications.toy2d.targets import TARGETS, Target, find_target
from flows.training import CheckpointError

MODULE = '''
import torch
from adjoint import Kernel, Scheme
from applications.toy2d.targets import Target

WIDTH = {width}

def draw(n, generator):
    """Two bars that cross."""
    x = torch.randn(n, 2, generator=generator)
    upright = torch.rand(n, generator=generator) < 0.5
    return x * torch.where(upright[:, None], torch.tensor([WIDTH, 1.5]), torch.tensor([1.5, WIDTH]))

cross = Target("cross", "two bars that cross", draw)

def make_cross():
    return cross

def upward(x, cond):
    """A slope upward."""
    return {slope} * x[:, 1]

class Upward:
    """A slope upward."""
    def __call__(self, x, cond):
        return {slope} * x[:, 1]

class Ancestral(Scheme):
    """The ancestral chain with noise of a size of one's own."""
    name = "mine"
    summary = "the ancestral chain"
    def __init__(self, size=1.0):
        self.size = size
    def __call__(self, grid, moments):
        t, s = grid[:-1], grid[1:]
        h = s - t
        sigma = (2 * (1 - t + h) / s).sqrt()
        std, mean_x, mean_v = self.size * h.sqrt() * sigma, 1 - h / s, 2 * h
        std[-1], mean_x[-1], mean_v[-1] = 0.0, 1.0, h[-1]
        return Kernel.consistent(self.name, grid, mean_x=mean_x, mean_v=mean_v, std=std)

not_a_target = 3

def two_few(x):
    return x[:, 1]
'''

SMALL = {
    "base_iterations": 20,
    "iterations": 10,
    "batch_size": 32,
    "steps": 6,
    "samples": 400,
    "animation": False,
}


def write_module(folder, width=0.2, slope=1.0):
    sys.modules.pop("mine_in_the_plane", None)
    (folder / "mine_in_the_plane.py").write_text(MODULE.format(width=width, slope=slope))
    for cached in folder.glob("__pycache__/*"):  # the time of a file is too coarse for a test
        cached.unlink()


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The module, beside the run's folder as it is beside a user's shell."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    write_module(tmp_path)
    yield tmp_path
    sys.modules.pop("mine_in_the_plane", None)


def command(folder, *extra):
    flags = [
        part
        for name, value in SMALL.items()
        if name != "animation"
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    return ["run", "--folder", str(folder), "--no-animation", *flags, *extra]


@pytest.mark.slow
def test_objects_in_python_without_modes_labels_or_density(mine):
    import mine_in_the_plane as module

    target, reward = module.make_cross(), module.Upward()
    finished = run(RunConfig(target=target, reward=reward, folder=mine / "a", **SMALL))
    report = json.loads((mine / "a" / "report.json").read_text())
    assert (report["target"], report["reward"]) == ("cross", "Upward")
    assert "mode_tv" not in report
    assert report["reward_tilted"] > report["reward_base"]
    config = json.loads((mine / "a" / "config.json").read_text())
    assert config["target"].startswith("cross ")
    assert config["reward"].startswith("Upward ")
    assert {path.name for path in save_pictures(finished)} >= {"densities.png", "training.png"}


OWN = ("--target", "mine_in_the_plane:cross", "--reward", "mine_in_the_plane:upward")


@pytest.mark.slow
def test_a_resume_takes_the_objects_it_began_with_and_no_others(mine, capsys):
    folder = mine / "a"
    assert main(command(folder, *OWN)) == 0
    report = (folder / "tilt.csv").read_bytes()
    assert main(command(folder, *OWN, "--resume")) == 0
    assert (folder / "tilt.csv").read_bytes() == report
    capsys.readouterr()
    for changes, part in (({"slope": 1.1}, "reward"), ({"width": 0.3}, "target")):
        write_module(mine, **changes)
        assert main(command(folder, *OWN, "--resume")) == 1
        shown = capsys.readouterr().err
        assert "belongs to another" in shown
        assert part in shown
    write_module(mine)
    assert main(command(folder, *OWN[:3], "half_plane", "--resume")) == 1


def test_without_a_folder_the_names_say_where(mine):
    assert str(RunConfig(target=OWN[1], reward="linear").path) == (
        "outputs/mine_in_the_plane-cross-linear"
    )
    reward = make_reward(OWN[3], TARGETS["ring"])
    assert str(RunConfig(target=TARGETS["ring"], reward=reward).path) == "outputs/ring-upward"


def test_an_object_may_be_made_by_a_function_or_class(mine):
    assert find_target("mine_in_the_plane:make_cross") is find_target("mine_in_the_plane:cross")
    reward = make_reward("mine_in_the_plane:Upward", TARGETS["ring"])
    assert float(reward(torch.tensor([[0.0, 2.0]]))) == 2.0
    assert reward.description == "A slope upward"


def test_identity_is_that_of_the_object_however_it_is_given(mine):
    named = RunConfig(target=OWN[1], reward=OWN[3])
    import mine_in_the_plane as module

    given = RunConfig(target=module.cross, reward=module.upward)
    assert resolve(named).identity == resolve(given).identity
    own = ToyReward("linear", "another of this name", lambda x: x[:, 0])
    other = RunConfig(target=TARGETS["ring"], reward=own)
    identity = resolve(other).identity
    assert identity["target"] == "ring"
    assert identity["reward"] != resolve(RunConfig(reward="linear")).identity["reward"]


@pytest.mark.slow
def test_a_kernel_in_python_and_by_command_line(mine):
    import mine_in_the_plane as module

    folder = mine / "a"
    kernel = ("--kernel", "mine_in_the_plane:Ancestral")
    assert main(command(folder, *OWN, *kernel)) == 0
    assert json.loads((folder / "report.json").read_text())["kernel"] == "mine"
    assert json.loads((folder / "config.json").read_text())["kernel"].startswith(
        "mine: mine_in_the_plane.Ancestral"
    )
    own = {"target": module.cross, "reward": module.upward, "folder": folder, "resume": True}
    run(RunConfig(kernel=module.Ancestral(), **own, **SMALL))
    with pytest.raises(CheckpointError, match="kernel"):
        run(RunConfig(kernel=module.Ancestral(0.9), **own, **SMALL))


def test_kernels_of_the_package_are_known_by_name_to_checkpoints():
    named, given = (RunConfig(kernel=k) for k in ("ancestral", KERNELS["ancestral"]))
    assert named.tilt_options == given.tilt_options
    assert given.described()["kernel"] == "ancestral"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kernel", "mine_in_the_plane:not_a_target"], "kernel must be of type Scheme, got 3"),
        (["--target", "mine_in_the_plane:not_a_target"], "Target, got 3 by 'mine_in_the_plane:not"),
        (["--target", "mine_in_the_plane:ring"], "the module 'mine_in_the_plane' has no 'ring'"),
        (["--reward", "mine_in_the_plane:not_a_target"], "reward must be a callable (x, cond)"),
        (["--reward", "mine_in_the_plane:two_few"], "reward must be a callable (x, cond)"),
        (
            ["--target", "mine_in_the_plane:cross", "--reward", "peaks"],
            "peaks needs a target with modes, 'cross' has none",
        ),
        (
            ["--target", "mine_in_the_plane:cross", "--reward", "classifier"],
            "classifier needs a target with classes, 'cross' has none",
        ),
        (
            ["--target", "mine_in_the_plane:cross", "--base", "closed_form"],
            "base 'closed_form' needs a mixture target, got 'cross'",
        ),
    ],
)
def test_what_an_object_lacks_is_one_line(mine, capsys, flags, message):
    assert main(command(mine / "x", *flags)) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (mine / "x").exists()


def test_samples_of_the_wrong_shape_are_refused():
    wide = Target("wide", "three columns", lambda n, generator: torch.randn(n, 3))
    with pytest.raises(ValueError, match=r"shape \(5, 2\), got \(5, 3\)"):
        wide.sample(5)
    with pytest.raises(ValueError, match="target 'bare' has no classes"):
        Target("bare", "points alone", lambda n, generator: torch.randn(n, 2)).labelled(5)


BAD = """
import torch
from adjoint import Kernel, Reward, Scheme
from applications.toy2d.targets import Target

nowhere = Target("nowhere", "no points", lambda n, generator: torch.full((n, 2), torch.nan))

def wide(x, cond):
    return x

def detached(x, cond):
    return x.detach().sum(1)

def logarithm(x, cond):
    return x[:, 0].log()

def whole(x, cond):
    return x[:, 0].round().long()

class Still(Scheme):
    name = "still"
    summary = "no noise at all"
    def __call__(self, grid, moments):
        ones = torch.ones_like(grid[1:])
        return Kernel.consistent(self.name, grid, mean_x=ones, mean_v=ones, std=0 * ones)

class Nothing(Scheme):
    name = "nothing"
    summary = "no table"
    def __call__(self, grid, moments):
        return None

named = Reward(lambda x, cond: x[:, 1].round(), gradient=lambda x, cond: x * 0 + 1, name="ramp",
               max_norm=0.5)
"""


@pytest.fixture
def bad(tmp_path, monkeypatch):
    """A module of objects that cannot be used."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "bad_in_the_plane.py").write_text(BAD)
    yield tmp_path
    sys.modules.pop("bad_in_the_plane", None)


@pytest.mark.parametrize(
    ("program", "flag", "name", "message"),
    [
        ("run", "target", "nowhere", "samples of target 'nowhere' must be finite"),
        ("run", "reward", "wide", "reward returned shape (64, 2)"),
        ("run", "reward", "detached", "reward is not differentiable"),
        ("run", "reward", "logarithm", "reward is not finite"),
        ("run", "reward", "whole", "reward must return a floating-point tensor, got torch.int64"),
        ("run", "kernel", "Still", "std must be positive but for the last step's"),
        ("run", "kernel", "Nothing", "a scheme must return a Kernel, got None"),
        ("digits", "kernel", "Still", "std must be positive but for the last step's"),
    ],
)
def test_objects_that_cannot_be_used_are_refused_before_a_base_is_trained(
    bad, capsys, program, flag, name, message
):
    folder = bad / "x"
    assert main([program, "--folder", str(folder), f"--{flag}", f"bad_in_the_plane:{name}"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not folder.exists()


def test_a_reward_keeps_its_name_gradient_and_cap(bad):
    reward = make_reward("bad_in_the_plane:named", TARGETS["ring"])
    assert reward.name == reward.description == "ramp"
    _, gradient, _ = reward.for_tilt.value_and_gradient(torch.zeros(3, 2))
    torch.testing.assert_close(gradient.norm(dim=1), torch.full((3,), 0.5))
    resolve(RunConfig(target="ring", reward="bad_in_the_plane:named"))
    assert make_reward(lambda x, cond: x[:, 0], TARGETS["ring"]).name == "reward"
