"""A flow policy from outside the package as the behaviour of an agent."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from helpers import agent_problems as problems
from helpers import own_policies
from helpers.killed_rl import configuration
from helpers.own_policies import ActorVectorField, Policy, expert, toward
from helpers.same_run import assert_same_run
from helpers.tiny import Corridor, corridor_data, options

from applications.rl import ExportConfig, FlowActor, evaluate, load_agent, run_export, train
from applications.rl.agents.pretrained import PretrainedActor, check_actor, describe, put_in_place
from flows import Callback
from flows.testing import check_velocity_field
from flows.training import CheckpointError

torch.set_num_threads(1)

BRIEF = {"offline_steps": 6, "online_steps": 0, "eval_every": 0, "checkpoint_every": 3}
NAME = "helpers.own_policies:Policy"
EXACT = {"rtol": 0, "atol": 0}


def fit(folder, agent="qam", *, behaviour, callbacks=(), **changes):
    """Train in the corridor, frozen unless told otherwise."""
    known = options(agent, horizon=3, discount=0.9)
    own = {name: changes.pop(name) for name in [*changes] if hasattr(known, name)}
    changes = {"freeze_behaviour": True, "resume": False} | changes
    config = configuration(folder, BRIEF, agent=agent, behaviour=behaviour, **changes)
    config = replace(config, options=replace(known, **own))
    return train(config, environment=Corridor, dataset=corridor_data(), callbacks=callbacks)


def inputs():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 6, generator=generator)
    return x, torch.tensor(0.3), torch.randn(5, 4, generator=generator)


# --- what the agent sees --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        NAME,
        "helpers.own_policies:expert",
        "helpers.own_policies:ActorVectorField",
        Policy,
        Policy(),
        ActorVectorField(),
        expert,
        expert(),
    ],
    ids=describe,
)
@pytest.mark.parametrize("scale", [0.0, 7.0])
def test_a_policy_is_called_by_its_convention_at_raw_observations(source, scale):
    x, t, s = inputs()
    agent = problems.make("qam", dtype=torch.float32)
    object.__setattr__(agent.config, "observation_scale", scale)
    agent.observation_dim = 4
    agent.observation_mean = torch.tensor([1.0, -2.0, 0.0, 4.0])
    agent.observation_deviation = torch.tensor([0.5, 3.0, 1.0, 0.1])
    put_in_place(agent, PretrainedActor(source))
    seen, expected = agent.normalize(s), Policy()(x, t, {"observation": s})
    for flow in (agent.behaviour, agent.target_behaviour, agent.policy):
        found = flow(x, t, {"observation": seen})
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        check_velocity_field(flow, x, {"observation": seen})


def test_the_parts_are_copies_and_the_original_is_no_part():
    policy, agent = Policy(), problems.make("qam", dtype=torch.float32)
    put_in_place(agent, PretrainedActor(policy))
    weights = [policy.weight, agent.behaviour.field.weight]
    weights += [agent.target_behaviour.field.weight, agent.policy.field.weight]
    assert len({w.data_ptr() for w in weights}) == 4
    assert [w.requires_grad for w in weights] == [True, True, False, True]
    assert [name for name, _ in agent.behaviour.named_parameters()] == ["field.weight"]


def test_a_field_without_parameters_is_tilted_by_a_correction():
    x, t, _ = inputs()
    s = torch.randn(5, problems.OBS)
    agent = problems.make("qam", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"residual must be on with .*own_policies:toward, which"):
        put_in_place(agent, PretrainedActor(toward))
    agent = problems.make("qam", dtype=torch.float32, residual=True)
    put_in_place(agent, PretrainedActor(toward))
    assert isinstance(agent.policy, FlowActor)
    found = agent.flow.velocity(x, t, {"observation": s})
    torch.testing.assert_close(found, toward(x, t, {"observation": s}), **EXACT)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["qam", "qam-e", "qam-f", "bam", "fql", "ifql"])
def test_every_agent_tilts_it_and_leaves_it_alone(tmp_path, agent):
    (run,) = fit(tmp_path, agent, behaviour=NAME)
    torch.testing.assert_close(run.agent.behaviour.field.weight, Policy().weight, **EXACT)
    if hasattr(run.agent, "policy"):
        moved = (run.agent.policy.field.weight - Policy().weight).norm()
        assert 0 < moved < 0.1


def test_it_is_fitted_further_where_it_is_not_frozen(tmp_path):
    (run,) = fit(tmp_path, behaviour=NAME, freeze_behaviour=False)
    assert not torch.equal(run.agent.behaviour.field.weight, Policy().weight)


@pytest.mark.parametrize("kernel", ["moment_matched", "euler_published"])
def test_a_field_without_parameters_trains(tmp_path, kernel):
    (run,) = fit(tmp_path, behaviour=toward, residual=True, kernel=kernel)
    assert any(p.any() for p in run.agent.policy.mlp.layers[-1].parameters())


@pytest.mark.slow
@pytest.mark.parametrize("source", [NAME, "helpers.own_policies:expert"])
def test_stacked_seeds_are_what_each_is_alone(tmp_path, source):
    given = {"behaviour": source, "seeds": (0, 1), "eval_every": 6}
    alone = fit(tmp_path / "alone", stacked=1, **given)
    for run in fit(tmp_path / "stacked", stacked=2, **given):
        assert_same_run(run.folder, alone[run.seed].folder)


class Stop(Callback):
    """Ends the process, as far as Python can, after four updates."""

    def on_step(self, trainer, iteration, metrics):
        if iteration == 4:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_resume_ends_the_same(tmp_path):
    (whole,) = fit(tmp_path / "whole", behaviour=NAME)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", behaviour=NAME, callbacks=[Stop()])
    (run,) = fit(tmp_path / "killed", behaviour=NAME, resume=True)
    for a, b in zip(run.agent.parameters(), whole.agent.parameters(), strict=True):
        assert torch.equal(a, b)
    for other in (Policy(seed=1), "helpers.own_policies:ActorVectorField"):
        with pytest.raises(CheckpointError, match="behaviour"):
            fit(tmp_path / "killed", behaviour=other, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("source", [NAME, Policy()], ids=describe)
def test_a_background_evaluation_plays_the_same(tmp_path, source):
    given = {"behaviour": source, "eval_every": 3}
    (here,) = fit(tmp_path / "here", **given)
    (there,) = fit(tmp_path / "there", background_eval=True, **given)
    assert here.evaluation == there.evaluation


# --- reading it back ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_read_back_and_imports_nothing_unasked(tmp_path, monkeypatch):
    (run,) = fit(tmp_path, behaviour=NAME, eval_every=6)
    told = json.loads((run.folder / "config.json").read_text())
    assert told["behaviour"] == told["behaviour_module"] == NAME
    loaded = load_agent(run.folder).agent
    for a, b in zip(loaded.parameters(), run.agent.parameters(), strict=True):
        assert torch.equal(a, b)
    assert evaluate(loaded, Corridor, episodes=2, seed=0).episodes == 2
    monkeypatch.delitem(sys.modules, "helpers.own_policies")
    with pytest.raises(CheckpointError, match=f"if you trust it, name it: --behaviour {NAME}"):
        load_agent(run.folder)
    assert "helpers.own_policies" not in sys.modules
    facts = run_export(ExportConfig(run.folder, behaviour=NAME, repeats=1)).facts
    assert facts["largest_difference"] < 1e-6
    with pytest.raises(ValueError, match=f"whose behaviour is {NAME}: name that"):
        fit(tmp_path / "next", behaviour=run.folder)


def test_an_object_is_given_again(tmp_path):
    (run,) = fit(tmp_path, behaviour=Policy(seed=5))
    name = "an object of helpers.own_policies:Policy"
    assert json.loads((run.folder / "config.json").read_text())["behaviour"] == name
    with pytest.raises(CheckpointError, match="behaviour_digest"):  # the class is the same
        fit(tmp_path, behaviour=Policy(seed=6), resume=True, offline_steps=8)
    with pytest.raises(CheckpointError, match=f"the behaviour is {name}: give it again"):
        load_agent(run.folder)
    loaded = load_agent(run.folder, behaviour=Policy()).agent
    torch.testing.assert_close(loaded.behaviour.field.weight, Policy(seed=5).weight, **EXACT)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no.such:Policy", "behaviour: there is no module 'no.such'"),
        ("helpers.own_policies:other", "has no 'other'"),
        ("helpers.own_policies:number", "must be a velocity field .* got .*:number, a int"),
        ("helpers.own_policies:narrow", r"must take x \(3, 6\) .* got ValueError: .*shape"),
        ("helpers.own_policies:Noisy", r"without dropout .* got other velocities at"),
        (
            "helpers.own_policies:flat_time",
            r"must take x .* and \(3,\), .* got RuntimeError",
        ),
        ("helpers.own_policies:Counting", "must be a function .* got a changed field.seen"),
        ("helpers.own_policies:Detached", "must be differentiable in x, got a velocity without"),
        ("helpers.own_policies:two_conditions", "must take one condition, .* got prompt, state"),
        ("helpers.own_policies:toward", "residual must be on with behaviour .*toward"),
    ],
)
def test_what_is_no_policy_is_refused_before_any_work(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, behaviour=source)
    assert not [*tmp_path.iterdir()]


def test_times_that_broadcast_to_components_are_refused(tmp_path):
    """As many times as components: the shapes alone do not tell."""
    with pytest.raises(ValueError, match="got other velocities at t"):
        check_actor(PretrainedActor(own_policies.flat_time), 4, 3)


def test_a_policy_of_other_sizes_is_refused(tmp_path):
    message = r"Policy must take x \(3, 4\) .* and observations \(3, 4\), got RuntimeError"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, behaviour=NAME, horizon=2)


def test_files_hold_names_not_objects():
    config = configuration("x", BRIEF, behaviour=own_policies.Policy(), freeze_behaviour=True)
    assert config.plain["behaviour"] == "an object of helpers.own_policies:Policy"
    assert config.plain["freeze_behaviour"]
    assert configuration("x", BRIEF, behaviour=NAME).behaviour == NAME
