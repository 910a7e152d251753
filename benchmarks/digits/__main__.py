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
from dataclasses import replace

import torch
import tyro
from torch import Tensor, nn

from adjoint import Tilted, certify
from adjoint.rejection import CUT, acceptance
from applications.toy2d.digits.classifier import Classifier, DigitReward
from applications.toy2d.digits.data import CLASSES, DIM, Digits, load
from applications.toy2d.digits.metrics import Comparison, compare_classes, training_distances
from applications.toy2d.digits.run import (
    ode_samples,
    tilt_digits,
    train_base,
    train_classifier,
)
from benchmarks.digits import figure
from benchmarks.digits.config import BenchmarkConfig
from benchmarks.digits.figure import KINDS
from flows.training import choose_device, prepare_process, write_json

Row = dict[str, str | int | float]


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
        "refine_steps": config.refine_steps or 0,
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
        figure.plot(config.output.with_suffix(".png"), found)


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig, prog="python -m benchmarks.digits"))
