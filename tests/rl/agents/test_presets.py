"""Presets against the published table, typed in once more by domain instead of by option."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest

from applications.rl.agents import AGENTS, make_agent
from applications.rl.agents.domains import DOMAINS, NEAREST
from applications.rl.agents.presets import RECIPES, SIZES, preset
from applications.rl.environments.tasks import ENVIRONMENTS, find_task

# qam τ; qam-e τ, scale; qam-f τ, α; fql α; bam τ; ifql κ; rql α, κ; fawac τ; fbrac α;
# qsm τ, α; dac α
TABLE = {
    "puzzle-3x3": (3, 1, 0.1, 3, 0, 300, 10, 0.95, 1, 0.7, 0.8, 0.03, 10, 30, 1),
    "scene": (1, 1, 0, 1, 300, 300, 10, 0.9, 3, 0.7, 6.4, 100, 3, 30, 1),
    "cube-double": (1, 1, 0, 1, 0, 300, 10, 0.9, 10, 0.9, 0.8, 0.1, 1, 10, 3),
    "antmaze-large": (10, 1, 0.1, 3, 30, 3, 30, 0.9, 0.1, 0.5, 6.4, 0.1, 10, 10, 0.3),
    "humanoidmaze-medium": (3, 3, 0.1, 1, 30, 30, 10, 0.7, 0.3, 0.5, 6.4, 30, 10, 30, 1),
    "cube-triple": (3, 3, 0.1, 10, 300, 30, 30, 0.95, 1, 0.9, 0.8, 0.03, 10, 10, 0.3),
    "cube-quadruple": (1, 3, 0.1, 0.3, 30, 100, 10, 0.95, 1, 0.7, 0.8, 1, 1, 10, 1),
    "puzzle-4x4": (30, 0.1, 0.9, 3, 3, 1, 30, 0.9, 1, 0.9, 0.8, 0.3, 10, 1, 1),
    "antmaze-giant": (3, 10, 0.1, 3, 30, 3, 30, 0.8, 0.1, 0.5, 0.8, 0.1, 10, 10, 0.3),
    "humanoidmaze-large": (3, 3, 0.1, 0.3, 30, 30, 30, 0.8, 0.3, 0.5, 0.8, 10, 10, 30, 0.3),
}


def task(domain, horizon=5, discount=0.99):
    return SimpleNamespace(domain=domain, horizon=horizon, discount=discount)


def test_every_domain_of_the_table():
    assert set(TABLE) == set(DOMAINS)
    for domain, row in TABLE.items():
        configs = {name: preset(name, task(domain)) for name in AGENTS}
        found = (
            configs["qam"].inverse_temperature,
            configs["qam-e"].inverse_temperature,
            configs["qam-e"].edit_scale,
            configs["qam-f"].inverse_temperature,
            configs["qam-f"].alpha,
            configs["fql"].alpha,
            configs["bam"].inverse_temperature,
            configs["ifql"].expectile,
            configs["rql"].alpha,
            configs["rql"].expectile,
            configs["fawac"].inverse_temperature,
            configs["fbrac"].alpha,
            configs["qsm"].inverse_temperature,
            configs["qsm"].alpha,
            configs["dac"].alpha,
        )
        assert found == row, domain
        for name, config in configs.items():
            assert type(config) is AGENTS[name].config_class
            assert name == "bc" or config.rho == (0.0 if "humanoid" in domain else 0.5)


# trqam ε, γ; sqam c, γ
TRUST_REGIONS = {
    "puzzle-3x3": (1, 0.995, 0.3, 0.995),
    "scene": (1, 0.995, 0.3, 0.995),
    "cube-double": (1, 0.995, 0, 0.995),
    "antmaze-large": (1, 0.995, 0.3, 0.995),
    "humanoidmaze-medium": (1, 0.999, 0.3, 0.999),
    "cube-triple": (0.5, 0.995, 0.3, 0.995),
    "cube-quadruple": (1, 0.995, 0.3, 0.995),
    "puzzle-4x4": (2, 0.995, 0.3, 0.995),
    "antmaze-giant": (1, 0.995, 0.3, 0.995),
    "humanoidmaze-large": (1, 0.999, 0.3, 0.999),
}


def test_every_domain_of_the_trust_regions():
    assert set(TRUST_REGIONS) == set(DOMAINS)
    for domain, row in TRUST_REGIONS.items():
        trqam, sqam = (preset(name, task(domain)) for name in ("trqam", "sqam"))
        found = (trqam.kl_budget, trqam.discount, sqam.value_penalty, sqam.discount)
        assert found == row, domain
        assert (sqam.kl_budget, sqam.adjoint, trqam.adjoint) == (0.5, "scalar", "lean")
        assert trqam.value_penalty == 0
        assert trqam.inverse_temperature == sqam.inverse_temperature == 1


# Agents that are guided, at τ = 10: cgql ϑ; cgql-mse ϑ, c; cgql-linex ϑ, c
GUIDED = {
    "puzzle-3x3": (0.1, 0.1, 0.1, 0.1, 0.001),
    "scene": (0.1, 0.1, 0.1, 0.1, 0.1),
    "cube-double": (0.01, 0.01, 0.001, 0.01, 0.001),
    "antmaze-large": (0.1, 0.1, 0.1, 0.1, 0.001),
    "humanoidmaze-medium": (0.01, 0.1, 0.1, 0.1, 0.1),
    "cube-triple": (0.1, 0.1, 0.001, 0.1, 0.001),
    "cube-quadruple": (0.1, 0.01, 0.1, 0.01, 0.1),
    "puzzle-4x4": (0.1, 1, 0.001, 1, 0.001),
    "antmaze-giant": (0.1, 0.1, 0.001, 0.1, 0.001),
    "humanoidmaze-large": (0.01, 0.1, 0.1, 0.1, 0.1),
}


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_of_the_table_of_guided_agents(domain):
    mse, linex = (preset(f"cgql-{loss}", task(domain)) for loss in ("mse", "linex"))
    simple = preset("cgql", task(domain))
    found = (simple.guidance, mse.guidance, mse.noisy_weight, linex.guidance, linex.noisy_weight)
    assert found == GUIDED[domain]
    assert {config.inverse_temperature for config in (simple, mse, linex)} == {10.0}


# Agents with a Gaussian actor: fedit scale; dsrl scale; rebrac α, noise; rlpd imitation
GAUSSIAN = {
    "puzzle-3x3": (0.2, 1, 0.1, 0, 0.01),
    "scene": (0.2, 0.4, 0.03, 0, 0.3),
    "cube-double": (0.2, 1, 0.01, 0, 0.1),
    "antmaze-large": (0.2, 0.8, 0.01, 0, 0),
    "humanoidmaze-medium": (0.5, 0.6, 0.01, 0, 0.03),
    "cube-triple": (0.3, 1.4, 0.01, 0.2, 0),
    "cube-quadruple": (0.4, 1.4, 0.01, 0.2, 0),
    "puzzle-4x4": (0.8, 1, 0.01, 0.2, 0),
    "antmaze-giant": (0.3, 1.2, 0.01, 0, 0.01),
    "humanoidmaze-large": (0.1, 0.8, 0.01, 0.1, 0),
}


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_of_the_table_of_gaussian_actors(domain):
    configs = {name: preset(name, task(domain)) for name in AGENTS}
    found = (
        configs["fedit"].edit_scale,
        configs["dsrl"].latent_scale,
        configs["rebrac"].alpha,
        configs["rebrac"].action_noise,
        configs["rlpd"].bc_alpha,
    )
    assert found == GAUSSIAN[domain]


@pytest.mark.parametrize(
    ("name", "horizon", "discount"),
    [
        ("scene-sparse-play-singletask-task1-v0", 5, 0.99),
        ("cube-single-play-singletask-task1-v0", 5, 0.99),
        ("antmaze-giant-navigate-singletask-v0", 1, 0.995),
        ("humanoidmaze-medium-navigate-singletask-v0", 1, 0.995),
        ("pointmaze-medium-navigate-singletask-task1-v0", 1, 0.99),
    ],
)
def test_horizon_and_discount_are_those_of_the_task(name, horizon, discount):
    config = preset("qam", find_task(name))
    assert (config.horizon, config.discount) == (horizon, discount)


def test_every_environment_has_values_or_a_neighbour_that_has():
    for environment in ENVIRONMENTS:
        assert (environment in DOMAINS) != (environment in NEAREST)
    assert set(NEAREST.values()) <= set(DOMAINS)
    near = preset("qam", task("cube-single"))
    assert near == preset("qam", task("cube-double"))


@pytest.mark.parametrize("name", AGENTS)
def test_other_domains_take_the_general_defaults(name):
    config = AGENTS[name].config_class(horizon=4, discount=0.98)
    assert preset(name, task("gym", 4, 0.98)) == config


@pytest.mark.parametrize("name", AGENTS)
def test_small_differs_in_size_only(name):
    small, full = (preset(name, task("scene"), size) for size in ("small", "published"))
    different = {key for key, value in asdict(small).items() if asdict(full)[key] != value}
    assert different == set(SIZES["small"]) - ({"critics"} if name == "bc" else set())
    assert make_agent(small, 4, 2).chunk_dim == 10


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"agent must be one of .*, got 'sac'"):
        preset("sac", task("scene"))
    with pytest.raises(ValueError, match="preset must be one of published, small, got 'tiny'"):
        preset("qam", task("scene"), "tiny")
    for agent in AGENTS.values():
        assert set(agent.published) in (set(), set(DOMAINS))


def test_recipes_are_of_options_that_exist_and_reach_the_agents():
    for domain, shared in RECIPES.items():
        assert domain in NEAREST  # none of the tuned ones
        for name, agent in AGENTS.items():
            config, own = preset(name, task(domain), "small"), agent.small.get(domain, {})
            for option, value in {**shared, **own}.items():
                assert getattr(config, option, value) == value
            assert set(own) <= set(asdict(config))
        assert set(shared) <= set(asdict(preset("qam", task(domain))))
        assert preset("qam", task(domain)) == preset("qam", task(NEAREST[domain]))
    for agent in AGENTS.values():
        assert set(agent.small) <= set(RECIPES)
