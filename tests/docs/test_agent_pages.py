"""The page of an agent names every option it has and every metric it logs, with its default."""

import sys
from dataclasses import fields
from pathlib import Path

import pytest
from helpers.agent_problems import batch, make, noise

from applications.rl import AGENTS
from applications.rl.agents.losses import tilt_terms
from applications.rl.agents.options import AgentConfig, BestOfOptions, CriticOptions

SHARED = (AgentConfig, BestOfOptions, CriticOptions)
DOCS = Path(__file__).parents[2] / "docs" / "agents"


EXTENDED = {"qam-e": ["qam"], "qam-f": ["qam"], "trqam": ["qam"], "sqam": ["trqam", "qam"]}


def pages(name):
    """The overview, the agent's page, and those of the agents it extends."""
    names = ["README", name, *EXTENDED.get(name, [])]
    return "\n".join((DOCS / f"{page}.md").read_text(encoding="utf-8") for page in names)


@pytest.mark.parametrize("name", AGENTS)
def test_every_metric_and_option_is_explained(name):
    agent, text = make(name), pages(name)
    _, metrics = agent.loss(batch(), noise(agent))
    options = {field.name for field in fields(AGENTS[name].config_class)}
    missing = {key for key in metrics.keys() | options if f"`{key}`" not in text}
    assert not missing


@pytest.mark.parametrize("name", AGENTS)
def test_defaults_of_an_agents_own_options_are_those_said(name):
    config = AGENTS[name].config_class()
    own = {field.name for field in fields(config)} - {
        field.name
        for group in (AgentConfig, BestOfOptions, CriticOptions)
        for field in fields(group)
    }
    said = {}
    for line in pages(name).splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 5:
            said.setdefault(cells[1].strip("`"), []).append(cells[2].strip("`"))
    for option in own:
        value = getattr(config, option)
        word = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
        word = "none" if word is None else word
        expected = word if isinstance(word, str) else f"{word:g}".replace("-", "−")
        assert expected in said[option], option


def test_every_agent_has_a_page_and_no_page_lacks_an_agent():
    assert {path.stem for path in DOCS.glob("*.md")} == {"README", *AGENTS}


@pytest.mark.parametrize("name", AGENTS)
def test_the_page_names_the_losses_the_code_and_the_command(name):
    text, agent = (DOCS / f"{name}.md").read_text(encoding="utf-8"), AGENTS[name]
    own = sys.modules[agent.__module__]
    module = sys.modules[agent.losses.__module__]  # of another agent, where only options differ
    names = {*vars(module), *(tilt_terms.__code__.co_names if "tilt_terms" in vars(module) else ())}
    used = {word for word in names if word.endswith("_loss")}
    assert len(used) == len(make(name).losses(batch(), noise(make(name))))
    assert {word for word in used if f"`{word}`" not in text} == set()
    assert f"(../../{own.__name__.replace('.', '/')}.py)" in text
    assert f"python -m applications.rl train --agent {name} " in text
    assert (DOCS.parents[1] / agent.page) == DOCS / f"{name}.md"
