"""The command line: what it parses to, what it runs, and how it says what is wrong."""

import importlib
import json
import sys
from dataclasses import is_dataclass

import pytest
import torch

from applications.rl import AGENTS, RunError, find_task, preset
from applications.rl import __main__ as cli
from applications.rl.evaluation.command import EvaluateConfig, show_evaluate

torch.set_num_threads(1)

TASK = "scene-sparse-play-singletask-task2-v0"
SIZES = "--hidden 16 16 --flow-steps 3 --critics 2 --batch-size 16 --device cpu"


def train_config(*arguments):
    config, function = cli.parse("train", [*arguments])
    assert function.__name__ == "show_train"
    return config


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_there(name):
    config, function = cli.COMMANDS[name].load()
    assert is_dataclass(config)
    assert callable(function)
    assert name in cli.PROGRAM.usage()


def test_options_of_an_agent_are_those_of_its_preset_unless_given():
    for agent in AGENTS:
        for size in ("published", "small"):
            config = train_config("--task", TASK, "--agent", agent, "--preset", size)
            assert config.options == preset(agent, find_task(TASK), size)
            assert (config.agent, config.task) == (agent, TASK)
    changed = train_config(
        *f"--task={TASK} --inverse-temperature 3 --hidden 64 32 --horizon 2 --seed 4 5".split()
    )
    assert changed.seeds == (4, 5)
    options = changed.options
    assert (options.inverse_temperature, options.hidden, options.horizon) == (3.0, (64, 32), 2)
    assert options.critics == preset("qam", find_task(TASK)).critics


@pytest.mark.parametrize(
    ("words", "seeds"),
    [("", (0,)), ("--seeds 0-2", (0, 1, 2)), ("--seeds 3 0 1", (3, 0, 1)), ("--seed=5-6", (5, 6))],
)
def test_seeds_of_train_are_numbers_and_ranges_as_those_of_sweep(words, seeds):
    assert train_config("--task", TASK, *words.split()).seeds == seeds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "error: task: name one, such as --task"),
        (["train", "--task", "scene-play-singletask-task7-v0"], "did you mean scene-play"),
        (["train", "--task", TASK, "--agent", "sac"], "error: agent must be one of"),
        (
            ["train", "--task", TASK, "--agent", "bc", "--inverse-temperature=3"],
            "agent 'bc' has no option --inverse-temperature; it is one of qam, qam-e, qam-f, bam",
        ),
        (["train", "--task", TASK, "--agent", "bc", "--no-such-thing"], "Unrecognized"),
        (["train", "--task", TASK, "--preset", "huge"], "error: preset must be one of"),
        (["train", "--task", TASK, "--eval-every", "-1"], "eval_every must be at least 0, got -1"),
        (["train", "--task", TASK, "--seeds", "2-0"], "seeds: the range '2-0' is empty"),
        (["train", "--task", TASK, "--seeds", "0-2", "1"], "seeds must be different numbers"),
        (["train", "--task", TASK, "--horizon", "0"], "horizon must be at least 1"),
        (
            ["train", "--task", TASK, "--eval-beside"],
            "error: the option --eval-beside was renamed to --background-eval",
        ),
        (
            ["sweep", "--tasks", TASK, "--graph=10"],
            "error: the option --graph was renamed to --cuda-graphs",
        ),
        (["evaluate", "nowhere"], "error: checkpoint: there is no 'nowhere'"),
        (["evaluate"], "error: runs: name at least one"),
        (["evaluate", "nowhere", "--episodes", "0"], "episodes must be at least 1, got 0"),
        (
            ["train", "--task", "gym:Pendulum-v1"],
            "give yours by --data FILE.npz (load_npz), or learn without by --no-use-data "
            "--offline-steps 0",
        ),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message, capsys):
    status = 1
    try:
        status = cli.main(arguments)
    except SystemExit as end:  # the parser's own refusals
        status = end.code
    captured = capsys.readouterr()
    assert status in (1, 2)
    assert message in " ".join((captured.err + captured.out).split())
    assert "Traceback" not in captured.err


def test_usage(capsys):
    assert cli.main(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    assert cli.main([]) == 2
    assert cli.main(["fly"]) == 2
    assert "command must be one of data, train" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for word in ("--inverse-temperature", "[-1,", "masks", "next_observations"):
        assert word in text


def test_list_names_what_there_is(capsys):
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    for word in (*AGENTS, "pointmaze-medium", "puzzle-4x6", "inverse_temperature", "gym:"):
        assert word in text


def test_a_missing_package_and_an_interruption_are_explained(capsys, monkeypatch):
    def missing(self):
        importlib.import_module("surely_not_installed")

    monkeypatch.setattr(cli.Command, "load", missing)
    assert cli.main(["train"]) == 1
    assert "'surely_not_installed' is not installed: pip install" in capsys.readouterr().err
    monkeypatch.undo()

    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("applications.rl.training.train.show_train", interrupted)
    assert cli.main(["train", "--task", TASK]) == 130
    assert "the same command with --resume continues" in capsys.readouterr().err


def test_a_task_without_ogbench_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ogbench", None)
    command = f"train --task {TASK} --no-use-data --offline-steps 0 --online-steps 5000 {SIZES}"
    assert cli.main(command.split()) == 1
    assert "pip install" in capsys.readouterr().err


@pytest.mark.slow
def test_training_and_evaluating_from_the_command_line(tmp_path, capsys):
    command = (
        "train --task gym:Pendulum-v1 --agent qam --no-use-data --offline-steps 0 --seeds 0 1 "
        f"--online-steps 30 --start-training 10 --eval-every 0 --log-every 5 {SIZES}"
    )
    arguments = [*command.split(), "--folder", str(tmp_path / "runs")]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "next: python -m applications.rl evaluate" in printed
    assert "applications.rl report" not in printed  # there are no evaluations
    runs = [tmp_path / "runs" / f"seed{seed}" for seed in (0, 1)]
    assert [json.loads((run / "config.json").read_text())["seed"] for run in runs] == [0, 1]
    assert cli.main(arguments) == 1  # would overwrite
    assert "--resume continues it" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume"]) == 0  # finished: nothing to do
    capsys.readouterr()

    played = ["--episodes", "2", "--device", "cpu"]
    assert cli.main(["evaluate", str(tmp_path), str(runs[0] / "checkpoint.pt"), *played]) == 0
    printed = capsys.readouterr().out
    assert printed.count("qam on gym:Pendulum-v1, 21 updates") == 3
    assert [printed.count(f"{run} (qam on") for run in runs] == [1, 1]  # found below the folder
    assert "success not told" in printed  # the pendulum names none
    assert "length 200" in printed


def test_a_gif_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")  # other tests of this process switched it off
    from helpers.tiny import Corridor, corridor_data, options

    from applications.rl import TrainConfig, train

    config = TrainConfig(
        "gym:Pendulum-v1",  # of a task that needs no MuJoCo, and so no EGL
        agent="bc",
        options=options("bc"),
        offline_steps=2,
        eval_every=0,
        batch_size=8,
        folder=tmp_path,
    )
    train(config, environment=Corridor, dataset=corridor_data())
    monkeypatch.setattr(
        "applications.rl.evaluation.command.make_environment", lambda task, render=False: Corridor()
    )
    gif = tmp_path / "episode.gif"
    command = ["evaluate", str(tmp_path / "seed0"), "--episodes", "1", "--gif", str(gif)]
    assert cli.main(command) == 0
    assert gif.read_bytes().startswith(b"GIF8")
    monkeypatch.setattr(Corridor, "render", lambda self: None)
    assert cli.main(command) == 1
    assert "error: gif: rendering failed" in capsys.readouterr().err


@pytest.mark.parametrize("error", [AttributeError, ImportError, RuntimeError, OSError])
def test_a_gif_without_a_renderer_is_refused_before_anything_is_played(
    error, tmp_path, monkeypatch
):
    from helpers.tiny import Corridor, corridor_data, options

    from applications.rl import TrainConfig, train

    def importing(name):
        assert name == "mujoco"
        raise error("no EGL")

    def play(*_):
        raise AssertionError("played")

    config = TrainConfig(
        "pointmaze-medium-navigate-singletask-task1-v0",
        agent="bc",
        options=options("bc"),
        offline_steps=1,
        eval_every=0,
        batch_size=8,
        folder=tmp_path,
    )
    train(config, environment=Corridor, dataset=corridor_data())
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr("applications.rl.evaluation.command.evaluate_trained", play)
    monkeypatch.setattr("applications.rl.evaluation.command.importlib.import_module", importing)
    # the commands themselves are imported by the same function, so main() is left out
    with pytest.raises(RunError, match=rf"gif: rendering failed \({error.__name__}: no EGL\).*EGL"):
        show_evaluate(EvaluateConfig((tmp_path / "seed0",), gif=tmp_path / "a.gif"))


def test_an_environment_that_gymnasium_cannot_make_is_one_line(capsys, monkeypatch):
    import gymnasium

    def make(*_, **__):
        raise gymnasium.error.DependencyNotInstalled("Box2D is not installed")

    monkeypatch.setattr(gymnasium, "make", make)
    command = f"train --task gym:Pendulum-v1 --no-use-data --offline-steps 0 {SIZES}"
    assert cli.main([*command.split(), "--online-steps", "5000"]) == 1
    message = "error: task 'gym:Pendulum-v1' cannot be made: Box2D is not installed\n"
    assert capsys.readouterr().err.endswith(message)
