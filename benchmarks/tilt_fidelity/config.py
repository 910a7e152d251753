"""Options of `benchmarks.tilt_fidelity`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.records import RESULTS

SCHEMES = (
    "covariance_matched_refined",
    "moment_matched_refined",
    "moment_matched",
    "euler_published",
    "ancestral",
    "euler_consistent",
)


@dataclass(frozen=True)
class FidelityConfig:
    """Measure trained tilts against exact ones.

    Without options: every kernel on the moderate problems, at equal training budgets.  --default
    measures the call tilt(base, reward, shape=...) instead, on moderate and hard problems.
    --random SEED does that on problems which the seed draws.
    """

    problems: tuple[str, ...] = ()
    """Problems to run; by default the moderate ones, with --default the hard ones too.  Names:
    TARGET/REWARD (ring, grid, two_gaussians by linear, ring, half_plane, peaks), mixture-2d, -8d,
    -32d, -64d, -256d, narrow_two/linear, narrower_two/linear, rare_1e-2/linear, rare_1e-3/linear,
    weights_1_10_100/linear, strong/quadratic, gaussian-256d, ring-64d, random-SEED-INDEX."""
    default: bool = False
    """Measure the call without options."""
    random: int | None = None
    """Measure the call without options on mixtures in 1 to 16 dimensions that this seed draws."""
    count: int = 20
    """With --random, the number of problems."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """With --default, seeds of each problem: the only option that the call is given.  With
    --random it is 0."""
    peers: bool = False
    """With --default or --random, run the peers too, each with as many evaluations of base and
    model as the call without options took: the published pair, the variance of log w alone, and
    adjoint sampling."""
    kernels: tuple[str, ...] = SCHEMES
    """Kernels to compare; the suffix _refined ends with updates on the log-variance loss, _weighted
    adds importance weights, and without a suffix all updates are on the adjoint-matching loss."""
    steps: tuple[int, ...] = (10, 40, 20)
    """Numbers of steps K in the comparison of kernels."""
    iterations: int = 700
    """Updates of every run in the comparison of kernels."""
    batch_size: int = 128
    """Trajectories in each update in the comparison of kernels."""
    workers: int = 2
    """Number of processes, one thread each."""
    output: Path = RESULTS / "tilt_fidelity.json"
    """File of the rows; missing rows are added to it.  Unless another is named, the rows of
    --default go to tilt_default.json beside it, and those of --random are only printed."""

    def __post_init__(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            ValueError: --random with problems or --default, which choose other problems, or --peers
                without a call that they are measured against.
        """
        if self.random is not None and (self.problems or self.default):
            raise ValueError(
                f"problems must be empty and default False with random={self.random}, which draws "
                f"its own problems, got problems={self.problems}, default={self.default}"
            )
        if self.peers and not (self.default or self.random is not None):
            raise ValueError("peers must be False without default or random, got True")

    @classmethod
    def budget(cls) -> tuple[int, int]:
        """Return the default updates and batch size: the budget that the figure compares."""
        return cls.iterations, cls.batch_size

    @property
    def record(self) -> Path | None:
        """The file of the rows; None where they are only printed."""
        if self.output != type(self).output:
            return self.output
        if self.random is not None:
            return None
        return RESULTS / "tilt_default.json" if self.default else self.output
