"""The contract of an agent, as a check that the author of a new one runs.

    from applications.rl import check_agent

    def test_my_agent():
        check_agent(MyConfig())

Training relies on every part of it: losses and actions are pure functions of weights, inputs and
declared noise, so that runs repeat; they work under ``torch.vmap``, by which seeds are trained
together; nothing waits for the device, so that updates can be captured in a CUDA graph.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from applications.rl.agents.base import Agent
from applications.rl.agents.options import AgentConfig
from applications.rl.agents.registry import make_agent
from applications.rl.agents.rollouts import Noise
from applications.rl.data.replay import Batch

B = 6
"""Windows of the batches."""


def check_agent(
    config: AgentConfig, *, observation_dim: int = 5, action_dim: int = 2, compiled: bool = False
) -> None:
    """Check that an agent keeps the contract; small networks make it a matter of seconds.

    Arguments:
        config: options of the agent.
        observation_dim: size of an observation.
        action_dim: size of an action.
        compiled: check too that the loss compiles (`torch.compile`), which takes a minute.

    Raises:
        AssertionError: the agent breaks the contract; the message says where.
    """
    case = _Case(config, observation_dim, action_dim)
    checks = [
        _options_survive_a_checkpoint,
        _inputs_stay_as_they_are,
        _loss_is_a_function_of_its_noise,
        _actions_are_a_function_of_their_noise,
        _losses_leave_no_hidden_state,
        _every_weight_is_trained_or_a_target,
        _targets_follow_their_networks,
        _state_is_all_there_is,
        _nothing_waits_for_the_device,
        _seeds_can_be_stacked,
    ]
    for check in checks:
        check(case)
    if compiled:
        _loss_compiles(case)


@dataclass(frozen=True)
class _Case:
    """An agent's options and sizes, of which each check makes an agent of its own."""

    config: AgentConfig
    observation_dim: int
    action_dim: int

    def agent(self, seed: int = 0) -> Agent:
        """Make an agent in float64 whose target networks differ from their networks."""
        agent = make_agent(self.config, self.observation_dim, self.action_dim, seed).double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in agent.parameters():
                kick = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(0.1 * kick)
        return agent

    def batch(self, seed: int = 0) -> Batch:
        """Draw windows, one of which is not valid and one of which ends an episode."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        masks, valid = torch.ones(B, dtype=torch.float64), torch.ones(B, dtype=torch.float64)
        masks[1], valid[2] = 0.0, 0.0
        actions = normal(B, self.config.horizon, self.action_dim).tanh()
        s, following = normal(B, self.observation_dim), normal(B, self.observation_dim)
        return Batch(s, actions, normal(B), masks, valid, following)


class _Loss(nn.Module):
    """The loss of an agent as a module's call, for `torch.func.functional_call`."""

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self.agent = agent

    def forward(self, batch: Batch, noise: Noise) -> Tensor:
        """Return the loss."""
        return self.agent.loss(batch, noise)[0]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _loss(agent: Agent, batch: Batch, noise: Noise) -> Tensor:
    """Return the loss of a copy, so that running averages of the agent itself do not move."""
    return copy.deepcopy(agent).loss(batch, noise)[0].detach()


def _same(found: Tensor, expected: Tensor, message: str) -> None:
    torch.testing.assert_close(
        found, expected, rtol=1e-9, atol=1e-9, msg=lambda text: f"{message}: {text}"
    )


def _without_global_randomness(run: Callable[[], Any], what: str) -> Any:
    before = torch.get_rng_state()
    result = run()
    assert torch.equal(before, torch.get_rng_state()), (
        f"{what} draws random numbers of its own: declare them in noise_shapes or act_shapes"
    )
    return result


def _described(value: Any) -> Any:
    """Return plain data and tensors as something to compare; the class of anything else."""
    if isinstance(value, Tensor):
        return value.detach().cpu().tolist() if value.device.type != "meta" else None
    if isinstance(value, Mapping):
        return [(str(key), _described(v)) for key, v in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return [_described(v) for v in value]
    plain = value is None or isinstance(value, str | int | float | complex)
    return value if plain else type(value)


def _attributes(agent: Agent) -> dict[str, Any]:
    """Describe what an agent and its parts hold beside parameters, buffers and parts."""
    return {
        f"{prefix}.{name}".lstrip("."): _described(value)
        for prefix, module in agent.named_modules()
        for name, value in vars(module).items()
        if name not in ("_parameters", "_buffers", "_modules")
    }


class _Seen(dict[str, Tensor]):
    """Noise that remembers which of it was read."""

    def __init__(self, noise: Mapping[str, Tensor]) -> None:
        super().__init__(noise)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


def _options_survive_a_checkpoint(case: _Case) -> None:
    plain = json.loads(json.dumps(asdict(case.config)))
    options: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()
    }
    assert type(case.config)(**options) == case.config, (
        "options must be numbers, words, truth values, or tuples of them"
    )


def _inputs_stay_as_they_are(case: _Case) -> None:
    agent, batch = case.agent(), case.batch()
    noise, acting = agent.draw_noise(B, _generator()), agent.act_noise(B, _generator())
    columns = {f"batch.{name}": value for name, value in batch._asdict().items()}
    drawn = {f"noise[{name!r}]": value for name, value in noise.items()}
    acted = {"observations": batch.observations}
    acted |= {f"noise[{name!r}]": value for name, value in acting.items()}
    for what, run, given in (
        ("the loss", lambda: agent.loss(batch, noise), columns | drawn),
        ("act", lambda: agent.act(batch.observations, acting), acted),
    ):
        before = {name: value.clone() for name, value in given.items()}
        run()
        for name, value in given.items():
            assert torch.equal(value, before[name]), f"{what} changes {name} in place"


def _losses_leave_no_hidden_state(case: _Case) -> None:
    agent, batch = case.agent(), case.batch()
    noise = agent.draw_noise(B, _generator())
    agent.loss(batch, noise)  # the first one may fill caches
    state, before = copy.deepcopy(agent.state_dict()), _attributes(agent)
    first = agent.loss(batch, noise)[0].detach()
    changed = [name for name, value in _attributes(agent).items() if before.get(name) != value]
    assert not changed, (
        f"the loss changes {', '.join(changed)}, which no checkpoint holds: keep it in a buffer"
    )
    agent.load_state_dict(state)
    assert torch.equal(first, agent.loss(batch, noise)[0]), (
        "the loss changes at the same weights, buffers, inputs and noise: it has a hidden state"
    )


def _loss_is_a_function_of_its_noise(case: _Case) -> None:
    agent, batch = case.agent(), case.batch()
    drawn = _Seen(agent.draw_noise(B, _generator()))
    first = _without_global_randomness(lambda: _loss(agent, batch, drawn), "the loss")
    assert first.shape == (), f"the loss must be a scalar, got shape {tuple(first.shape)}"
    assert first.isfinite(), f"the loss must be finite, got {first}"
    assert torch.equal(first, _loss(agent, batch, drawn)), "the loss changes at the same noise"
    unread = drawn.keys() - drawn.read
    assert not unread, f"noise_shapes declares {sorted(unread)}, which no loss reads"
    for name, value in copy.deepcopy(agent).loss(batch, drawn)[1].items():
        assert value.shape == (), f"metric {name!r} must be a scalar, got {tuple(value.shape)}"
        assert not value.requires_grad, f"metric {name!r} must be detached"
        assert value.isfinite(), f"metric {name!r} must be finite, got {value}"


def _actions_are_a_function_of_their_noise(case: _Case) -> None:
    agent, s = case.agent(), 3 * case.batch().observations
    drawn = agent.act_noise(B, _generator())
    actions = _without_global_randomness(lambda: agent.act(s, drawn), "act")
    expected = (B, case.config.chunk_length, case.action_dim)
    assert actions.shape == expected, f"actions must be {expected}, got {tuple(actions.shape)}"
    assert actions.abs().max() <= 1, f"actions must lie in [-1, 1], got {actions.abs().max()}"
    assert torch.equal(actions, agent.act(s, drawn)), "actions change at the same noise"
    for i in range(B):
        own = {name: value[i : i + 1] for name, value in drawn.items()}
        _same(agent.act(s[i : i + 1], own)[0], actions[i], "an action depends on the other rows")


def _every_weight_is_trained_or_a_target(case: _Case) -> None:
    agent = case.agent()
    agent.loss(case.batch(), agent.draw_noise(B, _generator()))[0].backward()
    for name, parameter in agent.named_parameters():
        target = name.startswith("target_")
        if target:
            assert not parameter.requires_grad, f"{name} must not require a gradient"
            assert parameter.grad is None, f"{name} must not get a gradient"
        else:
            assert parameter.requires_grad, f"{name} is not trained; name targets target_NETWORK"
            assert parameter.grad is not None, f"{name} gets no gradient from any loss"
            assert parameter.grad.isfinite().all(), f"the gradient of {name} must be finite"


def _targets_follow_their_networks(case: _Case) -> None:
    agent = case.agent()
    before = copy.deepcopy(agent.state_dict())
    for _ in range(agent.target_every):
        agent.update_targets()
    for name, parameter in agent.named_parameters():
        if not name.startswith("target_"):
            assert torch.equal(parameter, before[name]), f"update_targets changes {name}"
            continue
        followed = name.removeprefix("target_")
        assert followed in before, f"there is no {followed} that {name} could follow"
        distance = (before[name] - before[followed]).norm()
        moved = (parameter.detach() - before[followed]).norm()
        assert moved < distance, f"update_targets must move {name} toward {followed}"


def _state_is_all_there_is(case: _Case) -> None:
    agent, other, batch = case.agent(), case.agent(seed=1), case.batch()
    noise = agent.draw_noise(B, _generator())
    other.load_state_dict(agent.state_dict())
    _same(_loss(other, batch, noise), _loss(agent, batch, noise), "loss of a loaded agent")
    acting = agent.act_noise(B, _generator())
    s = batch.observations
    _same(other.act(s, acting), agent.act(s, acting), "actions of a loaded agent")


def _seeds_can_be_stacked(case: _Case) -> None:
    agents, batches = [case.agent(s) for s in (0, 1)], [case.batch(s) for s in (0, 1)]
    noises = [agent.draw_noise(B, _generator(s)) for s, agent in enumerate(agents)]
    alone = [_loss(*each) for each in zip(agents, batches, noises, strict=True)]
    modules = [_Loss(copy.deepcopy(agent)) for agent in agents]
    held = [dict(m.named_parameters()) | dict(m.named_buffers()) for m in modules]
    tensors = {name: torch.stack([t[name].detach() for t in held]) for name in held[0]}
    batch = Batch(*(torch.stack(column) for column in zip(*batches, strict=True)))
    noise = {name: torch.stack([each[name] for each in noises]) for name in noises[0]}
    together = torch.vmap(lambda *inputs: functional_call(modules[0], inputs[0], inputs[1:]))
    try:
        found = together(tensors, batch, noise)
    except RuntimeError as error:
        raise AssertionError(f"the losses do not work under torch.vmap: {error}") from error
    _same(found, torch.stack(alone), "losses of two seeds evaluated together")


def _nothing_waits_for_the_device(case: _Case) -> None:
    agent, noise = case.agent().to("meta"), {}
    for name, shape in agent.noise_shapes(B).items():
        noise[name] = torch.empty(tuple(shape), dtype=torch.float64, device="meta")
    batch = Batch(*(part.to("meta") for part in case.batch()))
    try:  # tensors of this device have no values that could be read
        loss, metrics = agent.loss(batch, noise)
        loss.backward()
        agent.follow(metrics)
        agent.update_targets()
    except (RuntimeError, NotImplementedError) as error:
        raise AssertionError(f"an update reads values of tensors on the host: {error}") from error


def _loss_compiles(case: _Case) -> None:
    agent, batch = case.agent(), case.batch()
    noise = agent.draw_noise(B, _generator())
    module = _Loss(copy.deepcopy(agent))
    found = torch.compile(module, dynamic=False, fullgraph=True)(batch, noise).detach()
    _same(found, _loss(agent, batch, noise), "loss of the compiled agent")
