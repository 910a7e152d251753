"""One run on real data: a flow of handwritten digits, tilted toward the log-probability of one.

The tilt is compared with importance-resampled samples of the base (`metrics`), once for samples by
the ODE and once for samples by the memoryless chain.

A run's folder holds ``config.json``, ``classifier.csv``, ``base.csv``, ``tilt.csv`` (metrics),
three checkpoints of the same names, ``report.json``, ``digits.png`` and ``classes.png``.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict

import torch
from torch import Tensor, nn

from adjoint import Reward, Tilted, reward_informed, tilt
from adjoint.certificate import ENOUGH
from applications.common.callbacks import training_callbacks
from applications.common.kernels import load_scheme
from applications.common.lock import locked
from applications.common.run_folder import start_run, write_config
from applications.toy2d.digits import pictures as images
from applications.toy2d.digits.classifier import Classifier, DigitReward, fit_classifier
from applications.toy2d.digits.config import DigitsConfig
from applications.toy2d.digits.data import DIM, SIZE, Digits, load
from applications.toy2d.digits.metrics import Comparison, compare_classes, training_distances
from applications.toy2d.digits.mlp_flow import fit_mlp
from applications.toy2d.exact_tilt import mask_unreliable
from applications.toy2d.kernels import by_name, check_scheme
from applications.toy2d.run_folder import FILES
from flows import VelocityField, sample
from flows.training import ensure_writable, write_json

Report = dict[str, str | int | float]

SAMPLE_STEPS = 50
"""Adams-Bashforth steps of every ODE sample."""

OF_ODE = (
    *("target_fraction_exact", "target_fraction_exact_stderr"),
    *("class_tv", "reward_exact", "nn_distance_exact"),
)
OF_CHAIN = (
    *("chain_fraction_exact", "chain_fraction_exact_stderr"),
    *("chain_class_tv", "log_z_exact", "log_z_exact_stderr"),
)
"""Numbers of a report that are made with the exact tilt, by the ODE and by the chain."""


def ode_samples(field: VelocityField, n: int, *, seed: int, device: str = "cpu") -> Tensor:
    """Draw ``n`` images (n, 64) by the ODE of ``field``, from noise that depends only on ``seed``.

    The noise is drawn on the CPU; ``device`` is the device of the field.
    """
    x0 = torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed)).to(device)
    parts = [sample(field, part, grid=SAMPLE_STEPS, method="ab2") for part in x0.split(4096)]
    return torch.cat(parts)


def train_classifier(config: DigitsConfig, data: Digits) -> Classifier:
    """Train or resume the classifier of a run."""
    return fit_classifier(
        data,
        iterations=config.classifier_iterations,
        seed=config.seed,
        callbacks=training_callbacks("digits: classifier", config.folder / "classifier.csv"),
        checkpoint=config.folder / "classifier.pt",
        resume=config.resume,
    )


def train_base(config: DigitsConfig, data: Digits) -> nn.Module:
    """Train or resume the base flow of a run."""
    return fit_mlp(
        data,
        iterations=config.base_iterations,
        batch_size=config.base_batch_size,
        width=config.width,
        seed=config.seed,
        callbacks=training_callbacks("digits: base", config.folder / "base.csv"),
        checkpoint=config.folder / "base.pt",
        resume=config.resume,
    )


def tilt_digits(
    config: DigitsConfig, base: nn.Module, reward: DigitReward, *, name: str = "tilt"
) -> Tilted:
    """Train or resume the tilt of a run; its files are called ``name``."""
    names = ["digit", "width", "informed"]
    names += ["base_iterations", "base_batch_size", "classifier_iterations"]
    model = None
    if config.informed:
        model = reward_informed(
            base,
            Reward(reward, scale=1 / config.temperature),
            DIM,
            hidden=[config.width] * 3,
            seed=config.seed,
        )
    return tilt(
        base,
        reward,
        shape=(DIM,),
        config=config.tilt_options,
        model=model,
        callbacks=training_callbacks(f"digits: {name}", config.folder / f"{name}.csv"),
        checkpoint=config.folder / f"{name}.pt",
        resume=config.resume,
        identity={key: getattr(config, key) for key in names},
        device=config.device,
    )


def make_report(config: DigitsConfig, tilted: Tilted, ode: Comparison, chain: Comparison) -> Report:
    """Collect the numbers of a run.

    Rewards (unscaled) and ``target_fraction_*`` are means over samples by the ODE;
    ``chain_fraction_*``, the log-weights and both log Z are means over samples by the chain.
    """
    after, before = tilted.certificate, tilted.certificate_base
    assert after is not None
    assert before is not None
    d = config.digit
    return {
        "digit": d,
        "temperature": config.temperature,
        "kernel": load_scheme(config.kernel).name,
        "steps": config.steps,
        "target_fraction_base": float(ode.base[d]),
        "target_fraction_tilted": float(ode.tilted[d]),
        "target_fraction_tilted_stderr": float(ode.tilted_error[d]),
        "target_fraction_exact": float(ode.exact[d]),
        "target_fraction_exact_stderr": float(ode.exact_error[d]),
        "class_tv": ode.total_variation,
        "chain_fraction_base": float(chain.base[d]),
        "chain_fraction_tilted": float(chain.tilted[d]),
        "chain_fraction_exact": float(chain.exact[d]),
        "chain_fraction_exact_stderr": float(chain.exact_error[d]),
        "chain_class_tv": chain.total_variation,
        "log_z": after.log_z,
        "log_z_stderr": after.log_z_stderr,
        "log_z_exact": chain.resampled.log_z,
        "log_z_exact_stderr": chain.resampled.log_z_stderr,
        "log_weight_std_base": before.log_weight_std,
        "log_weight_std": after.log_weight_std,
        "ess_base": before.ess,
        "ess": after.ess,
        "path_kl": after.path_kl,
    }


def run(config: DigitsConfig) -> Report:
    """Train or resume classifier, base and tilt, compare with the exact tilt, and write the folder.

    Returns:
        The content of report.json.

    Raises:
        ValueError: an unknown kernel, an option out of range, or a folder that is not free
            (`applications.common.run_folder`); before any file changes.
        OSError: the folder cannot be written; before any training.
        RunError: another run is in the folder.
        CheckpointError: resuming from a file that is damaged or of another run.
        TrainingDiverged: a loss became NaN; the last good checkpoint is kept.
    """
    config = config.sized
    check_scheme(config.tilt_options, DIM)  # before files change, and classifier and base train
    ensure_writable(config.folder / "report.json", "folder")
    with locked(config.folder):
        return _run(config)


def _run(config: DigitsConfig) -> Report:
    """Run in a folder that is locked, with options that are known to be in order."""
    started = time.perf_counter()
    settings = asdict(config) | {"kernel": str(by_name(load_scheme(config.kernel)))}
    start_run(config.folder, FILES, settings, resume=config.resume, overwrite=config.overwrite)
    data = load(config.seed)
    classifier = train_classifier(config, data).to(config.device)
    base = train_base(config, data).to(config.device)
    data = data.to(config.device)
    reward = DigitReward(classifier, config.digit)
    tilted = tilt_digits(config, base, reward)
    write_config(config.folder, settings)  # once the checkpoints have accepted a resume

    print("digits: drawing samples and pictures", file=sys.stderr)
    first = 1000 * config.seed + 1
    before = ode_samples(base, 2 * config.samples, seed=first, device=config.device)
    after = ode_samples(tilted.field, config.samples, seed=first + 1, device=config.device)
    ode = compare_classes(classifier, before, after, reward, config.temperature)
    assert tilted.certificate is not None
    assert tilted.certificate_base is not None
    chain = compare_classes(
        classifier,
        tilted.certificate_base.samples,
        tilted.certificate.samples,
        reward,
        config.temperature,
    )
    report = make_report(config, tilted, ode, chain)
    report |= {
        "reward_base": float(reward(before).mean()),
        "reward_tilted": float(reward(after).mean()),
        "reward_exact": ode.resampled.reward_tilted * config.temperature,
    }
    report |= training_distances(classifier, data, config.digit, after, ode.resampled)
    report = mask_unreliable(report, OF_ODE, ode.resampled, "the base's ODE")
    report = mask_unreliable(report, OF_CHAIN, chain.resampled, "the base's chain")
    report["classifier_accuracy"] = classifier.accuracy(data.test, data.test_labels)
    save_pictures(config, before, after, ode)
    report["seconds"] = time.perf_counter() - started
    write_json(config.folder / "report.json", report)
    return report


def save_pictures(config: DigitsConfig, before: Tensor, after: Tensor, ode: Comparison) -> None:
    """Write digits.png (images before and after) and classes.png (frequencies).

    The frequencies of the exact tilt are left out where too few effective samples know them.
    """
    about = f"reward log P({config.digit} | x), temperature {config.temperature:g}"
    d = config.digit
    known = ode.resampled.effective >= ENOUGH
    images.image_grid(
        config.folder / "digits.png",
        before[:96].reshape(-1, SIZE, SIZE).cpu(),
        after[:96].reshape(-1, SIZE, SIZE).cpu(),
        value_range=(-1, 1),
        title=f"Handwritten digits, tilted toward {d}",
        subtitle=about,
        captions=(f"{ode.base[d]:.0%} are a {d}", f"{ode.tilted[d]:.0%} are a {d}"),
    )
    images.class_frequencies(
        config.folder / "classes.png",
        ode.base,
        ode.tilted,
        ode.exact if known else None,
        tilted_error=ode.tilted_error,
        exact_error=ode.exact_error if known else None,
        title="Which digits are drawn",
        subtitle=f"frequency of each digit; {about}",
    )
