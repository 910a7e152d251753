"""Small agents in float64 with no trivial parameter, and batches with every kind of window."""

from dataclasses import replace

import torch

from applications.rl import AGENTS, Batch, make_agent

OBS, ACT, HORIZON, B = 5, 2, 3, 6

OPTIONS = {
    "bc": {},
    "qam": {"inverse_temperature": 0.8},
    "qam-e": {"inverse_temperature": 0.8, "edit_scale": 0.3},
    "qam-f": {"inverse_temperature": 0.8, "alpha": 3.0},
    "fql": {"alpha": 5.0},
    "ifql": {"expectile": 0.8, "best_of_n": 4},
    "bam": {"inverse_temperature": 5.0},
    "fedit": {"edit_scale": 0.3},
    "dsrl": {"latent_scale": 0.8},
    "fawac": {"inverse_temperature": 2.0},
    "fbrac": {"alpha": 0.3},
    "rlpd": {"bc_alpha": 0.4},
    "rebrac": {"alpha": 0.3, "noise_clip": 0.25},
    "trqam": {"kl_budget": 0.7, "discount": 0.99},
    "sqam": {"value_penalty": 0.4, "discount": 0.99},
    "cgql": {"inverse_temperature": 2.0},
    "cgql-mse": {"inverse_temperature": 2.0, "noisy_weight": 0.7},
    "cgql-linex": {"inverse_temperature": 2.0, "noisy_weight": 0.7},
    "rql": {"alpha": 3.0, "expectile": 0.8},
    "qsm": {"inverse_temperature": 3.0, "alpha": 2.0, "time_features": 6},
    "dac": {"alpha": 2.0, "time_features": 6},
}
SHARED = {"hidden": (8, 7), "horizon": HORIZON, "flow_steps": 4, "critics": 3}


def make(name, *, seed=0, dtype=torch.float64, shake=0.1, **options):
    """An agent whose target networks differ from their networks."""
    config = AGENTS[name].config_class()
    options = SHARED | OPTIONS[name] | options
    config = replace(config, **{k: v for k, v in options.items() if hasattr(config, k)})
    agent = make_agent(config, OBS, ACT, seed).to(dtype)
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in agent.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
            parameter.add_(shake * noise)
    return agent


def batch(seed=0, dtype=torch.float64, size=B):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    masks, valid = torch.ones(size, dtype=dtype), torch.ones(size, dtype=dtype)
    masks[1::4] = 0.0
    valid[2::3] = 0.0
    return Batch(
        observations=randn(size, OBS),
        actions=randn(size, HORIZON, ACT).tanh(),
        rewards=randn(size),
        masks=masks,
        valid=valid,
        next_observations=randn(size, OBS),
    )


def noise(agent, seed=0, size=B):
    return agent.draw_noise(size, torch.Generator().manual_seed(seed))


def measure(agent, data, eps):
    """Take a batch into the running error of the kernel, as an update does."""
    chunks, cond = agent.flatten(data.actions), {"observation": data.observations}
    agent.kernel.measure(agent.flow.reference, eps["bc_x0"], chunks, data.valid, cond)
