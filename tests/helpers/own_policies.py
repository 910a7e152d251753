"""Flow policies from outside the package, for chunks of three actions in the corridor, and others.

Their velocities have closed forms, so that a test can say what an agent must get from them.
"""

import torch
from torch import nn

from flows import batch_time
from flows.pretrained import load

CHUNK, OBS = 6, 4


def toward(x, t, cond):
    """Move to the first observation, without any parameter."""
    return (cond["observation"][:, :1] - x) / (1.1 - batch_time(t, x))


class Policy(nn.Module):
    """A network with the call of a velocity field."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.3 * torch.randn(CHUNK + OBS, CHUNK, generator=generator))

    def forward(self, x, t, cond=None):
        return torch.cat([x, cond["observation"]], 1) @ self.weight * (2 - batch_time(t, x))


class ActorVectorField(nn.Module):
    """A flow actor in the manner of FQL: observations first, times (B, 1)."""

    def __init__(self):
        super().__init__()
        self.inner = Policy()

    def forward(self, observations, actions, times=None):
        assert times.shape == (len(actions), 1)
        return self.inner(actions, times[:, 0], {"observation": observations})


class ActionExpert(nn.Module):
    """A network in the manner of pi0: time 1 is noise, and the output is noise - actions."""

    def __init__(self):
        super().__init__()
        self.inner = Policy()

    def forward(self, x_t, time, state):
        return -self.inner(x_t, 1 - time, {"observation": state})


def expert():
    """Adapt the network by its convention."""
    return load(ActionExpert(), convention="pi0", quiet=True)


class Noisy(Policy):
    """A policy with dropout."""

    def forward(self, x, t, cond=None):
        return nn.functional.dropout(super().forward(x, t, cond), 0.5, self.training)


class Counting(Policy):
    """A policy that keeps statistics of its batches."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x, t, cond=None):
        self.seen += 1
        return super().forward(x, t, cond)


class Detached(Policy):
    """A policy for sampling only."""

    @torch.no_grad()
    def forward(self, x, t, cond=None):
        return super().forward(x, t, cond)


class TwoConditions(nn.Module):
    """A policy that needs more than an observation."""

    def forward(self, x_t, time, state, prompt):
        return x_t


def two_conditions():
    """Adapt the network by its convention."""
    return load(TwoConditions(), convention="pi0", quiet=True)


def flat_time(x, t, cond):
    """Take a scalar time only, or by accident as many times as components."""
    return x * t + cond["observation"][:, :1]


def narrow(x, t, cond):
    """Return a velocity of another shape."""
    return x[:, 1:]


number = 3
