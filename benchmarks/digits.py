"""Is the tilt right on real data?  Handwritten digits at several temperatures.

A flow of scikit-learn's digits is tilted toward log P(digit | x) / T.  The frequencies of the ten
classes are compared with importance-resampled samples of the base, for four kinds of sample:

``ode``       the tilted ODE, against samples of the base's ODE;
``chain``     the tilted memoryless chain, against samples of the base's chain;
``weighted``  the tilted chain with the weights of its certificate, which `Certificate.resample`
              uses, against the base's chain;
``accepted``  samples of the exact tilt by `Tilted.sample_exact`: new trajectories of the tilted
              chain, accepted by their weights (column ``acceptance``), against the base's chain.

ODE and chain of the base sample different distributions (column ``distribution_gap``, the total
variation between the classes of their exact tilts), so that each kind is compared with its own.  z
is the difference over the joint standard error of both sides; ``within`` counts the classes with z
in [-2, 2]; an exact tilt misses one class in twenty.  ``log_z`` of the certificate belongs to the
chain, and so does its exact value.  Distances to the nearest training image are taken over images
recognised as the digit: of the base, of the base weighted by the exact tilt, of the tilted samples,
and held-out images.

Run: ``python -m benchmarks.digits``, 20 to 30 minutes a temperature on one core; a stopped run
continues from its checkpoint.  Writes ``results/digits.json`` and ``results/digits.png``.
``results/digits_informed.json`` holds the first three kinds for a model that sees the reward, with
control variates, on a quarter of the trajectories: ``--informed --control-variates
--compile --iterations 1500 --batch-size 128 --lr 3e-3``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from adjoint import Tilted, certify
from adjoint.rejection import CUT, acceptance
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
from benchmarks.common.records import RESULTS
from flows.training import choose_device, prepare_process, write_json

Row = dict[str, str | int | float]
KINDS = ("ode", "chain", "weighted", "accepted")
"""Kinds of sample."""


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
    """Fraction of the updates, the last ones, that minimise the variance of log w."""
    refine_steps: int = 0
    """Steps of the chain in those updates and in the certificate; 0 takes ``steps``."""
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
    """Draw ``n`` samples (n, 64) of the base's chain, independent of the certificate's."""
    base, device = tilted.base, tilted.kernel.t.device
    generator = torch.Generator(device).manual_seed(seed)
    x0 = torch.randn(n, DIM, generator=generator, device=device)
    return certify(base, base, reward, tilted.kernel, x0, generator=generator).samples


def compare_kinds(
    config: BenchmarkConfig,
    temperature: float,
    tilted: Tilted,
    base: Tensor,
    classifier: Classifier,
    reward: DigitReward,
) -> tuple[dict[str, Comparison], dict[str, Tensor]]:
    """Return the comparison and the tilted samples of each kind; ``base`` are ODE samples."""
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
        kind: compare_classes(
            classifier,
            base if kind == "ode" else chain,
            samples[kind],
            reward,
            temperature,
            weights=after.weights if kind == "weighted" else None,
        )
        for kind in KINDS
    }
    return found, samples


def make_row(
    config: BenchmarkConfig,
    temperature: float,
    kind: str,
    tilted: Tilted,
    comparisons: dict[str, Comparison],
    nearest: dict[str, float],
) -> Row:
    """Return a row: one temperature and one kind of sample."""
    after, before = tilted.certificate, tilted.certificate_base
    assert after is not None
    assert before is not None
    own = comparisons[kind]
    row: Row = {
        "digit": config.digit,
        "temperature": temperature,
        "kind": kind,
        "kernel": config.kernel,
        "steps": config.steps,
        "iterations": config.iterations,
        "batch_size": config.batch_size,
        "lr": config.lr,
        "informed": config.informed,
        "control_variates": config.control_variates,
        "refine_fraction": config.refine_fraction,
        "refine_steps": config.refine_steps,
        "device": config.device,
        "base_samples": config.base_samples,
        "samples": config.samples,
        "within": int((own.z.abs() <= 2).sum()),
        "max_z": float(own.z.abs().max()),
        "class_tv": own.total_variation,
        "distribution_gap": float(
            (comparisons["ode"].exact - comparisons["chain"].exact).abs().sum() / 2
        ),
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
    """Draw the class frequencies: a row for each temperature, a column for each kind of sample."""
    sheet, axes = style.sheet(
        len(found),
        len(KINDS),
        (4.6, 1.9),
        title="Class frequencies by temperature and kind of sample",
        subtitle="error bars: two standard errors of the resampled base",
        gap=(0.5, 0.6),
        margin=(0.7, 0.4, 1.1, 0.6),
    )
    series = (("base", style.BASE), ("tilted flow", style.TILTED), ("exact tilt", style.EXACT))
    where = np.arange(CLASSES)
    for i, (temperature, comparisons) in enumerate(found.items()):
        for j, kind in enumerate(KINDS):
            ax, own = axes[i, j], comparisons[kind]
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
            style.heading(ax, f"T = {temperature:g}, {kind}", caption=caption)
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
    """Tilt at one temperature; return the rows and the comparisons."""
    started = time.perf_counter()
    reward = DigitReward(classifier, config.digit)
    options = config.tilted_at(temperature)
    tilted = tilt_digits(options, base, reward, name=f"tilt-{temperature:g}")
    comparisons, samples = compare_kinds(config, temperature, tilted, before, classifier, reward)
    rows = []
    for kind in KINDS:
        if kind != "weighted":  # whose samples are those of the chain
            resampled = comparisons[kind].resampled
            nearest = training_distances(classifier, data, config.digit, samples[kind], resampled)
        row = make_row(config, temperature, kind, tilted, comparisons, nearest)
        row["classifier_accuracy"] = classifier.accuracy(data.test, data.test_labels)
        row["seconds"] = time.perf_counter() - started
        rows.append(row)
    return rows, comparisons


def line(row: Row) -> str:
    """Return a row of the printed table."""
    text = (
        "T {temperature:<4g} {kind:<9} fraction {fraction_tilted:.4f} exact {fraction_exact:.4f} "
        "± {fraction_exact_stderr:.4f}  TV {class_tv:.4f}  within {within}/10  log Z {log_z:.4f} "
        "± {log_z_stderr:.4f} exact {log_z_exact:.4f} ± {log_z_exact_stderr:.4f}  ESS {ess:.3f}  "
        "acceptance {acceptance:.3f}"
    )
    return text.format_map(row)


def main(config: BenchmarkConfig) -> None:
    """Measure every temperature, print a table, and write the rows and the figure."""
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
        write_json(config.output, rows)
        for row in new:
            print(line(row), flush=True)
        figure(config.output.with_suffix(".png"), found)


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig, prog="python -m benchmarks.digits"))
