"""One behaviour for all agents: weights, normaliser, freezing, checks, resumes, and records."""

import json
import re
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from helpers import agent_problems as problems
from helpers.killed_rl import configuration
from helpers.same_run import assert_same_run
from helpers.tiny import Corridor, corridor_data, options

from applications.rl import AGENTS, Agent, AgentConfig, FlowActor, load_agent, make_agent, train
from applications.rl.agents.behaviour import freeze, has_behaviour, start_from
from applications.rl.sweep import worker
from applications.rl.sweep.folders import is_finished, is_other
from applications.rl.sweep.plan import make_plan
from applications.rl.training.behaviour import Stored
from flows import Callback, StopTraining
from flows.training import CheckpointError

torch.set_num_threads(1)

BRIEF = {"offline_steps": 6, "online_steps": 0, "eval_every": 0, "checkpoint_every": 3}
SIZES = {"horizon": 3, "discount": 0.9, "observation_scale": 2.0}
WITH_BEHAVIOUR = [name for name in AGENTS if name != "bc" and has_behaviour(name)]


def config_of(folder, agent="qam", **changes):
    """Options of a short training; those of the agent are among the changes."""
    known = options(agent, **SIZES)
    own = {name: changes.pop(name) for name in [*changes] if hasattr(known, name)}
    config = configuration(folder, BRIEF | {"resume": False}, agent=agent, **changes)
    return replace(config, options=replace(known, **own))


def fit(folder, agent="qam", *, data=None, callbacks=(), **changes):
    config = config_of(folder, agent, **changes)
    return train(config, environment=Corridor, dataset=data or corridor_data(), callbacks=callbacks)


class First(Callback):
    """Stops a training before its first update."""

    def on_start(self, trainer):
        raise StopTraining("before the first update")


@pytest.fixture(scope="module")
def cloned(tmp_path_factory):
    """A run of behaviour cloning on data of another mean and deviation."""
    data = corridor_data()
    shifted = replace(
        data,
        observations=3 * data.observations + 1,
        next_observations=3 * data.next_observations + 1,
    )
    (run,) = fit(tmp_path_factory.mktemp("bc"), "bc", offline_steps=30, data=shifted)
    return run


def same(a, b):
    """Whether two networks have equal weights."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- what an agent begins with --------------------------------------------------------------------


def test_the_agents_of_this_package_that_have_a_behaviour():
    assert {"qam", "qam-e", "qam-f", "bam", "fql", "ifql"} <= {*WITH_BEHAVIOUR}


@pytest.mark.parametrize("agent", WITH_BEHAVIOUR)
def test_every_agent_begins_with_the_behaviour(tmp_path, cloned, agent):
    (run,) = fit(tmp_path, agent, behaviour=cloned.folder, callbacks=[First()])
    fresh = make_agent(run.agent.config, 4, 2)
    assert same(run.agent.behaviour, cloned.agent.behaviour)
    for name in ("target_behaviour", "policy"):
        network = getattr(run.agent, name, None)
        if isinstance(network, FlowActor):
            assert same(network, cloned.agent.behaviour), name
    for name, network in run.agent.named_children():  # the rest is as ever
        if name not in ("behaviour", "target_behaviour") and not isinstance(network, FlowActor):
            assert same(network, fresh.get_submodule(name)), name
    for name in ("observation_mean", "observation_deviation"):
        assert torch.equal(getattr(run.agent, name), getattr(cloned.agent, name)), name
    assert not torch.equal(run.agent.observation_mean, torch.zeros(4))


@pytest.mark.parametrize("agent", ["qam", "qam-e", "qam-f", "bam"])
def test_the_tilt_begins_at_the_behaviour(agent):
    """Also where the policy is a correction, which then is zero; and nowhere else unasked."""
    trained = problems.make("bc", seed=3)
    state = trained.behaviour.state_dict()
    s = problems.batch().observations
    x, t = torch.randn(len(s), trained.chunk_dim, dtype=s.dtype), torch.tensor(0.3)
    cond = {"observation": s}
    for residual in (False, True):
        for target in (False, True):
            own = problems.make(agent, residual=residual, target_behaviour=target)
            start_from(own, state)
            expected = trained.behaviour(x, t, cond)
            for velocity in (own.flow.velocity, own.flow.acting_velocity):
                torch.testing.assert_close(velocity(x, t, cond), expected, rtol=0, atol=1e-15)
            assert same(own.policy, trained.behaviour) is not residual


def test_training_goes_on_from_it(tmp_path, cloned):
    (run,) = fit(tmp_path, behaviour=cloned.folder)
    for name in ("behaviour", "target_behaviour", "policy"):
        assert not same(run.agent.get_submodule(name), cloned.agent.behaviour), name


# --- frozen ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("agent", WITH_BEHAVIOUR)
def test_a_frozen_behaviour_stays_bit_by_bit_and_all_else_learns(tmp_path, cloned, agent):
    (run,) = fit(tmp_path, agent, behaviour=cloned.folder, freeze_behaviour=True)
    assert same(run.agent.behaviour, cloned.agent.behaviour)
    if getattr(run.agent, "target_behaviour", None) is not None:
        assert same(run.agent.target_behaviour, cloned.agent.behaviour)
    fresh = make_agent(run.agent.config, 4, 2)
    start_from(fresh, cloned.agent.behaviour.state_dict())
    for name, network in run.agent.named_children():
        if "behaviour" not in name and [*network.parameters()]:
            assert not same(network, fresh.get_submodule(name)), name


@pytest.mark.parametrize("agent", WITH_BEHAVIOUR)
def test_the_loss_of_a_frozen_behaviour_has_no_gradient(agent):
    own = problems.make(agent)
    freeze(own)
    terms = own.losses(problems.batch(), problems.noise(own))
    assert not terms["behaviour"][0].requires_grad
    own.loss(problems.batch(), problems.noise(own))[0].backward()
    for name, parameter in own.named_parameters():
        held = name.startswith(("behaviour.", "target_"))
        assert (parameter.grad is None) is held, name


def test_gradients_of_the_rest_are_those_of_training_everything():
    free, held = problems.make("qam"), problems.make("qam")
    freeze(held)
    for own in (free, held):
        own.loss(problems.batch(), problems.noise(own))[0].backward()
    for (name, a), b in zip(free.named_parameters(), held.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=0, msg=name)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("agent", "changes", "message"),
    [
        ("qam", {"hidden": (8,)}, r"has hidden=\(16, 16\), as the agent must have, got hidden=\(8"),
        ("qam", {"horizon": 5}, r"has horizon=3, as the agent must have, got horizon=5"),
        ("fql", {"action_chunking": False}, r"has action_chunking=True, .* got .*chunking=False"),
        ("qam", {"actor_layer_norm": True}, r"has actor_layer_norm=False, .* got .*norm=True"),
        ("qam", {"observation_scale": 0.0}, r"has observation_scale=2.0, .* got .*scale=0.0"),
        ("qam", {"task": "ring"}, r"has environment='corridor', .* got environment='ring'"),
        (
            "qam",
            {"hidden": (8,), "horizon": 5},
            r"has hidden=\(16, 16\), horizon=3, .* got hidden=\(8,\), horizon=5",
        ),
        ("bc", {"freeze_behaviour": True}, "freeze_behaviour must be off with agent 'bc', which"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_deleted(
    tmp_path, cloned, agent, changes, message
):
    (old,) = fit(tmp_path, "qam")
    before = {path.name: path.read_bytes() for path in old.folder.iterdir()}
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, agent, behaviour=cloned.folder, overwrite=True, **changes)
    assert {path.name: path.read_bytes() for path in old.folder.iterdir()} == before


def test_data_of_other_sizes_are_refused(tmp_path, cloned):
    data = corridor_data()
    wide = replace(
        data,
        observations=np.tile(data.observations, 2),
        next_observations=np.tile(data.next_observations, 2),
    )
    message = "has observation_dim=4, as the agent must have, got observation_dim=8"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, behaviour=cloned.folder, data=wide)
    assert not [*tmp_path.iterdir()]


def test_an_environment_of_other_sizes_is_refused_where_there_are_no_data(tmp_path, cloned):
    class Wide(Corridor):
        action_space = type(Corridor.action_space)(-1.0, 1.0, (3,), np.float32)

    config = config_of(
        tmp_path,
        behaviour=cloned.folder,
        use_data=False,
        offline_steps=0,
        online_steps=20,
        start_training=10,
    )
    with pytest.raises(ValueError, match="has action_dim=2, as the agent must have, got action_di"):
        train(config, environment=Wide)
    assert not [*tmp_path.rglob("*.pt")]


def test_single_actions_do_not_ask_for_a_horizon(tmp_path):
    changes = {"action_chunking": False, "callbacks": [First()]}
    (single,) = fit(tmp_path / "bc", "bc", **changes)
    (run,) = fit(tmp_path / "qam", behaviour=single.folder, horizon=2, **changes)
    assert same(run.agent.policy, single.agent.behaviour)


def test_other_data_of_the_environment_are_warned_of(cloned):
    stored = Stored.load(str(cloned.folder))
    stored = replace(stored, identity={**stored.identity, "task": "cube-single-play-v0"})
    given = options("qam", **SIZES)
    with pytest.warns(UserWarning, match="was fitted to cube-single-play-v0, the agent learns fro"):
        stored.check(given, "cube-single-noisy-singletask-task1-v0", None)
    stored.check(given, "cube-single-play-singletask-task2-v0", None)  # warnings are errors


def test_names_that_are_no_behaviour(tmp_path, cloned):
    (tmp_path / "empty").mkdir()
    below = re.escape(str(cloned.folder))
    for named, error, message in (
        (tmp_path / "none", FileNotFoundError, "behaviour: there is no '.*none'"),
        (tmp_path / "empty", FileNotFoundError, "behaviour: there is no '.*checkpoint.pt'"),
        (cloned.folder.parent, FileNotFoundError, f"name a run below it, such as {below}"),
        ("", ValueError, "behaviour must name the folder of a run"),
        (None, ValueError, "freeze_behaviour must be off where no behaviour is given, got True"),
    ):
        with pytest.raises(error, match=message):
            fit(tmp_path / "run", behaviour=named, freeze_behaviour=True)
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="damaged"):
        fit(tmp_path / "run", behaviour=tmp_path)


def test_an_agent_without_a_behaviour_is_refused(tmp_path, cloned):
    from helpers.own_agent import Regression, RegressionConfig

    assert not has_behaviour(Regression)
    own = RegressionConfig(hidden=(16, 16), **SIZES)
    config = replace(config_of(tmp_path, behaviour=cloned.folder), agent="", options=own)
    with pytest.raises(ValueError, match=r"behaviour must not be given with agent '.*Regression'"):
        train(config, environment=Corridor, dataset=corridor_data())
    (run,) = train(replace(config, behaviour=None), environment=Corridor, dataset=corridor_data())
    with pytest.raises(ValueError, match=r"such as one of bc, got .* of agent '.*Regression', whi"):
        fit(tmp_path / "qam", behaviour=run.folder)


# --- executions, resumes, records -----------------------------------------------------------------


class Stop(Callback):
    """Ends the process, as far as Python can, after four updates."""

    def on_step(self, trainer, iteration, metrics):
        if iteration == 4:
            raise KeyboardInterrupt


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.slow
def test_stacked_seeds_are_what_each_is_alone(tmp_path, cloned, frozen):
    given = {"behaviour": cloned.folder, "freeze_behaviour": frozen, "seeds": (0, 1)}
    given |= {"eval_every": 6}
    alone = fit(tmp_path / "alone", stacked=1, **given)
    for run in fit(tmp_path / "stacked", stacked=2, **given):
        assert_same_run(run.folder, alone[run.seed].folder)
        assert same(run.agent.behaviour, cloned.agent.behaviour) is frozen


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.slow
def test_a_resume_needs_no_behaviour_and_ends_the_same(tmp_path, cloned, frozen):
    source = tmp_path / "bc" / "seed0"
    shutil.copytree(cloned.folder, source)
    given = {"behaviour": source, "freeze_behaviour": frozen}
    (whole,) = fit(tmp_path / "whole", **given)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", callbacks=[Stop()], **given)
    shutil.rmtree(source)
    (run,) = fit(tmp_path / "killed", resume=True, **given)
    assert same(run.agent, whole.agent)
    assert same(run.agent.behaviour, cloned.agent.behaviour) is frozen
    for changes, error in (
        ({"freeze_behaviour": not frozen}, "freeze_behaviour"),
        ({"behaviour": None, "freeze_behaviour": False}, "behaviour"),
        ({"behaviour": cloned.folder.parent / "moved"}, "there is no"),
    ):
        with pytest.raises((CheckpointError, FileNotFoundError), match=error):
            fit(tmp_path / "killed", resume=True, **given | changes)
    with pytest.raises(FileNotFoundError, match="behaviour: there is no"):
        fit(tmp_path / "new", resume=True, **given)


@pytest.mark.slow
def test_a_run_says_where_it_came_from(tmp_path, cloned):
    given = {"behaviour": cloned.folder, "freeze_behaviour": True}
    (run,) = fit(tmp_path / "one", **given)
    (other,) = fit(tmp_path / "two", "fql", **given)
    told = [json.loads((r.folder / "config.json").read_text()) for r in (run, other)]
    assert [t["behaviour"] for t in told] == [str(cloned.folder)] * 2
    assert [t["freeze_behaviour"] for t in told] == [True, True]
    digests = {t["behaviour_digest"] for t in told}
    digests |= {load_agent(r.folder).identity["behaviour_digest"] for r in (run, other)}
    digests.add(Stored.load(str(run.folder)).facts["behaviour_digest"])  # frozen: still the same
    assert len(digests) == 1
    (free,) = fit(tmp_path / "three", behaviour=cloned.folder)
    assert Stored.load(str(free.folder)).facts["behaviour_digest"] not in digests
    (plain,) = fit(tmp_path / "four")
    assert "behaviour_digest" not in json.loads((plain.folder / "config.json").read_text())
    assert "freeze_behaviour" not in load_agent(plain.folder).identity  # so older runs resume


def test_each_seed_and_task_may_have_its_own(tmp_path):
    fit(tmp_path / "corridor" / "bc", "bc", seeds=(0, 1))
    named = tmp_path / "{task}" / "bc" / "seed{seed}"
    for run in fit(tmp_path / "qam", behaviour=named, seeds=(0, 1), callbacks=[First()]):
        source = load_agent(tmp_path / "corridor" / "bc" / f"seed{run.seed}")
        assert same(run.agent.policy, source.agent.behaviour)


# --- sweeps ---------------------------------------------------------------------------------------

TASK = "gym:Pendulum-v1"


def planned(folder, named, **changes):
    config = config_of(folder, behaviour=named, resume=True, options=None, **changes)
    return make_plan(
        replace(config, options=None),
        tasks=[TASK],
        agents=["qam", "helpers.own_agent:Regression"],
        seeds=[0],
        seeds_per_job=1,
        folder=folder,
    )


def test_in_a_sweep(tmp_path):
    """By the folder of each task; an agent without a behaviour is trained as ever."""
    named = tmp_path / "{task}" / "bc" / "seed0"
    with pytest.raises(FileNotFoundError, match=r"behaviour: there is no '.*gym-Pendulum-v1/bc"):
        planned(tmp_path, named)

    def train_tiny(config):
        own = options("qam", **SIZES) if config.agent == "qam" else config.options
        return train(replace(config, options=own), environment=Corridor, dataset=corridor_data())

    fit(tmp_path / "gym-Pendulum-v1" / "bc", "bc", task=TASK)
    first, second = planned(tmp_path, named, freeze_behaviour=True).jobs
    assert (first.config.behaviour, second.config.behaviour) == (str(named), None)
    assert (first.config.freeze_behaviour, second.config.freeze_behaviour) == (True, False)
    assert worker.work(first, "one", train_tiny) == {}
    source = load_agent(tmp_path / "gym-Pendulum-v1" / "bc" / "seed0").agent
    assert same(load_agent(first.runs[0].folder).agent.behaviour, source.behaviour)
    assert is_finished(first.runs[0], first.config)
    free = planned(tmp_path, named).jobs[0]
    assert not is_finished(free.runs[0], free.config)
    assert is_other(free.runs[0], free.config)
    shutil.rmtree(tmp_path / "gym-Pendulum-v1" / "bc")
    planned(tmp_path, named, freeze_behaviour=True)  # which is finished, and needs none


# --- agents of one's own --------------------------------------------------------------------------


@dataclass(frozen=True)
class OddConfig(AgentConfig):
    """Options of Odd."""


class Odd(Agent):
    """An agent whose behaviour flow has another width than its options say."""

    config_class = OddConfig
    noise_shapes = act_shapes = losses = chunks = None

    def __init__(self, config, observation_dim, action_dim):
        super().__init__(config, observation_dim, action_dim)
        self.behaviour = FlowActor(observation_dim, self.chunk_dim, hidden=(5, 5))


def test_an_architecture_of_ones_own_is_refused(tmp_path, cloned):
    own = OddConfig(hidden=(16, 16), **SIZES)
    config = replace(config_of(tmp_path, behaviour=cloned.folder), agent="", options=own)
    with pytest.raises(ValueError, match=r"behaviour .* does not fit the agent: .*size mismatch"):
        train(config, environment=Corridor, dataset=corridor_data())
    assert not [*tmp_path.iterdir()]
