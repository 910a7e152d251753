"""Golden values of the published implementation, and how its parameters map onto ours.

tests/rl/golden/*.npz hold inputs, injected noises and outputs of the released JAX code in float32,
three updates u0, u1, u2 a case, all parameters perturbed so that none has a trivial value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from applications.rl import Agent, Batch, find_agent, make_agent
from applications.rl.agents.diffusion import NoisePredictor
from applications.rl.agents.layers import MLP
from applications.rl.agents.networks import (
    Critics,
    DeterministicActor,
    FlowActor,
    OneStepActor,
    TanhGaussianActor,
    TimedCritics,
)

OBSERVATION_DIM, ACTION_DIM = 6, 2

# Networks by their published names; target networks are "target_...".
CRITICS = {"critic": "critic", "target_critic": "target_critic"}
PAIR = CRITICS | {
    "actor_slow": "behaviour",
    "target_actor_slow": "target_behaviour",
    "actor_fast": "policy",
}


@functools.lru_cache
def archive(name: str) -> dict[str, np.ndarray]:
    with np.load(
        Path(__file__).parents[1] / "rl" / "golden" / f"{name}.npz", allow_pickle=False
    ) as file:
        return dict(file)


def as_recorded(noise: dict[str, Tensor]) -> dict[str, Tensor]:
    return noise


def of_diffusion(noise: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows first, without the unused noise of the last step; whole steps as uniform numbers."""
    found = {}
    for name, value in noise.items():
        if name.endswith("ddpm_z"):
            found[name] = value.reshape(10, -1, 6).transpose(0, 1)[:, :-1]
        elif name == "actor_t":
            found["denoise_t"] = ((value - 0.5) / 10).float()[:, None]
        elif name == "actor_eps":
            found["denoise_eps"] = value
        else:
            found[name] = value.reshape(-1, 1, 6)
    return found


@dataclass(frozen=True)
class Case:
    """One case of one archive; ``options`` are those of our configuration.

    ``noises`` brings the recorded noises of an update or of acting into our form.
    """

    file: str
    name: str
    agent: str
    options: dict
    networks: dict[str, str] = field(default_factory=lambda: PAIR)
    noises: Callable[[dict[str, Tensor]], dict[str, Tensor]] = as_recorded

    def __str__(self) -> str:
        return f"{self.agent}-{self.name}"

    def get(self, key: str) -> Tensor:
        return torch.from_numpy(np.array(archive(self.file)[f"{self.name}.{key}"]))

    def has(self, key: str) -> bool:
        return f"{self.name}.{key}" in archive(self.file)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Entries below ``prefix``, by the rest of their keys."""
        start = f"{self.name}.{prefix}."
        values = archive(self.file)
        return {
            k[len(start) :]: torch.from_numpy(v) for k, v in values.items() if k.startswith(start)
        }

    def batch(self, update: int) -> Batch:
        """What the published losses read of the window: sums and flags of its last step."""
        x = self.group(f"u{update}.in")
        return Batch(
            observations=x["observations"],
            actions=x["actions"],
            rewards=x["rewards"][:, -1],
            masks=x["masks"][:, -1],
            valid=x["valid"][:, -1],
            next_observations=x["next_observations"][:, -1],
        )

    def noise(self, update: int) -> dict[str, Tensor]:
        return self.noises(self.group(f"u{update}.noise"))

    def acting(self, kind: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Observations and noises of the recorded actions of a kind."""
        observations = self.get(f"eval_{kind}.in.observations")
        noise = self.group(f"eval_{kind}.noise")
        if observations.ndim == 1:
            observations, noise = observations[None], {name: n[None] for name, n in noise.items()}
        return observations, self.noises(noise)

    def make(self) -> Agent:
        """Our agent with the case's initial parameters."""
        config = find_agent(self.agent).config_class(horizon=3, critics=3, **self.options)
        agent = make_agent(config, OBSERVATION_DIM, ACTION_DIM)
        with torch.no_grad():
            for name, parameter in self.leaves(agent):
                value = self.get(f"params0.modules_{name}")
                parameter.copy_(ours(name, value).reshape(parameter.shape))
        return agent

    def leaves(self, agent: Agent) -> Iterator[tuple[str, nn.Parameter]]:
        """Published name of every parameter of the agent."""
        for published, attribute in self.networks.items():
            yield from leaves(published, getattr(agent, attribute))


def leaves(published: str, module) -> Iterator[tuple[str, nn.Parameter]]:
    if isinstance(module, nn.Parameter):
        yield f"{published}/log_value", module
    elif isinstance(module, DeterministicActor):
        *hidden, (_, weight), (_, bias) = of_mlp(f"{published}/actor_net", module.mlp)
        yield from [*hidden, (f"{published}/mean_net/kernel", weight)]
        yield f"{published}/mean_net/bias", bias
    elif isinstance(module, FlowActor | OneStepActor):
        yield from of_mlp(f"{published}/mlp", module.mlp)
    elif isinstance(module, TanhGaussianActor):
        yield from of_mlp(f"{published}/MLP_0", module.trunk)
        for head, layers in (("Mean", module.mean), ("LogStd", module.log_std)):
            yield f"{published}/OutputDense{head}/kernel", layers.layers[0].weight
            yield f"{published}/OutputDense{head}/bias", layers.layers[0].bias
    elif isinstance(module, NoisePredictor):
        yield f"{published}/FourierFeatures_0/kernel", module.frequencies
        yield from of_mlp(f"{published}/MLP_0", module.time)
        yield from of_mlp(f"{published}/MLP_1", module.mlp)
    elif isinstance(module, Critics):
        yield from of_critics(f"{published}/value_net", module)
    elif isinstance(module, TimedCritics):
        yield from of_critics(f"{published}/mlp", module.critics)
    else:
        yield from of_mlp(f"{published}/value_net", module.mlp)


def of_critics(prefix: str, critics: Critics) -> Iterator[tuple[str, nn.Parameter]]:
    for i, (weight, bias) in enumerate(zip(critics.weights, critics.biases, strict=True)):
        yield f"{prefix}/Dense_{i}/kernel", weight
        yield f"{prefix}/Dense_{i}/bias", bias
    for i, (scale, shift) in enumerate(zip(critics.scales, critics.shifts, strict=True)):
        yield f"{prefix}/LayerNorm_{i}/scale", scale
        yield f"{prefix}/LayerNorm_{i}/bias", shift


def of_mlp(prefix: str, mlp: MLP) -> Iterator[tuple[str, nn.Parameter]]:
    for i, layer in enumerate(mlp.layers):
        yield f"{prefix}/Dense_{i}/kernel", layer.weight
        yield f"{prefix}/Dense_{i}/bias", layer.bias
    for i, norm in enumerate(mlp.norms):
        yield f"{prefix}/LayerNorm_{i}/scale", norm.weight
        yield f"{prefix}/LayerNorm_{i}/bias", norm.bias


def ours(name: str, value: Tensor) -> Tensor:
    """A published value in our layout: (in, out) kernels are transposed, but for the critics."""
    return value.T if name.endswith("kernel") and value.ndim == 2 else value


SMALL = {"hidden": (16, 16)}
FOUR_STEPS = {
    "action_chunking": False,
    "grad_clip": 0.0,
    "flow_steps": 4,
    "target_gradient": False,
    "clip_terminal": False,
    "rho": 0.0,
    "best_of_n": 2,
    "target_behaviour": False,
}
WIDE = {"hidden": (32, 32)}
WITHOUT_TARGET_BEHAVIOUR = {k: v for k, v in PAIR.items() if k != "target_actor_slow"}

QAM = Case("golden_qam", "default", "qam", WIDE | {"inverse_temperature": 0.3})
ALT = Case(
    "golden_qam",
    "alt",
    "qam",
    WIDE | {"inverse_temperature": 0.3} | FOUR_STEPS,
    WITHOUT_TARGET_BEHAVIOUR,
)
RESIDUAL = Case(
    "golden_qam",
    "residual",
    "qam",
    WIDE | {"inverse_temperature": 3.0, "residual": True, "actor_layer_norm": True},
)
QAM_F = Case(
    "golden_qam",
    "fql",
    "qam-f",
    WIDE | {"inverse_temperature": 3.0, "alpha": 10.0},
    PAIR | {"one_step_actor": "one_step"},
)
QAM_E = Case(
    "golden_qam_e",
    "default",
    "qam-e",
    SMALL | {"inverse_temperature": 1.0, "edit_scale": 0.1},
    PAIR | {"edit_actor": "editor", "edit_alpha": "log_alpha"},
)
FQL = Case(
    "golden_fql",
    "default",
    "fql",
    SMALL | {"alpha": 100.0},
    {
        "critic": "critic",
        "target_critic": "target_critic",
        "actor_bc_flow": "behaviour",
        "actor_onestep_flow": "one_step",
    },
)
IFQL = Case(
    "golden_ifql",
    "default",
    "ifql",
    SMALL | {"expectile": 0.9},
    {
        "critic": "critic",
        "target_critic": "target_critic",
        "actor_flow": "behaviour",
        "value": "value",
    },
)
FEDIT = Case(
    "golden_fedit",
    "default",
    "fedit",
    SMALL | {"edit_scale": 0.2},
    {
        "critic": "critic",
        "target_critic": "target_critic",
        "actor_bc_flow": "behaviour",
        "edit_actor": "editor",
        "alpha": "log_alpha",
    },
)
DSRL = Case(
    "golden_dsrl",
    "default",
    "dsrl",
    SMALL | {"latent_scale": 1.0},
    {
        "critic": "critic",
        "target_critic": "target_critic",
        "z_critic": "latent_critic",
        "actor_bc_flow": "behaviour",
        "target_actor_bc_flow": "target_behaviour",
        "actor": "actor",
        "alpha": "log_alpha",
    },
)
REBRAC = Case(
    "golden_rebrac",
    "default",
    "rebrac",
    SMALL | {"alpha": 0.01, "action_noise": 0.2, "noise_clip": 0.5, "target_every": 2},
    {
        "critic": "critic",
        "target_critic": "target_critic",
        "actor": "actor",
        "target_actor": "target_actor",
    },
)
BAM = Case("golden_bam", "default", "bam", SMALL | {"inverse_temperature": 10.0})
DIFFUSION = {"critic": "critic", "target_critic": "target_critic", "actor": "policy"}
QSM = Case(
    "golden_qsm",
    "default",
    "qsm",
    SMALL | {"inverse_temperature": 10.0, "alpha": 10.0, "time_features": 16},
    DIFFUSION,
    of_diffusion,
)
DAC = Case(
    "golden_dac",
    "default",
    "dac",
    SMALL | {"alpha": 1.0, "time_features": 16},
    DIFFUSION,
    of_diffusion,
)

FAWAC = Case(
    "golden_fawac",
    "default",
    "fawac",
    SMALL | {"inverse_temperature": 10.0},
    CRITICS | {"value": "value", "actor": "policy"},
)
FBRAC = Case(
    "golden_fbrac", "default", "fbrac", SMALL | {"alpha": 100.0}, CRITICS | {"actor_flow": "policy"}
)
TRQAM = Case("golden_trqam", "default", "trqam", SMALL)

CGQL, CGQL_MSE, CGQL_LINEX = (
    Case(
        f"golden_cgql_{name}",
        name,
        agent,
        SMALL | {"inverse_temperature": 1.0, "guidance": 0.1} | options,
        CRITICS | {"actor": "behaviour", "target_actor": "target_behaviour"},
    )
    for name, agent, options in (
        ("simple", "cgql", {}),
        ("mse", "cgql-mse", {"noisy_weight": 0.001}),
        ("linex", "cgql-linex", {"noisy_weight": 0.001}),
    )
)

CASES = (
    QAM,
    ALT,
    RESIDUAL,
    QAM_F,
    QAM_E,
    FQL,
    IFQL,
    BAM,
    FEDIT,
    DSRL,
    FAWAC,
    FBRAC,
    QSM,
    DAC,
    REBRAC,
    TRQAM,
    CGQL,
    CGQL_MSE,
    CGQL_LINEX,
)
