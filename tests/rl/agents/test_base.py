"""Every agent is a pure function of its noise, and its errors are clear."""

import copy
import math
from dataclasses import fields, replace

import pytest
import torch
from helpers.agent_problems import ACT, HORIZON, OBS, OPTIONS, B, batch, make, noise
from torch.utils._python_dispatch import TorchDispatchMode

from applications.rl import Uniform
from applications.rl.agents import AGENTS, find_agent, make_agent
from applications.rl.agents.losses import pessimistic
from applications.rl.agents.rollouts import condition, flow_action
from flows.sampling import sample

AGENT = pytest.mark.parametrize("name", OPTIONS)
WITH_CRITICS = pytest.mark.parametrize("name", [n for n in OPTIONS if n != "bc"])
KERNELS = ("euler_published", "euler_consistent", "ancestral_pair", "ancestral", "moment_matched")


def next_noise(agent, eps):
    """The noises of acting as an update has them for the next observations."""
    return {name: eps[NEXT.get(name, f"next_{name}")] for name in agent.act_shapes(B)}


NEXT = {"noise": "next_action_noise"}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@AGENT
def test_actions_and_losses_are_functions_of_their_noise(name):
    agent, data = make(name), batch()
    eps = noise(agent)
    first, second = agent.loss(data, eps)[0], agent.loss(data, eps)[0]
    assert torch.equal(first, second)
    assert not torch.equal(first, agent.loss(data, noise(agent, seed=1))[0])
    draw = agent.act_noise(B, gen())
    state = torch.get_rng_state()
    actions = agent.act(data.observations, draw)
    assert torch.equal(actions, agent.act(data.observations, draw))
    assert torch.equal(actions, agent.act(data.observations, gen()))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(actions, agent.act(data.observations, gen(1)))


@AGENT
def test_actions_have_the_shape_of_chunks_and_stay_in_the_box(name):
    agent = make(name, shake=1.0)
    s = 5 * torch.randn(40, OBS, dtype=torch.float64, generator=gen())
    actions = agent.act(s, gen())
    assert actions.shape == (40, HORIZON, ACT)
    assert not actions.requires_grad
    assert actions.abs().max() == 1
    single = make(name, action_chunking=False)
    assert single.act(s, gen()).shape == (40, 1, ACT)


@AGENT
def test_rows_of_a_batch_act_alone(name):
    agent = make(name)
    s = batch().observations
    draw = agent.act_noise(B, gen())
    together = agent.act(s, draw)
    for i in range(B):
        row = {key: value[i : i + 1] for key, value in draw.items()}
        torch.testing.assert_close(agent.act(s[i : i + 1], row)[0], together[i])


@AGENT
def test_chunks_are_time_major(name):
    agent = make(name)
    flat = agent.flatten(batch().actions)
    assert torch.equal(flat[:, :ACT], batch().actions[:, 0])
    assert torch.equal(flat[:, -ACT:], batch().actions[:, -1])
    single = make(name, action_chunking=False)
    assert torch.equal(single.flatten(batch().actions), batch().actions[:, 0])


@AGENT
def test_single_actions_are_learned_with_returns_over_the_horizon(name):
    agent, data = make(name, action_chunking=False, value_penalty=0.0), batch()
    loss, _ = agent.loss(data, noise(agent))
    assert loss.isfinite()
    if name not in ("bc", "ifql", "rql", "rebrac"):  # targets of other actions
        eps = noise(agent)
        next_actions = agent.chunks(data.next_observations, next_noise(agent, eps))
        q = agent.target_critic(data.next_observations, next_actions)
        y = data.rewards + 0.99**HORIZON * data.masks * pessimistic(q, agent.config.rho)
        values = agent.critic(data.observations, agent.flatten(data.actions))
        expected = (data.valid * (values - y) ** 2).mean()
        torch.testing.assert_close(agent.losses(data, eps)["critic"][0], expected)


@AGENT
def test_noise_has_the_laws_and_the_independence_it_should(name):
    agent = make(name, dtype=torch.float32)
    n = 4000
    drawn, shapes = agent.draw_noise(n, gen()), agent.noise_shapes(n)
    for key, value in drawn.items():
        assert value.dtype == torch.float32
        deviation, mean = value.std().item(), value.mean().item()
        uniform = isinstance(shapes[key], Uniform)
        error = 5 / math.sqrt(n)
        assert abs(mean - (0.5 if uniform else 0)) < error
        assert abs(deviation - (1 / math.sqrt(12) if uniform else 1)) < error
        assert not uniform or (value.min() >= 0 and value.max() < 1)
    # Start and steps of the chain, which the released code draws from one key, are independent.
    flat = [value.flatten(1)[:, 0] for key, value in drawn.items() if key != "sde_eps"]
    flat += list(drawn["sde_eps"][..., 0]) if "sde_eps" in drawn else []
    correlation = torch.corrcoef(torch.stack(flat)) - torch.eye(len(flat))
    assert correlation.abs().max() < 5 / math.sqrt(n)


@AGENT
def test_weights_depend_on_the_seed_alone(name):
    config = make(name).config
    state = torch.get_rng_state()
    first, second = (make_agent(config, OBS, ACT, seed=3) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    other = make_agent(config, OBS, ACT, seed=4)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
        if key.endswith("weight") and "norm" not in key:
            assert not torch.equal(value, other.state_dict()[key])


RATES = ("target_rate", "target_policy_rate")


@WITH_CRITICS
def test_target_copies_start_equal_and_follow_the_weights(name):
    rates = {key: 0.1 for key in RATES if hasattr(make(name).config, key)}
    agent = make(name, shake=0.0, **rates)
    names = [n for n, _ in agent.named_children() if n.startswith("target_")]
    pairs = [(getattr(agent, n.removeprefix("target_")), getattr(agent, n)) for n in names]
    assert pairs
    for network, target in pairs:
        for p, q in zip(network.parameters(), target.parameters(), strict=True):
            assert torch.equal(p, q)
            assert p.data_ptr() != q.data_ptr()
    with torch.no_grad():
        for p in agent.parameters():
            if p.requires_grad:
                p.add_(1.0)
    before = [copy.deepcopy(target) for _, target in pairs]
    for _ in range(agent.target_every):
        agent.update_targets()
    for (network, target), old in zip(pairs, before, strict=True):
        for p, q, r in zip(
            network.parameters(), target.parameters(), old.parameters(), strict=True
        ):
            torch.testing.assert_close(q, 0.1 * p + 0.9 * r)
            assert not q.requires_grad


class Operations(TorchDispatchMode):
    """Notes the operations that are performed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_target_networks_may_move_in_one_of_several_updates():
    """By the same operations in each, so that a CUDA graph of one update repeats as any other."""
    agent = make("rebrac", target_every=3)
    moved, recorded = [], []
    for update in range(1, 9):
        if update == 5:  # goes on from a checkpoint
            state, agent = agent.state_dict(), make("rebrac", seed=1, target_every=3)
            agent.load_state_dict(state)
        targets = [agent.target_critic, agent.target_actor]
        before = copy.deepcopy(targets)
        with Operations() as operations:
            agent.update_targets()
        recorded.append(operations.seen)
        same = [
            torch.equal(p, q)
            for target, old in zip(targets, before, strict=True)
            for p, q in zip(target.parameters(), old.parameters(), strict=True)
        ]
        assert all(same) or not any(same)
        moved += [] if all(same) else [update]
    assert moved == [3, 6]
    assert all(operations == recorded[0] for operations in recorded)


def test_the_policy_does_not_start_as_a_copy_of_the_behaviour():
    agent = make("qam", shake=0.0)
    assert not torch.equal(agent.policy.mlp.layers[0].weight, agent.behaviour.mlp.layers[0].weight)


@AGENT
def test_state_of_an_agent_is_all_it_is(name):
    agent, other = make(name, seed=1), make(name, seed=2)
    other.load_state_dict(agent.state_dict())
    eps = noise(agent)
    assert torch.equal(agent.loss(batch(), eps)[0], other.loss(batch(), eps)[0])
    clone = copy.deepcopy(agent)
    assert torch.equal(agent.loss(batch(), eps)[0], clone.loss(batch(), eps)[0])
    clone.update_targets()
    assert torch.equal(agent.loss(batch(), eps)[0], other.loss(batch(), eps)[0])


@pytest.mark.parametrize("name", [n for n in OPTIONS if hasattr(make(n).config, "best_of_n")])
def test_best_of_n_is_the_candidate_the_critics_rank_first(name):
    agent, s = make(name, best_of_n=5, shake=0.5), batch().observations
    draw = agent.act_noise(B, gen())
    assert {value.shape for value in draw.values()} == {(B, 5, agent.chunk_dim)}
    actions = agent.act(s, draw).flatten(1)
    picked = []
    for i in range(B):
        rows = s[i].expand(5, -1)
        with torch.no_grad():
            proposals = agent.propose(rows, {key: value[i] for key, value in draw.items()})
            values = agent.critic(rows, proposals)
        score = values.amin(0) if name == "ifql" else values.mean(0)
        picked.append(int(score.argmax()))
        torch.testing.assert_close(actions[i], proposals[picked[-1]])
    assert len(set(picked)) > 1


@WITH_CRITICS
def test_metrics_are_detached_scalars_of_the_two_kinds(name):
    agent = make(name)
    _, metrics = agent.loss(batch(), noise(agent))
    assert {"critic/loss", "critic/q_mean", "critic/q_min", "critic/q_max"} <= metrics.keys()
    for key, value in metrics.items():
        assert key.split("/")[0] in ("critic", "actor", "value")
        assert value.shape == ()
        assert not value.requires_grad
    assert metrics["critic/q_min"] < metrics["critic/q_mean"] < metrics["critic/q_max"]


class NoWaiting(TorchDispatchMode):
    """Fails on what would make the host wait for the device, or has a size only the data tell."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.FORBIDDEN), f"waits in {func}"
        return func(*args, **(kwargs or {}))


def cases_of_waiting():
    yield from ((name, {}) for name in OPTIONS)
    yield from (("qam", {"kernel": kernel}) for kernel in KERNELS[1:])
    yield "qam", {"residual": True, "best_of_n": 3, "target_behaviour": False}


@pytest.mark.parametrize(("name", "options"), cases_of_waiting(), ids=str)
def test_an_update_and_an_action_never_wait_for_the_device(name, options):
    agent, data = make(name, **options), batch()
    eps = noise(agent)
    draw = agent.act_noise(B, gen())
    with NoWaiting():
        agent.loss(data, eps)[0].backward()
        agent.update_targets()
        agent.act(data.observations, draw)
    with pytest.raises(AssertionError, match="waits in"), NoWaiting():
        float(data.rewards.sum())


@pytest.mark.parametrize("solver", ["euler", "ab2"])
def test_flow_action_is_the_core_sampler_clipped_at_the_end(solver):
    agent, s = make("bc", shake=0.5), batch().observations
    x = 2 * torch.randn(B, agent.chunk_dim, dtype=torch.float64, generator=gen())
    expected = sample(agent.behaviour, x, grid=7, method=solver, cond=condition(s))
    assert expected.abs().max() > 1
    actual = flow_action(agent.behaviour, s, x, 7, solver)
    torch.testing.assert_close(actual, expected.clamp(-1, 1))
    assert actual.requires_grad


def test_the_solver_is_an_option_of_acting():
    euler, ab2 = make("qam", shake=0.5), make("qam", shake=0.5, solver="ab2")
    draw = euler.act_noise(B, gen())
    s = batch().observations
    assert not torch.equal(euler.act(s, draw), ab2.act(s, draw))


def test_act_refuses_wrong_observations_and_noise():
    agent, s = make("qam-e"), batch().observations
    draw = agent.act_noise(B, gen())
    with pytest.raises(ValueError, match=r"observations must have shape \(B, 5\), got \(6, 4\)"):
        agent.act(s[:, :4], draw)
    with pytest.raises(ValueError, match=r"observations must have shape \(B, 5\), got \(5,\)"):
        agent.act(s[0], draw)
    with pytest.raises(ValueError, match=r"noise must hold 'edit_eps' .*, got \['noise'\]"):
        agent.act(s, {"noise": draw["noise"]})
    with pytest.raises(ValueError, match=r"of shape \(6, 1, 6\), got \(6, 6\)"):
        agent.act(s, draw | {"noise": draw["noise"][:, 0]})


def test_unknown_agents_and_foreign_configurations_are_refused():
    with pytest.raises(ValueError, match=r"agent must be one of bc, .*, got 'sac'"):
        find_agent("sac")
    with pytest.raises(ValueError, match="action_dim must be at least 1, got 0"):
        make_agent(AGENTS["qam"].config_class(), OBS, 0)


BAD = [
    ("bc", "hidden", ()),
    ("bc", "hidden", (8, 0)),
    ("bc", "horizon", 0),
    ("bc", "discount", 1.5),
    ("bc", "flow_steps", 0),
    ("bc", "solver", "heun"),
    ("bc", "lr", float("nan")),
    ("bc", "grad_clip", -1.0),
    ("fql", "critics", 0),
    ("fql", "rho", -0.1),
    ("fql", "target_rate", 0.0),
    ("fql", "best_of_n", 0),
    ("fql", "alpha", -1.0),
    ("ifql", "expectile", 1.0),
    ("qam", "inverse_temperature", 0.0),
    ("qam", "flow_steps", 1),
    ("qam", "kernel", "covariance_matched"),
    ("qam-e", "edit_scale", -0.1),
    ("qam-e", "target_entropy", float("inf")),
    ("qam-f", "alpha", float("nan")),
    ("qam", "kl_budget", 0.0),
    ("qam", "value_penalty", -1.0),
    ("qam", "adjoint", "full"),
    ("bam", "inverse_temperature", float("nan")),
    ("fedit", "edit_scale", 0.0),
    ("dsrl", "latent_scale", 0.0),
    ("fawac", "inverse_temperature", 0.0),
    ("fbrac", "alpha", 0.0),
    ("rlpd", "bc_alpha", -0.1),
    ("rebrac", "target_every", 0),
    ("rebrac", "noise_clip", -0.1),
    ("cgql", "guidance", -0.1),
    ("cgql-mse", "noisy_weight", -0.1),
    ("rql", "expectile", 0.0),
    ("rql", "target_policy_rate", 1.5),
    ("qsm", "inverse_temperature", 0.0),
    ("qsm", "solver", "ab2"),
    ("qsm", "time_features", 7),
    ("dac", "alpha", -1.0),
    ("dac", "flow_steps", 1),
]


@pytest.mark.parametrize(("name", "option", "value"), BAD)
def test_options_out_of_range_are_refused_by_name_value_and_expectation(name, option, value):
    with pytest.raises(ValueError, match=rf"^{option} must be .*, got ") as error:
        replace(AGENTS[name].config_class(), **{option: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("name", "clip"),
    [(n, 1.0) for n in ("qam", "qam-e", "qam-f", "bam", "qsm", "dac", "trqam", "sqam")]
    + [
        (n, 0.0)
        for n in (
            "bc",
            "fql",
            "ifql",
            "fedit",
            "dsrl",
            "rebrac",
            "rlpd",
            "rql",
            "fawac",
            "fbrac",
            "cgql",
            "cgql-mse",
            "cgql-linex",
        )
    ],
)
def test_published_optimiser_settings_are_the_defaults(name, clip):
    config = AGENTS[name].config_class()
    assert config.grad_clip == clip
    assert config.lr == 3e-4
    assert config.hidden == (512,) * 4
    assert config.flow_steps == 10
    if name != "bc":
        assert (config.critics, config.rho, config.target_rate) == (10, 0.5, 0.005)


def test_no_option_has_a_name_of_the_training():
    taken = {"seed", "batch_size", "task", "agent", "folder", "device"}
    for agent in AGENTS.values():
        assert not taken & {field.name for field in fields(agent.config_class)}
