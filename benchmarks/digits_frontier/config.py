"""What the frontier of digits consists of, and its options: see `benchmarks.digits_frontier`."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED = (
    *("seed", "widths", "base_iterations", "classifier_iterations", "guidance"),
    *("ode_steps", "samples", "batch", "digit"),
)
"""Options that every point depends on."""


@dataclass(frozen=True)
class Problem:
    """A base and a reward.

    Attributes:
        reward: name in `benchmarks.digits_frontier.rewards`.
        labelled: the class-conditional base under guidance instead of the plain one.
        temperatures, lora: of the tilts by a correction and by adapters.
        strengths: of gradient guidance.
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
    """Which of PROBLEMS."""
    digit: int = 3
    """The digit whose log-probability is a reward."""
    kernel: str = "moment_matched"
    """Memoryless scheme."""
    steps: int = 16
    """Steps K of the chain, and Euler steps of reward backpropagation."""
    iterations: int = 0
    """Updates of each tilt; 0 is the number that PROBLEMS has."""
    batch_size: int = 192
    """Trajectories an update."""
    lr: float = 1e-3
    """Learning rate of the tilts."""
    lora_rank: int = 8
    """Rank of the adapters."""
    lora_lr: float = 4e-3
    """Learning rate of the adapters."""
    min_ess: float = 0.2
    """Effective sample size / B from which trajectories are weighted."""
    guidance: float = 1.5
    """Classifier-free guidance weight of the labelled flow."""
    widths: tuple[int, ...] = (32, 64)
    """Channels of the UNet by resolution."""
    base_iterations: int = 3000
    """Updates of each base flow."""
    classifier_iterations: int = 600
    """Updates of the classifier."""
    stops: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Updates of reward backpropagation, each a point of its frontier."""
    backprop_batch: int = 96
    """Samples an update of it."""
    backprop_lr: float = 1e-3
    """Learning rate of reward backpropagation."""
    candidates: tuple[int, ...] = (2, 4, 8, 16, 32)
    """n of best-of-n."""
    base_samples: int = 32_768
    """Samples of each law of each base, for best-of-n and importance-resampling."""
    samples: int = 4096
    """Samples of every other law."""
    batch: int = 512
    """Samples that are judged together."""
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
    """What has been computed."""
    results: Path = Path(__file__).parents[1] / "results" / "digits_frontier.json"
    """The record; the figures stand beside it."""

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
        """The options ``names`` and those that everything depends on, as plain data."""
        found = {name: getattr(self, name) for name in (*SHARED, *names)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}

    def seed_of(self, name: str) -> int:
        """A seed for what is called ``name``."""
        return (zlib.crc32(name.encode()) + self.seed) % 2**31
