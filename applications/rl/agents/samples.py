"""What the losses of an update take from the agent as it is: sampled first, without gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from adjoint import Kernel


@dataclass(frozen=True)
class Chain:
    """States ``xs`` (K+1, B, chunk_dim) of the memoryless chain of a policy, and its table."""

    kernel: Kernel
    xs: Tensor


@dataclass(frozen=True)
class Samples:
    """Samples of an agent at a batch; what its losses do not use is None.

    Attributes:
        next_chunks: (B, chunk_dim) the policy's chunks at the next observations.
        flow_chunks: (B, chunk_dim) the flow's chunks at the observations, to imitate or to edit.
        chain: at the observations.
    """

    next_chunks: Tensor | None = None
    flow_chunks: Tensor | None = None
    chain: Chain | None = None
