"""An agent explores in training mode, and is in evaluation mode wherever it acts otherwise."""

import pytest
from helpers.killed_rl import configuration
from helpers.tiny import Corridor, corridor_data, options

from applications.rl import EpisodeEvaluator, OnlineCollector, load_agent, train


@pytest.mark.slow
def test_an_agent_explores_in_training_mode_and_is_evaluated_in_evaluation_mode(
    tmp_path, monkeypatch
):
    seen = []
    step, play = OnlineCollector.step, EpisodeEvaluator._play

    def stepping(collector, agent, generator):
        seen.append(("explores", agent.training))
        return step(collector, agent, generator)

    def playing(evaluator, agent, *arguments):
        seen.append(("is evaluated", agent.training))
        return play(evaluator, agent, *arguments)

    monkeypatch.setattr(OnlineCollector, "step", stepping)
    monkeypatch.setattr(EpisodeEvaluator, "_play", playing)
    phases = {"offline_steps": 4, "online_steps": 24, "start_training": 16, "eval_every": 8}
    config = configuration(tmp_path, phases, agent="rql", options=options("rql", horizon=3))
    (run,) = train(config, environment=Corridor, dataset=corridor_data())
    assert set(seen) == {("explores", True), ("is evaluated", False)}
    assert not run.agent.training
    assert not load_agent(run.folder).agent.training
