"""Problems and options of the frontier of digits, see `benchmarks.digits_frontier`."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.records import RESULTS

SHARED = (
    *("seed", "widths", "base_iterations", "classifier_iterations", "guidance"),
    *("ode_steps", "samples", "batch", "digit"),
)
"""Names of the options that every point depends on."""


@dataclass(frozen=True)
class Problem:
    """A base and a reward.

    Attributes:
        reward: name of a reward in `benchmarks.digits_frontier.rewards`.
        labelled: tilt the class-conditional base under guidance instead of the plain base.
        temperatures, lora: temperatures of the tilts by a correction and by adapters.
        strengths: weights of gradient guidance.
        iterations: updates of a tilt.
    """

    reward: str
    labelled: bool
    temperatures: tuple[float, ...]
    lora: tuple[float, ...]
    strengths: tuple[float, ...]
    iterations: int


PROBLEMS = {
    "digit": Problem("digit", False, (2, 4, 8), (4,), (0.125, 0.25, 0.5, 1), 800),
    "ink": Problem("ink", False, (1, 2), (1,), (0.25, 0.5, 1, 2), 400),
    "symmetry": Problem("symmetry", False, (1, 2), (), (0.25, 0.5, 1, 2), 400),
    "guided ink": Problem("ink", True, (1, 2), (), (0.25, 0.5, 1), 400),
}


@dataclass(frozen=True)
class FrontierConfig:
    """Reward against diversity of tilted digits and of the alternatives."""

    problems: tuple[str, ...] = tuple(PROBLEMS)
    """Problems to run, names in PROBLEMS."""
    digit: int = 3
    """The digit whose log-probability is a reward."""
    kernel: str = "moment_matched"
    """Kernel of the memoryless chain."""
    steps: int = 16
    """Steps K of the chain, and Euler steps of reward backpropagation."""
    iterations: int = 0
    """Updates of each tilt; 0 takes the number in PROBLEMS."""
    batch_size: int = 192
    """Trajectories in each update."""
    lr: float = 1e-3
    """Learning rate of the tilts."""
    lora_rank: int = 8
    """Rank of the adapters."""
    lora_lr: float = 4e-3
    """Learning rate of the adapters."""
    min_ess: float = 0.2
    """Smallest effective sample size / B at which trajectories are weighted."""
    guidance: float = 1.5
    """Classifier-free guidance weight of the labelled flow."""
    widths: tuple[int, ...] = (32, 64)
    """Channels of the UNet by resolution."""
    base_iterations: int = 3000
    """Updates of each base flow."""
    classifier_iterations: int = 600
    """Updates of the classifier."""
    stops: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of updates of reward backpropagation; each gives a point of its frontier."""
    backprop_batch: int = 96
    """Samples in each update of reward backpropagation."""
    backprop_lr: float = 1e-3
    """Learning rate of reward backpropagation."""
    candidates: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Numbers n of candidates of best-of-n."""
    base_samples: int = 32_768
    """Samples of each base by its ODE and by its chain, for best-of-n and importance resampling."""
    samples: int = 4096
    """Samples of every other distribution."""
    batch: int = 512
    """Samples in a batch of the metrics."""
    ode_steps: int = 25
    """Adams-Bashforth steps of every ODE sample."""
    kl_probes: int = 1
    """Random sign vectors for each sample's divergences in the KL to the base."""
    compile: bool = False
    """Compile base and model for the updates of the tilts."""
    seed: int = 0
    """Seed of everything random."""
    threads: int = 1
    """Threads of PyTorch."""
    folder: Path = Path("outputs/benchmark-digits-frontier")
    """Folder of everything that has been computed."""
    output: Path = RESULTS / "digits_frontier.json"
    """File of the rows; the figures are written beside it."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.problems if name not in PROBLEMS]
        if unknown:
            raise ValueError(f"problems must be of {', '.join(PROBLEMS)}, got {unknown}")
        if self.samples < 2 * self.batch:
            raise ValueError(
                f"samples must be at least two batches of {self.batch}, got {self.samples}"
            )
        if self.kl_probes < 1:
            raise ValueError(f"kl_probes must be at least 1, got {self.kl_probes}")
        if self.base_samples < 2 * self.batch * max(self.candidates):
            raise ValueError(
                f"base_samples must give two batches of {self.batch} for the best of "
                f"{max(self.candidates)}, got {self.base_samples}"
            )

    def identity(self, *names: str) -> dict[str, Any]:
        """Return the options ``names`` and `SHARED` as plain data, the identity of a result."""
        found = {name: getattr(self, name) for name in (*SHARED, *names)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}

    def seed_of(self, name: str) -> int:
        """Return the seed of the computation called ``name``."""
        return (zlib.crc32(name.encode()) + self.seed) % 2**31
