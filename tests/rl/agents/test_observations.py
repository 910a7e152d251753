"""Scaled observations: an agent sees exactly what its raw twin sees of encoded data."""

import pytest
import torch
from helpers.agent_problems import OBS, B, batch, make, noise

from applications.rl.agents import AGENTS


def spread():
    generator = torch.Generator().manual_seed(5)
    data = torch.randn(400, OBS, generator=generator, dtype=torch.float64)
    data = 3 * data * torch.arange(1.0, OBS + 1) + 7
    data[:, 2] = 4.0  # a component that does not vary
    return data


@pytest.mark.parametrize("name", AGENTS)
def test_a_scaled_agent_is_its_raw_twin_on_encoded_observations(name):
    data, raw = spread(), make(name)
    scaled = make(name, observation_scale=2.5)
    scaled.fit_normalizer(data)
    by_hand = (
        2.5
        * (data - data.mean(0))
        / torch.where(data.std(0, correction=0) > 0, data.std(0, correction=0), 1.0)
    )
    torch.testing.assert_close(scaled.normalize(data), by_hand)
    own = batch()._replace(observations=data[:B], next_observations=data[B : 2 * B])
    seen = own._replace(observations=by_hand[:B], next_observations=by_hand[B : 2 * B])
    for one, other in zip(
        (
            scaled.loss(own, noise(scaled))[0],
            scaled.act(data[:B], torch.Generator().manual_seed(0)),
        ),
        (raw.loss(seen, noise(raw))[0], raw.act(by_hand[:B], torch.Generator().manual_seed(0))),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_statistics_travel_with_the_weights_and_leave_raw_agents_alone():
    agent, other = make("bc", observation_scale=1.0), make("bc", seed=1, observation_scale=1.0)
    agent.fit_normalizer(spread())
    other.load_state_dict(agent.state_dict())
    torch.testing.assert_close(other.normalize(spread()), agent.normalize(spread()))
    raw = make("bc")
    raw.fit_normalizer(spread())
    assert raw.normalize(spread()).equal(spread())
