"""The command ``export``: a policy as a file for PyTorch alone, with its description.

The exported program is a pure function

    policy(observation (B, observation_dim), noise (B, noise_dim)) -> actions (B, h, action_dim)

for any batch size B, in policy.pt2.  Its actions, in [-1, 1], are the numbers of the agent's own
``act``.  The noise is standard normal and holds all randomness of the policy, so that its user owns
the generator; zeros give a repeatable action.  Agents that choose among candidates or edit their
action need several noises: they are pieces of the one tensor, in the order and shapes that
policy.json lists.  Networks that acting does not need are left out of the file.

``SNIPPET`` is the complete program that runs it.
"""

from __future__ import annotations

import copy
import io
import math
import statistics
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from applications.common.errors import RunError
from applications.common.run_folder import read_config
from applications.rl.agents.base import Agent
from applications.rl.run_folder import load_agent
from flows.training import ensure_writable, replacing, write_json

SNIPPET = """\
import json
import torch

policy = torch.export.load("policy.pt2").module()
facts = json.load(open("policy.json"))
observation = torch.zeros(1, facts["observation"]["shape"][1])
noise = torch.randn(1, facts["noise"]["shape"][1])  # zeros: the same action every time
with torch.no_grad():
    actions = policy(observation, noise)[0]  # to be executed one after the other
print(actions)
"""
TOLERANCE = 1e-6
"""Largest permitted difference between actions of the program and of the agent."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained agent as a self-contained policy, check it, and time it."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, or its checkpoint."""
    agent: str | None = None
    """Agent of your own that the run holds, as module:Name; its module is imported."""
    kernel: str | None = None
    """Kernel of your own that the agent has, as module:Name; its module is imported."""
    behaviour: str | None = None
    """Flow policy of your own that is the agent's behaviour, as module:Name; its module is
    imported."""
    folder: Path | None = None
    """Folder to write policy.pt2 and policy.json to; the folder of the run if not given."""
    device: str = "cpu"
    """Device of the policy; it is part of the exported program."""
    repeats: int = 200
    """Number of calls whose median is the latency."""


@dataclass(frozen=True)
class Exported:
    """The files of an exported policy.

    Attributes:
        path: file of the program; its description has the same name with the suffix .json.
        facts: content of the description.
    """

    path: Path
    facts: dict[str, Any]


class Policy(nn.Module):
    """Computes the actions of an agent from observations and one tensor of noise.

    Arguments:
        agent: any agent.

    Attributes:
        shapes: shape, without the batch, of each named noise, in their order.
        noise_dim: sum of their sizes.
    """

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self.agent = agent
        self.shapes = {name: shape[1:] for name, shape in agent.act_shapes(2).items()}
        self.noise_dim = sum(math.prod(shape) for shape in self.shapes.values())

    def split(self, noise: Tensor) -> dict[str, Tensor]:
        """Split ``noise`` (B, noise_dim) into the named noises of the agent."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = noise.split(sizes, dim=1)
        return {
            name: part.reshape(-1, *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Compute actions (B, h, action_dim) from observations (B, obs) and noise (B, n)."""
        return self.agent.act(observation, self.split(noise))


def run_export(config: ExportConfig) -> Exported:
    """Export, read back, check, time and write the policy of a run.

    Raises:
        ValueError: ``repeats`` is not positive, or there is no such device.
        OSError: there is no checkpoint, or the folder cannot be written.
        CheckpointError: the checkpoint is damaged or not of an agent.
        RunError: the exported policy does not act as the agent does.
    """
    if config.repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {config.repeats}")
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or no such hardware
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: cannot use {config.device!r}: {reason}") from None
    outside = {"agent": config.agent, "kernel": config.kernel, "behaviour": config.behaviour}
    trained = load_agent(config.run, config.device, **outside)
    own = config.run if config.run.is_dir() else config.run.parent
    path = ensure_writable((config.folder or own) / "policy.pt2", "folder")
    policy = Policy(trained.agent)
    content = program_bytes(policy)
    program = torch.export.load(io.BytesIO(content)).module()
    difference = largest_difference(policy, program)
    if not difference <= TOLERANCE:
        raise RunError(
            f"the exported policy must act as the agent to {TOLERANCE}, differs by {difference}"
        )
    agent = trained.agent
    facts = {
        "agent": trained.name,
        "task": trained.task,
        "updates": trained.updates,
        "observation": {"shape": ["batch", agent.observation_dim], "dtype": "float32"},
        "noise": {
            "shape": ["batch", policy.noise_dim],
            "dtype": "float32",
            "distribution": "standard normal",
            "parts": [[name, list(shape)] for name, shape in policy.shapes.items()],
        },
        "actions": {
            "shape": ["batch", agent.chunk_length, agent.action_dim],
            "dtype": "float32",
            "range": [-1, 1],
            "environment": action_units(own),
        },
        "device": config.device,
        "torch": str(torch.__version__),
        "largest_difference": difference,
        "latency_ms": latency_ms(policy, program, config.repeats),
        "agent_latency_ms": latency_ms(policy, policy, config.repeats),
        "threads": torch.get_num_threads(),
        "bytes": len(content),
    }
    with replacing(path, "folder") as file:
        file.write(content)
    write_json(path.with_suffix(".json"), facts)
    return Exported(path, facts)


def action_units(folder: Path) -> dict[str, Any]:
    """Say how the actions of an environment follow from those of a policy.

    Arguments:
        folder: folder of the run, whose config.json knows the bounds of the actions.

    Returns:
        the bounds, None where the run did not record them, and the formula.
    """
    config = read_config(folder)
    bounds = {name: config.get(f"action_{name}") for name in ("low", "high")}
    return {**bounds, "formula": "low + (action + 1) / 2 * (high - low)"}


def show_export(config: ExportConfig) -> None:
    """Export a policy and print its facts, as the command ``export``."""
    exported = run_export(config)
    facts = exported.facts
    print(f"{facts['agent']} on {facts['task']}, {facts['updates']} updates")
    for name in ("observation", "noise", "actions"):
        print(f"  {name:<12} {' x '.join(map(str, facts[name]['shape']))}")
    print(f"  {'size':<12} {facts['bytes'] / 2**20:.2f} MiB")
    print(f"  {'difference':<12} {facts['largest_difference']:.1e} from the agent, at most")
    print(
        f"  {'latency':<12} {facts['latency_ms']:.2f} ms at batch 1 on {facts['device']}, "
        f"{facts['threads']} threads; the agent {facts['agent_latency_ms']:.2f} ms"
    )
    units = facts["actions"]["environment"]
    if units["low"] is not None:
        print(f"  {'units':<12} -1 and 1 are {units['low']} and {units['high']} in the environment")
    print(
        f"wrote {exported.path}\nwrote {exported.path.with_suffix('.json')}\n\nTo run it there:\n"
    )
    print(textwrap.indent(SNIPPET, "    "), end="")


def program_bytes(policy: Policy) -> bytes:
    """Export the program of ``policy`` as bytes, without weights that acting does not read."""
    needed = copy.deepcopy(policy)
    unread = _unread(_export(needed))
    for name, parameter in [*needed.named_parameters(), *needed.named_buffers()]:
        if name in unread:
            parameter.data = parameter.data.new_empty(0)
    buffer = io.BytesIO()
    torch.export.save(_export(needed), buffer)
    return buffer.getvalue()


def largest_difference(policy: Policy, program: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Compute the largest difference of an action component, over several batch sizes.

    The result is NaN if any difference is NaN.
    """
    worst = torch.zeros(())
    for seed, batch_size in enumerate((1, 2, 7, 64)):
        inputs = _inputs(policy, batch_size, seed)
        with torch.no_grad():
            error = (program(*inputs) - policy(*inputs)).abs().max().cpu()
        worst = torch.maximum(worst, error)  # keeps NaN
    return float(worst)


def latency_ms(policy: Policy, program: Callable[[Tensor, Tensor], Tensor], repeats: int) -> float:
    """Measure the median time of a call of ``program`` with batch size 1, in milliseconds."""
    inputs = _inputs(policy, 1, 0)
    times = []
    with torch.no_grad():
        for _ in range(10):
            program(*inputs)
        for _ in range(repeats):
            _synchronize(inputs[0])
            start = time.perf_counter()
            program(*inputs)
            _synchronize(inputs[0])
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _export(policy: Policy) -> ExportedProgram:
    batch = {0: Dim("batch", max=2**30)}  # without a bound PyTorch 2.6 refuses some agents
    with torch.no_grad():
        return torch.export.export(
            policy,
            _inputs(policy, 3, 0),
            dynamic_shapes={"observation": batch, "noise": batch},
            strict=False,
        )


def _unread(program: ExportedProgram) -> set[str]:
    """List the parameters and buffers that no operation of the program reads."""
    signature = program.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {
        held[node.name]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in held and not node.users
    }


def _inputs(policy: Policy, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw standard normal observations and noise on the device of the policy."""
    like = next(policy.parameters())
    generator = torch.Generator().manual_seed(seed)
    sizes = (policy.agent.observation_dim, policy.noise_dim)
    observation, noise = (torch.randn(batch_size, n, generator=generator) for n in sizes)
    return observation.to(like), noise.to(like)


def _synchronize(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
