"""Every agent keeps the contract of `check_agent`, and an agent that breaks it is told where."""

import inspect
from dataclasses import dataclass, replace

import pytest
import torch
from helpers.agent_problems import OPTIONS, SHARED
from helpers.own_agent import Regression, RegressionConfig

from applications.rl import AGENTS, Agent, AgentConfig, check_agent, make_agent
from applications.rl.agents.options import AGENT_KERNELS

VARIANTS = [
    *((name, {}) for name in AGENTS),
    *(("qam", {"kernel": kernel}) for kernel in AGENT_KERNELS if kernel != "euler_published"),
    ("qam", {"residual": True, "best_of_n": 3, "target_behaviour": False, "solver": "ab2"}),
    ("qam-e", {"edit_scale": 0.0}),
    ("qam-f", {"alpha": 0.0, "action_chunking": False}),
    ("qam", {"kl_budget": 1.0, "value_penalty": 0.2, "kernel": "moment_matched", "best_of_n": 2}),
    ("qam-e", {"kl_budget": 1.0, "value_penalty": 0.2, "adjoint": "scalar", "residual": True}),
    ("qam-f", {"kl_budget": 1.0, "value_penalty": 0.2, "adjoint": "scalar"}),
    ("bam", {"target_behaviour": False}),
    ("fql", {"best_of_n": 2, "actor_layer_norm": True, "observation_scale": 2.0}),
]


def config(name, **changes):
    default = AGENTS[name].config_class()
    options = SHARED | OPTIONS[name] | changes
    return replace(default, **{k: v for k, v in options.items() if hasattr(default, k)})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
def test_the_contract(name, changes):
    check_agent(config(name, **changes))


@pytest.mark.slow
def test_a_loss_compiles():
    check_agent(config("qam-e"), compiled=True)


def test_target_networks_need_a_rate():
    agent = make_agent(RegressionConfig(hidden=(8,)), 5, 2)
    agent.update_targets()
    agent.target_actor = agent.one_step_actor()
    with pytest.raises(TypeError, match="RegressionConfig must have an option target_rate"):
        agent.update_targets()


@pytest.mark.parametrize("agent", AGENTS.values(), ids=AGENTS)
def test_an_agent_is_one_class_deep_and_overrides_nothing_concrete(agent):
    if agent.__base__ is not Agent:  # another agent with other defaults and nothing else
        assert not [name for name, value in vars(agent).items() if inspect.isfunction(value)]
        assert agent.config_class.__base__ is agent.__base__.config_class
        agent = agent.__base__
    assert agent.__mro__[1:3] == (Agent, torch.nn.Module)
    own = {name for name, value in vars(agent).items() if callable(value)} - {"__init__"}
    inherited = {name for name in own if hasattr(Agent, name)}
    assert inherited == Agent.__abstractmethods__
    groups = agent.config_class.__bases__
    assert groups[-1] is AgentConfig
    assert all(len(group.__mro__) <= 3 for group in groups)  # at most one below another


OWN = RegressionConfig(hidden=(8,), horizon=3)


def test_an_agent_of_ones_own():
    check_agent(OWN)


def broken(**methods):
    """The configuration of an agent that differs from `Regression` by some methods."""

    @dataclass(frozen=True)
    class BrokenConfig(RegressionConfig):
        """Options of an agent that breaks the contract."""

    type("Broken", (Regression,), methods | {"config_class": BrokenConfig})
    return BrokenConfig(hidden=(8,), horizon=3)


def losses_with(change):
    def losses(self, batch, noise):
        loss, metrics = Regression.losses(self, batch, noise)["actor"]
        return {"actor": (change(self, loss, noise), metrics)}

    return losses


def in_place(loss):
    return torch.zeros((), dtype=loss.dtype).add_(loss)  # into a tensor that all seeds share


def spare(self, *arguments):
    Regression.__init__(self, *arguments)
    self.spare = torch.nn.Linear(2, 2)


def target(self, *arguments):
    Regression.__init__(self, *arguments)
    self.target_actor = self.one_step_actor().requires_grad_(False)


def counting(self, loss, noise):
    self.calls = getattr(self, "calls", 0) + 1
    return loss


def averaging(self, loss, noise):
    self.actor.seen = getattr(self.actor, "seen", torch.zeros(())) + loss.detach()
    return loss


class Memory:
    """An object whose state is not plain data."""

    count = 0


def remember(self, *arguments):
    Regression.__init__(self, *arguments)
    self.memory = Memory()


def remembering(self, loss, noise):
    self.memory.count += 1
    return loss + self.memory.count


def spoiling(self, loss, noise):
    noise["noise"].mul_(2)
    return loss


def spoiling_the_batch(self, batch, noise):
    batch.actions.clamp_(-0.1, 0.1)
    return Regression.losses(self, batch, noise)


def spoiling_the_noise_of_acting(self, s, noise):
    return self.actor(s, noise["noise"].mul_(0.5)).tanh()


BROKEN = {
    "the loss changes calls, which no checkpoint holds": {"losses": losses_with(counting)},
    "the loss changes actor.seen, which": {"losses": losses_with(averaging)},
    "the loss changes .*hidden state": {"__init__": remember, "losses": losses_with(remembering)},
    r"the loss changes noise\['noise'\] in place": {"losses": losses_with(spoiling)},
    "the loss changes batch.actions in place": {"losses": spoiling_the_batch},
    r"act changes noise\['noise'\] in place": {"chunks": spoiling_the_noise_of_acting},
    "draws random numbers of its own": {
        "losses": losses_with(lambda self, loss, noise: loss + torch.randn(()))
    },
    "must be finite": {"losses": losses_with(lambda self, loss, noise: loss / 0)},
    "must be a scalar": {"losses": losses_with(lambda self, loss, noise: loss[None])},
    r"declares \['more'\], which no loss reads": {
        "noise_shapes": lambda self, n: {"noise": (n, self.chunk_dim), "more": (n,)}
    },
    r"must lie in \[-1, 1\]": {"chunks": lambda self, s, noise: 9 + self.actor(s, noise["noise"])},
    "depends on the other rows": {
        "chunks": lambda self, s, noise: (noise["noise"] - noise["noise"].mean()).tanh()
    },
    "spare.weight gets no gradient": {"__init__": spare},
    "must move target_actor": {"__init__": target, "update_targets": lambda self: None},
    "do not work under torch.vmap": {
        "losses": losses_with(lambda self, loss, noise: in_place(loss))
    },
    "reads values of tensors": {
        "losses": losses_with(lambda self, loss, noise: loss * float(noise["noise"].sum() > -99))
    },
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_breaks_the_contract_is_named(message):
    with pytest.raises(AssertionError, match=message):
        check_agent(broken(**BROKEN[message]))
