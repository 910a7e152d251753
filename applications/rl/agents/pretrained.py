r"""A flow policy from outside this package as the behaviour flow of an agent.

Any velocity field v(x, t, {"observation": s}) over flattened chunks of actions in [-1, 1] can take
the place of an agent's `FlowActor`: x is (B, chunk_dim), time-major, t a scalar or (B,), and s the
observation as the environment gives it.  Networks in the manner of FQL, and policies that
`flows.pretrained.load` has adapted, are such fields by their conventions.

An agent that scales observations hands s' = scale (s - mean) / deviation to its networks.  The
field gets s back from it, so the scale of the agent is its own choice.

The field must be a function of its inputs: no dropout, no statistics of the batch.  A policy flow
that is the tilt of the behaviour starts as a copy of the field and is trained; with the option
``residual`` it is a correction by a network of the agent's own, which is also the way to tilt a
field without parameters.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from applications.common.objects import load_object
from applications.rl.agents.base import Agent
from applications.rl.agents.behaviour import behaviour_of
from applications.rl.agents.networks import FlowActor
from flows import Cond, VelocityField, check_velocity, frozen, load
from flows.pretrained import Pretrained
from flows.pretrained.policy import recognises

ROWS = 3
"""Rows of the inputs at which a field is tried."""


class PretrainedActor(nn.Module):
    """Velocity field over chunks of actions that asks a flow policy from outside this package.

    Arguments:
        source: the field, a function that makes it, or either as ``module:Name``.

    Attributes:
        name: what ``source`` is called, see `describe`.
        field: the velocity field.
        scale: scale of the observations that it is called with; 0 where they are not normalised.

    Raises:
        ValueError: ``source`` names nothing, or no velocity field.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, source: object) -> None:
        super().__init__()
        self.name, self.scale = describe(source), 0.0
        self._reference = source if isinstance(source, str) else None
        self.field, self.condition = _field(source)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))

    @property
    def source(self) -> object:
        """Return what another process makes it from: ``module:Name``, or the field."""
        return self.field if self._reference is None else self._reference

    def see_as(self, agent: Agent) -> None:
        """Take observations as the networks of ``agent`` do, whose normaliser is fitted."""
        self.scale = agent.config.observation_scale
        self.register_buffer("mean", agent.observation_mean.clone())
        self.register_buffer("deviation", agent.observation_deviation.clone())

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Evaluate the velocity (B, chunk_dim) at ``x`` (B, chunk_dim) and ``t`` (scalar or (B,)).

        Raises:
            ValueError: ``cond`` is not {"observation": (B, observation_dim)}.
        """
        if cond is None or cond.keys() != {"observation"}:
            got = None if cond is None else sorted(cond)
            raise ValueError(f"cond must name exactly 'observation', got {got}")
        s = cond["observation"]
        if self.scale:
            s = s * (self.deviation / self.scale) + self.mean
        time = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        return self.field(x, time, {self.condition: s})


def put_in_place(agent: Agent, actor: PretrainedActor) -> None:
    """Make a flow policy from outside this package the behaviour flow of an agent.

    Arguments:
        agent: the agent, which changes; its normaliser must be fitted before.
        actor: the policy, of which the agent gets copies.

    Raises:
        ValueError: the agent has no behaviour flow; or the policy has no parameters, and the
            agent's own is no correction of it.
    """
    old = next(behaviour_of(agent).parameters())
    actor = copy.deepcopy(actor).to(old.device).requires_grad_(True)
    actor.see_as(agent)
    agent.behaviour = actor
    if getattr(agent, "target_behaviour", None) is not None:
        agent.target_behaviour = frozen(actor)
    policy = getattr(agent, "policy", None)
    if not isinstance(policy, FlowActor):
        return
    if getattr(agent.config, "residual", False):
        policy.zero_output()
    elif any(True for _ in actor.parameters()):
        agent.policy = copy.deepcopy(actor)
    else:
        raise ValueError(
            f"residual must be on with behaviour {actor.name}, which has no parameters "
            "that the policy could start from, got False"
        )


def check_actor(actor: PretrainedActor, observation_dim: int, chunk_dim: int) -> None:
    """Refuse a flow policy that is no velocity field of these sizes, by trying it.

    Raises:
        ValueError: it fails, returns another shape, has no derivative by the actions, or is no
            function of its inputs.
    """
    generator, name = torch.Generator().manual_seed(0), f"behaviour {actor.name}"
    x = torch.randn(ROWS, chunk_dim, generator=generator).requires_grad_(True)
    s = torch.randn(ROWS, observation_dim, generator=generator)
    times, cond = torch.linspace(0.2, 0.8, ROWS), {"observation": s}
    before = {key: value.clone() for key, value in actor.state_dict().items()}
    try:
        v = check_velocity(actor(x, times, cond), x, name)
        each = [check_velocity(actor(x, t, cond), x, name)[i] for i, t in enumerate(times)]
    except Exception as error:  # of code that is not ours
        raise ValueError(
            f"{name} must take x ({ROWS}, {chunk_dim}) (rows, horizon times action size), t () and "
            f"({ROWS},), and observations ({ROWS}, {observation_dim}), got "
            f"{type(error).__name__}: {error}"
        ) from error
    if not v.requires_grad:
        raise ValueError(f"{name} must be differentiable in x, got a velocity without gradient")
    changed = [key for key, value in actor.state_dict().items() if not value.equal(before[key])]
    if changed or not torch.allclose(v, torch.stack(each), rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"{name} must be a function of its inputs row by row, without dropout and statistics "
            "of batches, got "
            + (f"a changed {changed[0]}" if changed else f"other velocities at t ({ROWS},) than ()")
        )


def describe(source: object) -> str:
    """Name a flow policy from outside: ``module:Name`` if it has a name, else as an object."""
    if isinstance(source, str):
        return source
    if inspect.isroutine(source) or isinstance(source, type):
        return f"{source.__module__}:{source.__qualname__}"
    return f"an object of {type(source).__module__}:{type(source).__qualname__}"


def _field(source: object) -> tuple[VelocityField, str]:
    """Return the field that a source stands for, and the name of its condition.

    Raises:
        ValueError: there is no such field.
    """
    found: Any = load_object(source, "behaviour") if isinstance(source, str) else source
    if callable(found) and not isinstance(found, nn.Module) and _makes_a_field(found):
        found = found()
    if not callable(found):
        raise ValueError(
            "behaviour must be a velocity field v(x, t, cond), or a function without arguments "
            f"that makes one, got {describe(source)}, a {type(found).__name__}"
        )
    if isinstance(found, nn.Module) and recognises(found, None):
        found = load(found, quiet=True)
    if not isinstance(found, Pretrained):
        return cast(VelocityField, found), "observation"
    names = found.required
    if len(names) != 1:
        raise ValueError(
            f"behaviour {describe(source)} must take one condition, the observation, got "
            f"{', '.join(sorted(names)) or 'none'}"
        )
    return found, next(iter(names))


def _makes_a_field(found: Callable[..., Any]) -> bool:
    """Return whether a callable needs no argument, so that it is no field but makes one."""
    parameters = inspect.signature(found).parameters.values()
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(p.default is not p.empty or p.kind in starred for p in parameters)
