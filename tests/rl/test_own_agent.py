"""An agent from outside the package: by object, by ``module:Name``, in every command."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from helpers import own_agent
from helpers.own_agent import Regression, RegressionConfig
from helpers.tiny import Corridor, corridor_data

from applications.rl import (
    AGENTS,
    Agent,
    AgentConfig,
    ExportConfig,
    QAMConfig,
    TrainConfig,
    agent_name,
    find_agent,
    find_task,
    load_agent,
    make_agent,
    preset,
    run_export,
    train,
)
from applications.rl.agents import UntrustedAgentError
from applications.rl.report.learning_curves import agent_color
from applications.rl.sweep import worker
from applications.rl.sweep.plan import make_plan
from flows.training import CheckpointError

NAME = "helpers.own_agent:Regression"
SMALL = RegressionConfig(hidden=(8,), horizon=2)
TASK = "pointmaze-medium-navigate-singletask-task1-v0"
BRIEF = {"offline_steps": 3, "eval_every": 0, "batch_size": 8, "threads": 1}


def test_an_agent_is_found_by_name_class_and_options():
    for agent in (NAME, Regression, SMALL):
        assert find_agent(agent) is Regression
        assert agent_name(agent) == NAME
    assert agent_name(QAMConfig()) == "qam"
    assert {agent_name(agent) for agent in AGENTS.values()} == set(AGENTS)
    assert make_agent(SMALL, 3, 2).config == SMALL
    assert make_agent(NAME, 3, 2).config == RegressionConfig()


def test_presets_take_what_the_agent_says_of_a_domain():
    small = preset(NAME, find_task(TASK), "small")
    assert (small.jitter, small.hidden, small.horizon) == (0.05, (128, 128), 10)
    assert preset(Regression, find_task(TASK)).jitter == 0


def test_its_colour_is_its_own():
    assert agent_color(f"{NAME} with words") == "#a3d977"
    assert agent_color("elsewhere:Agent") is None
    assert agent_color("QAM") == AGENTS["qam"].color


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sac", r"agent must be one of bc, .*, or module:Name of one of your own, got 'sac'"),
        ("no.such:Agent", r"there is no module 'no.such' for 'no.such:Agent'"),
        ("helpers.own_agent:Other", "helpers.own_agent has no subclass of Agent named 'Other'"),
        ("helpers.own_agent:torch", "has no subclass of Agent named 'torch'"),
    ],
)
def test_what_is_no_agent_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        find_agent(name)


def test_a_configuration_belongs_to_one_agent():
    with pytest.raises(TypeError, match="config_class must be a subclass of AgentConfig"):
        type("Nameless", (Agent,), {})
    for config_class in (AgentConfig, RegressionConfig):
        with pytest.raises(TypeError, match=r"Second.config_class must be a class of its own"):
            type("Second", (Agent,), {"config_class": config_class})


def test_a_module_is_not_imported_where_only_a_file_names_it():
    with pytest.raises(UntrustedAgentError, match="its module is not imported"):
        find_agent("antigravity:Agent", importing=False)
    assert "antigravity" not in sys.modules
    assert find_agent(NAME, importing=False) is Regression


@pytest.mark.slow
def test_trained_by_its_options_alone(tmp_path):
    config = TrainConfig(task=TASK, options=SMALL, folder=tmp_path, **BRIEF)
    assert config.agent == NAME
    assert TrainConfig(task=TASK, options=SMALL).path.name == "helpers.own_agent-Regression"
    (run,) = train(config, environment=Corridor, dataset=corridor_data())
    loaded = load_agent(run.folder)
    assert (loaded.name, loaded.agent.config) == (NAME, SMALL)
    facts = run_export(ExportConfig(run.folder, repeats=1)).facts
    assert facts["agent"] == NAME


def test_a_checkpoint_of_an_agent_that_is_not_imported_is_refused(tmp_path, monkeypatch):
    config = TrainConfig(task=TASK, options=SMALL, folder=tmp_path, **BRIEF)
    (run,) = train(config, environment=Corridor, dataset=corridor_data())
    monkeypatch.delitem(sys.modules, "helpers.own_agent")
    with pytest.raises(CheckpointError, match=f"if you trust it, name it: --agent {NAME}"):
        load_agent(run.folder)
    assert "helpers.own_agent" not in sys.modules
    with pytest.raises(CheckpointError, match="if you trust it"):
        load_agent(run.folder, agent="qam")
    assert type(load_agent(run.folder, agent=Regression).agent) is Regression


def test_in_a_sweep(tmp_path):
    gymnasium.register("Corridor-v0", Corridor, max_episode_steps=12)
    data = corridor_data()
    names = ("observations", "actions", "rewards", "masks", "terminals", "next_observations")
    np.savez(tmp_path / "data.npz", **{name: getattr(data, name) for name in names})
    plan = make_plan(
        TrainConfig(task="", resume=True, data=tmp_path / "data.npz", **BRIEF),
        tasks=["gym:Corridor-v0"],
        agents=[NAME, "bc"],
        seeds=[0],
        seeds_per_job=1,
        folder=tmp_path,
    )
    assert worker.work(plan.jobs[0], "one", worker.train_task) == {}
    folder = tmp_path / "gym-Corridor-v0" / "helpers.own_agent-Regression" / "seed0"
    assert load_agent(folder).name == NAME


@pytest.mark.slow
def test_by_the_command_line_in_fresh_processes(tmp_path):
    """The module of the agent lies in the working folder, and notes each time it is imported."""
    note = "from pathlib import Path\n\nPath('imported').touch()\n"
    (tmp_path / "mine.py").write_text(Path(own_agent.__file__).read_text() + note)
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}

    def run(*words):
        (tmp_path / "imported").unlink(missing_ok=True)
        return subprocess.run(
            [sys.executable, "-m", "applications.rl", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    own = ("--agent", "mine:Regression")
    brief = "--offline-steps 0 --no-use-data --online-steps 20 --start-training 16 --batch-size 8"
    brief += " --hidden 8 --horizon 2 --eval-every 10 --eval-episodes 1 --folder run --threads 1"
    brief += " --jitter 0.1 --background-eval"
    done = run("train", "--task", "gym:Pendulum-v1", *own, *brief.split())
    assert done.returncode == 0, done.stderr
    assert "evaluate run/* --agent mine:Regression" in done.stdout
    done = run("evaluate", "run", "--episodes", "1")
    assert done.returncode == 1
    assert "its module is not imported" in done.stderr
    assert not (tmp_path / "imported").exists()
    done = run("evaluate", "run", "--episodes", "1", *own)
    assert done.returncode == 0, done.stderr
    assert "mine:Regression on gym:Pendulum-v1, 5 updates" in done.stdout
