"""Options of `benchmarks.digits`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adjoint import RefineLoss
from applications.toy2d.digits.config import DigitsConfig
from benchmarks.common.records import RESULTS


@dataclass(frozen=True)
class BenchmarkConfig:
    """Tilt the digits at several temperatures and compare the frequency of every class."""

    digit: int = 3
    """The digit whose log-probability is the reward."""
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Temperatures of the tilt."""
    kernel: str = "moment_matched"
    """Kernel of the memoryless chain."""
    steps: int = 40
    """Steps K of the chain."""
    iterations: int = 3000
    """Updates of each tilt."""
    batch_size: int = 256
    """Trajectories in each update."""
    lr: float = 1e-3
    """Learning rate of the tilts."""
    informed: bool = False
    """Train a model that sees the reward (`adjoint.reward_informed`), not a copy of the base."""
    control_variates: bool = False
    """Subtract control variates from the adjoints (`adjoint.chain.control_variates`)."""
    refine_fraction: float = 0.0
    """Fraction of the updates, the last ones, that refine the tilt with ``refine_loss``."""
    refine_loss: RefineLoss = "log_variance"
    """Loss of these updates."""
    refine_steps: int | None = None
    """Steps of the chain in those updates and in the certificate."""
    min_ess: float = 0.2
    """Smallest effective sample size / B at which trajectories are weighted."""
    base_iterations: int = 2000
    """Updates of the base flow."""
    base_batch_size: int = 256
    """Images in each update of the base flow."""
    base_samples: int = 131_072
    """Samples of the base to resample."""
    samples: int = 32_768
    """Samples of each kind."""
    seed: int = 0
    """Seed of everything random."""
    threads: int = 1
    """Threads of PyTorch."""
    compile: bool = False
    """Compile the networks for the updates."""
    device: str = "cpu"
    """Device of training and sampling: cpu, cuda, or auto."""
    folder: Path = Path("outputs/benchmark-digits")
    """Folder of checkpoints and logs."""
    output: Path = RESULTS / "digits.json"
    """File of the rows; the figure is written beside it."""

    def tilted_at(self, temperature: float) -> DigitsConfig:
        """Return the options of the tilt at one temperature; all share base and classifier."""
        return DigitsConfig(
            digit=self.digit,
            temperature=temperature,
            kernel=self.kernel,
            steps=self.steps,
            iterations=self.iterations,
            batch_size=self.batch_size,
            lr=self.lr,
            informed=self.informed,
            control_variates=self.control_variates,
            refine_fraction=self.refine_fraction,
            refine_loss=self.refine_loss,
            refine_steps=self.refine_steps,
            min_ess=self.min_ess,
            compile=self.compile,
            device=self.device,
            base_iterations=self.base_iterations,
            base_batch_size=self.base_batch_size,
            samples=self.samples,
            seed=self.seed,
            folder=self.folder,
            resume=True,
        )
