"""Is the tilt right on real data?  Handwritten digits at several temperatures.

A flow of scikit-learn's digits is tilted toward log P(digit | x) / T.  The frequencies of the ten
classes are held against importance-resampled samples of the base, for four kinds of sample:

``ode``       the tilted ODE, against samples of the base's ODE;
``chain``     the tilted memoryless chain, against samples of the base's chain;
``weighted``  the tilted chain with the weights of its certificate, as `Certificate.resample` draws
              from it, against the base's chain;
``accepted``  as many samples again of the exact tilt as `Tilted.sample_exact` draws them: of new
              trajectories of the tilted chain, those that their weights accept (column
              ``acceptance``), against the base's chain.

The base's two laws differ (column ``law_gap``, the total variation between the classes of their
exact tilts), so that each is compared with its own.  z is the difference over the joint standard
error of both sides; ``within`` counts the classes with z in [-2, 2], of which an exact tilt leaves
out one in twenty.  ``log_z`` of the certificate belongs to the chain, and so does its exact value.
Distances to the nearest training image are of images recognised as the digit only: of the base,
of the base weighted by the exact tilt, of the tilted samples, and of held-out images.

Run: ``python -m benchmarks.digits``, 20 to 30 minutes a temperature on one core; a run that was
stopped continues where it stood.  Writes ``results/digits.json`` and ``results/digits.png``.
``results/digits_informed.json`` holds the first three kinds with a model that sees the reward and
without the known noise, on a quarter of the trajectories: ``--informed --variates --compile
--iterations 1500 --batch-size 128 --lr 3e-3``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from adjoint import certify
from adjoint.rejection import CUT, acceptance
from adjoint.tilt import Tilted
from applications.common.pictures import style
from applications.toy2d.digits.classifier import Classifier, DigitReward
from applications.toy2d.digits.data import CLASSES, DIM, Digits, load
from applications.toy2d.digits.metrics import Comparison, compare_classes, training_distances
from applications.toy2d.digits.run import (
    DigitsConfig,
    ode_samples,
    tilt_digits,
    train_base,
    train_classifier,
)
from flows.training import choose_device, prepare_process, write_json

Row = dict[str, str | int | float]
LAWS = ("ode", "chain", "weighted", "accepted")


@dataclass(frozen=True)
class BenchmarkConfig:
    """Tilt the digits at several temperatures and judge every class."""

    digit: int = 3
    """The digit whose log-probability is the reward."""
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Temperatures of the tilt."""
    kernel: str = "moment_matched"
    """Memoryless scheme."""
    steps: int = 40
    """Steps K of the chain."""
    iterations: int = 3000
    """Updates of each tilt."""
    batch_size: int = 256
    """Trajectories an update."""
    lr: float = 1e-3
    """Learning rate of the tilts."""
    informed: bool = False
    """Train a model that sees the reward (`adjoint.informed`), not a copy of the base."""
    variates: bool = False
    """Take from the adjoints the noise that the model knows (`adjoint.chain.control_variates`)."""
    refine: float = 0.0
    """Fraction of the updates, the last ones, that minimise the variance of log w."""
    refine_steps: int = 0
    """Steps of the chain in those updates, and of what is judged; 0 is ``steps``."""
    min_ess: float = 0.2
    """Effective sample size / B from which trajectories are weighted."""
    base_iterations: int = 2000
    """Updates of the base flow."""
    base_batch_size: int = 256
    """Images an update of the base flow."""
    base_samples: int = 131_072
    """Samples of the base that are resampled."""
    samples: int = 32_768
    """Samples of each tilted law."""
    seed: int = 0
    """Seed of everything random."""
    threads: int = 1
    """Threads of PyTorch."""
    compile: bool = False
    """Compile the networks for the updates."""
    device: str = "cpu"
    """Where the tilts are trained and judged: cpu, cuda, or auto."""
    folder: Path = Path("outputs/benchmark-digits")
    """Checkpoints and logs."""
    results: Path = Path(__file__).parents[1] / "results" / "digits.json"
    """The record; the figure stands beside it."""

    def tilted_at(self, temperature: float) -> DigitsConfig:
        """Options of the tilt at one temperature; base and classifier are the same for all."""
        return DigitsConfig(
            digit=self.digit,
            temperature=temperature,
            kernel=self.kernel,
            steps=self.steps,
            iterations=self.iterations,
            batch_size=self.batch_size,
            lr=self.lr,
            informed=self.informed,
            variates=self.variates,
            refine=self.refine,
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


def chain_samples(tilted: Tilted, reward: DigitReward, n: int, seed: int) -> Tensor:
    """``n`` samples (n, 64) of the base's chain, independent of those of the certificate."""
    base, device = tilted.base, tilted.kernel.t.device
    generator = torch.Generator(device).manual_seed(seed)
    x0 = torch.randn(n, DIM, generator=generator, device=device)
    return certify(base, base, reward, tilted.kernel, x0, generator=generator).samples


def judge(
    config: BenchmarkConfig,
    temperature: float,
    tilted: Tilted,
    base: Tensor,
    classifier: Classifier,
    reward: DigitReward,
) -> tuple[dict[str, Comparison], dict[str, Tensor]]:
    """Comparisons by law, and the tilted samples by law; ``base`` are the base's ODE samples."""
    after = tilted.certificate
    assert after is not None
    chain = chain_samples(tilted, reward, config.base_samples, 1000 * config.seed + 13)
    seed = 1000 * config.seed + 12
    ode = ode_samples(tilted.field, config.samples, seed=seed, device=config.device)
    generator = torch.Generator(tilted.kernel.t.device).manual_seed(1000 * config.seed + 14)
    accepted = tilted.sample_exact(config.samples, generator=generator, progress=True)
    chained = dict.fromkeys(("chain", "weighted"), after.samples)
    samples = {"ode": ode, **chained, "accepted": accepted}
    found = {
        law: compare_classes(
            classifier,
            base if law == "ode" else chain,
            samples[law],
            reward,
            temperature,
            weights=after.weights if law == "weighted" else None,
        )
        for law in LAWS
    }
    return found, samples


def make_row(
    config: BenchmarkConfig,
    temperature: float,
    law: str,
    tilted: Tilted,
    comparisons: dict[str, Comparison],
    nearest: dict[str, float],
) -> Row:
    """One row of the record: one temperature and one law."""
    after, before = tilted.certificate, tilted.certificate_base
    assert after is not None
    assert before is not None
    own = comparisons[law]
    row: Row = {
        "digit": config.digit,
        "temperature": temperature,
        "law": law,
        "kernel": config.kernel,
        "steps": config.steps,
        "iterations": config.iterations,
        "batch_size": config.batch_size,
        "lr": config.lr,
        "informed": config.informed,
        "variates": config.variates,
        "refine": config.refine,
        "refine_steps": config.refine_steps,
        "device": config.device,
        "base_samples": config.base_samples,
        "samples": config.samples,
        "within": int((own.z.abs() <= 2).sum()),
        "max_z": float(own.z.abs().max()),
        "class_tv": own.total_variation,
        "law_gap": float((comparisons["ode"].exact - comparisons["chain"].exact).abs().sum() / 2),
        "fraction_base": float(own.base[config.digit]),
        "fraction_tilted": float(own.tilted[config.digit]),
        "fraction_exact": float(own.exact[config.digit]),
        "fraction_exact_stderr": float(own.exact_error[config.digit]),
        "log_z": after.log_z,
        "log_z_stderr": after.log_z_stderr,
        "log_z_exact": comparisons["chain"].resampled.log_z,
        "log_z_exact_stderr": comparisons["chain"].resampled.log_z_stderr,
        "log_z_ode": comparisons["ode"].resampled.log_z,
        "log_weight_std_base": before.log_weight_std,
        "log_weight_std": after.log_weight_std,
        "ess_base": before.ess,
        "ess": after.ess,
        "acceptance": acceptance(after.log_weights, CUT),
        "path_kl": after.path_kl,
        **nearest,
    }
    for c in range(CLASSES):
        row |= {
            f"base_{c}": float(own.base[c]),
            f"tilted_{c}": float(own.tilted[c]),
            f"exact_{c}": float(own.exact[c]),
            f"z_{c}": float(own.z[c]),
        }
    return row


def figure(path: Path, found: dict[float, dict[str, Comparison]]) -> Path:
    """Frequencies of the classes, a row a temperature and a column a law."""
    sheet, axes = style.sheet(
        len(found),
        len(LAWS),
        (4.6, 1.9),
        title="Which digits are drawn, by temperature and kind of sample",
        subtitle="error bars: two standard errors of the resampled base",
        gap=(0.5, 0.6),
        margin=(0.7, 0.4, 1.1, 0.6),
    )
    series = (("base", style.BASE), ("tilted flow", style.TILTED), ("exact tilt", style.EXACT))
    where = np.arange(CLASSES)
    for i, (temperature, comparisons) in enumerate(found.items()):
        for j, law in enumerate(LAWS):
            ax, own = axes[i, j], comparisons[law]
            style.chart(ax)
            for k, (values, (_, hue)) in enumerate(
                zip((own.base, own.tilted, own.exact), series, strict=True)
            ):
                ax.bar(where + 0.27 * (k - 1), values.numpy(), 0.24, color=hue)
            error = 2 * own.exact_error.numpy()
            ax.errorbar(
                where + 0.27, own.exact.numpy(), error, fmt="none", ecolor=style.MUTED, lw=1.1
            )
            ax.set_xticks(where, [str(c) for c in where])
            caption = f"TV {own.total_variation:.3f}, largest |z| {float(own.z.abs().max()):.1f}"
            style.heading(ax, f"T = {temperature:g}, {law}", caption=caption)
    style.legend(sheet, list(series))
    return style.save(sheet, path)


def measure(
    config: BenchmarkConfig,
    temperature: float,
    base: nn.Module,
    before: Tensor,
    data: Digits,
    classifier: Classifier,
) -> tuple[list[Row], dict[str, Comparison]]:
    """Tilt at one temperature: its rows and comparisons."""
    started = time.perf_counter()
    reward = DigitReward(classifier, config.digit)
    options = config.tilted_at(temperature)
    tilted = tilt_digits(options, base, reward, name=f"tilt-{temperature:g}")
    comparisons, samples = judge(config, temperature, tilted, before, classifier, reward)
    rows = []
    for law in LAWS:
        if law != "weighted":  # of the same samples as the chain's
            resampled = comparisons[law].resampled
            nearest = training_distances(classifier, data, config.digit, samples[law], resampled)
        row = make_row(config, temperature, law, tilted, comparisons, nearest)
        row["classifier_accuracy"] = classifier.accuracy(data.test, data.test_labels)
        row["seconds"] = time.perf_counter() - started
        rows.append(row)
    return rows, comparisons


def line(row: Row) -> str:
    """A row of the printed table."""
    text = (
        "T {temperature:<4g} {law:<9} fraction {fraction_tilted:.4f} exact {fraction_exact:.4f} "
        "± {fraction_exact_stderr:.4f}  TV {class_tv:.4f}  within {within}/10  log Z {log_z:.4f} "
        "± {log_z_stderr:.4f} exact {log_z_exact:.4f} ± {log_z_exact_stderr:.4f}  ESS {ess:.3f}  "
        "acceptance {acceptance:.3f}"
    )
    return text.format_map(row)


def main(config: BenchmarkConfig) -> None:
    """Measure every temperature, print a table, write the record and the figure."""
    torch.set_num_threads(config.threads)
    prepare_process()
    config = replace(config, device=str(choose_device(config.device)))
    data = load(config.seed)
    options = config.tilted_at(1.0)
    classifier = train_classifier(options, data).to(config.device)
    base = train_base(options, data).to(config.device)
    data = data.to(config.device)
    seed = 1000 * config.seed + 11
    before = ode_samples(base, config.base_samples, seed=seed, device=config.device)
    rows: list[Row] = []
    found: dict[float, dict[str, Comparison]] = {}
    for temperature in config.temperatures:
        new, found[temperature] = measure(config, temperature, base, before, data, classifier)
        rows += new
        config.results.parent.mkdir(parents=True, exist_ok=True)
        write_json(config.results, rows)
        for row in new:
            print(line(row), flush=True)
        figure(config.results.with_suffix(".png"), found)


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig))
