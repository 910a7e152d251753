"""Handwritten digits: the data, the judge on laws that are known, and a whole run in small."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from applications.toy2d.digits import classifier as digit_classifier
from applications.toy2d.digits import data as digit_data
from applications.toy2d.digits import mlp_flow
from applications.toy2d.digits import run as digits
from applications.toy2d.digits.classifier import Classifier, DigitReward
from applications.toy2d.digits.config import DigitsConfig
from applications.toy2d.digits.metrics import (
    Comparison,
    compare_classes,
    nearest_distance,
    training_distances,
)
from applications.toy2d.digits.run import OF_CHAIN, OF_ODE
from applications.toy2d.exact_tilt import resample_tilt
from flows.matching import flow_matching_loss
from flows.sampling import sample
from flows.training.checkpoint import CheckpointError

TINY = DigitsConfig(
    kernel="ancestral",
    width=16,
    iterations=12,
    batch_size=16,
    steps=4,
    base_iterations=20,
    base_batch_size=32,
    classifier_iterations=30,
    samples=200,
)


class Template(Classifier):
    """Reads the class off the first ten pixels; a perfect classifier of `one_of`."""

    def __init__(self, sharpness: float = 1.0):
        super().__init__(4)
        self.sharpness = sharpness

    def forward(self, x):
        return self.sharpness * x[:, :10]


def one_of(n, generator, probabilities):
    """Images whose first ten pixels are one-hot: class c with probability p_c."""
    labels = torch.multinomial(probabilities, n, replacement=True, generator=generator)
    return nn.functional.one_hot(labels, 64).float()


def tilted_law(probabilities, temperature, digit, sharpness):
    """The exact tilt of the law of `one_of`, and its log Z."""
    other = -math.log(math.exp(sharpness) + 9)
    rewards = torch.full((10,), other, dtype=torch.float64)
    rewards[digit] += sharpness
    weights = probabilities.double() * (rewards / temperature).exp()
    return weights / weights.sum(), float(weights.sum().log())


def test_split_is_disjoint_complete_and_scaled():
    data = digit_data.load(3)
    assert data.test.shape == (450, 64)
    assert data.train.shape == (1347, 64)
    everything = torch.cat([data.train, data.test])
    assert everything.min() == -1
    assert everything.max() == 1
    # No image occurs twice in the whole set, so a shared one would be at distance zero.
    assert torch.cdist(data.train, data.test).min() > 0
    counts = torch.cat([data.train_labels, data.test_labels]).bincount()
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert not torch.equal(data.test, digit_data.load(4).test)


def test_noise_has_the_stated_strength():
    clean = torch.zeros(4000, 64)
    noise = digit_data.add_noise(clean, generator=torch.Generator().manual_seed(0))
    assert float(noise.std()) == pytest.approx(digit_data.NOISE, rel=0.01)
    rows = digit_data.noisy_sampler(clean)(4000, torch.Generator().manual_seed(1))
    assert float(rows.std()) == pytest.approx(digit_data.NOISE, rel=0.01)


def test_reward_is_the_log_probability_of_its_digit():
    classifier = Classifier()
    x = torch.randn(6, 64)
    together = torch.stack([DigitReward(classifier, d)(x) for d in range(10)])
    assert torch.allclose(together.exp().sum(0), torch.ones(6), atol=1e-6)
    assert torch.equal(together.argmax(0), classifier.labels(x))
    with pytest.raises(ValueError, match="digit must be one of 0 … 9, got 10"):
        DigitReward(classifier, 10)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_exact_frequencies_and_their_errors_cover_the_truth(temperature):
    """Resampled frequencies of a law whose tilt is known: z has variance about 1 and mean 0."""
    generator = torch.Generator().manual_seed(0)
    p = torch.arange(1.0, 11.0) / 55
    classifier, digit = Template(2.0), 1
    truth, log_z = tilted_law(p, temperature, digit, 2.0)
    reward = DigitReward(classifier, digit)
    errors, log_zs, zs = [], [], []
    for _ in range(60):
        drawn = one_of(1000, generator, truth.float())
        found = compare_classes(classifier, one_of(2000, generator, p), drawn, reward, temperature)
        errors.append((found.exact - truth) / found.exact_error)
        log_zs.append((found.resampled.log_z - log_z) / found.resampled.log_z_stderr)
        zs.append(found.z)
    for z in (torch.stack(errors), torch.stack(zs)):
        assert abs(float(z.mean())) < 0.15
        assert float(z.square().mean()) == pytest.approx(1.0, abs=0.25)
    assert abs(sum(log_zs) / len(log_zs)) < 0.5


def test_a_wrong_tilt_is_found_out():
    generator = torch.Generator().manual_seed(1)
    p = torch.full((10,), 0.1)
    classifier, digit = Template(2.0), 7
    reward = DigitReward(classifier, digit)
    base = one_of(20_000, generator, p)
    truth, _ = tilted_law(p, 1.0, digit, 2.0)
    right = compare_classes(classifier, base, one_of(5000, generator, truth.float()), reward, 1.0)
    wrong = compare_classes(classifier, base, one_of(5000, generator, p), reward, 1.0)
    assert right.z.abs().max() < 4
    assert right.total_variation < 0.03
    binomial = (right.tilted * (1 - right.tilted) / 5000).sqrt()
    assert torch.allclose(right.tilted_error, binomial, rtol=1e-9)
    assert wrong.z[digit] < -10
    exact_tv = float((p - truth).abs().sum() / 2)
    assert wrong.total_variation == pytest.approx(exact_tv, abs=0.03)


def test_weights_correct_samples_of_another_law():
    """Base samples with their own importance weights are the exact tilt itself."""
    generator = torch.Generator().manual_seed(2)
    p = torch.full((10,), 0.1)
    classifier = Template(2.0)
    reward = DigitReward(classifier, 2)
    base, other = one_of(20_000, generator, p), one_of(5000, generator, p)
    weights = resample_tilt(other, reward).weights
    found = compare_classes(classifier, base, other, reward, 1.0, weights=weights)
    assert found.z.abs().max() < 4
    assert compare_classes(classifier, base, other, reward, 1.0).z.abs().max() > 10


def test_distances_are_of_one_digit_only():
    """Class 0 lies on the training images, class 1 at distance one from them."""
    train = torch.zeros(1, 64)
    train[0, 0] = 1.0
    at = {0: train[0], 1: torch.zeros(64)}
    at[1][1] = 1.0
    base = torch.stack([at[0], at[1], at[1], at[0]])
    data = digit_data.Digits(train, torch.tensor([0]), base, torch.tensor([0, 1, 1, 0]))
    exact = resample_tilt(base, lambda x, cond=None: x[:, 0])
    for digit, expected in ((0, 0.0), (1, math.sqrt(2))):
        found = training_distances(Template(), data, digit, base, exact)
        for name in ("base", "exact", "tilted"):
            assert found[f"nn_distance_{name}"] == pytest.approx(expected, abs=1e-3)
    assert torch.equal(nearest_distance(train, torch.cat([base, train])), torch.zeros(1))


def test_untrained_flow_has_the_gaussian_law_of_the_images():
    data = digit_data.load()
    flow = mlp_flow.make_flow(data.train, width=16)
    x0 = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    x1 = sample(flow, x0, grid=20)
    variance = data.train.var(0) + digit_data.NOISE**2
    assert torch.allclose(x1.mean(0), data.train.mean(0), atol=0.06)
    assert torch.allclose(x1.var(0), variance, rtol=0.12, atol=0.002)


@pytest.mark.slow
def test_training_improves_the_flow_and_the_classifier_reads():
    data = digit_data.load()
    classifier = digit_classifier.fit_classifier(data, iterations=150)
    assert classifier.accuracy(data.test, data.test_labels) > 0.93
    assert not any(p.requires_grad for p in classifier.parameters())
    before = mlp_flow.make_flow(data.train, width=128)
    after = mlp_flow.fit_mlp(data, iterations=600, batch_size=128, width=128)
    with torch.no_grad():
        losses = [
            float(
                flow_matching_loss(
                    field,
                    digit_data.add_noise(data.test.repeat(8, 1), generator=generator),
                    generator=generator,
                )[0]
            )
            for field in (before, after)
            for generator in [torch.Generator().manual_seed(0)]
        ]
    assert losses[1] < losses[0] - 0.008


@pytest.mark.slow
def test_a_run_writes_its_folder_and_resumes_to_the_same_numbers(tmp_path):
    folder = tmp_path / "digits"
    report = digits.run(replace(TINY, folder=folder))
    assert json.loads((folder / "report.json").read_text()) == report
    assert all(math.isfinite(v) for v in report.values() if isinstance(v, float))
    assert report["digit"] == 3
    assert report["log_z"] < 0
    assert 0 <= report["target_fraction_tilted"] <= 1
    for name in ("digits.png", "classes.png", "tilt.csv", "config.json"):
        assert (folder / name).stat().st_size > 50
    weights = torch.load(folder / "tilt.pt", weights_only=True)["module"]
    (folder / "tilt.pt").unlink()  # as if killed before the tilt's first checkpoint
    again = digits.run(replace(TINY, folder=folder, resume=True))
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in report.items() if k != "seconds"
    }
    resumed = torch.load(folder / "tilt.pt", weights_only=True)["module"]
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    with pytest.raises(CheckpointError, match="digit"):
        digits.run(replace(TINY, folder=folder, resume=True, digit=5))


@pytest.mark.slow
def test_what_too_few_samples_know_is_not_reported(tmp_path, drawn):
    config = replace(TINY, folder=tmp_path, temperature=0.002, base_iterations=1, iterations=1)
    with pytest.warns(UserWarning, match="too few") as caught:
        report = digits.run(config)
    said = [str(w.message) for w in caught if "are too few" in str(w.message)]
    assert len(said) == 2
    assert "of the base's ODE, are too few" in said[0]
    assert "of the base's chain, are too few" in said[1]
    nulls = {n for n, v in json.loads((tmp_path / "report.json").read_text()).items() if v is None}
    assert nulls >= {*OF_ODE, *OF_CHAIN}
    assert math.isnan(report["class_tv"])
    assert "exact tilt" not in [text.get_text() for text in drawn[-1].texts]


def test_options_are_checked():
    with pytest.raises(ValueError, match="digit must be one of 0 … 9, got -1"):
        DigitsConfig(digit=-1)
    with pytest.raises(ValueError, match="device must be cpu, cuda or auto, got 'gpu'"):
        DigitsConfig(device="gpu")
    with pytest.raises(ValueError, match="samples must be at least 100, got 10"):
        DigitsConfig(samples=10)
    with pytest.raises(ValueError, match=r"64 dimensions.*got 'covariance_matched'.* 16"):
        DigitsConfig(kernel="covariance_matched")
    quick = DigitsConfig(quick=True).sized
    assert (quick.iterations, quick.base_iterations, quick.quick) == (40, 200, False)


@pytest.mark.parametrize(
    ("option", "value"),
    [("kernel", "none"), ("temperature", 0.0), ("lr", -1.0), ("steps", 1)],
)
def test_bad_options_of_the_tilt_are_refused_before_anything_else(tmp_path, option, value):
    work = tmp_path / "classifier.pt"
    work.write_text("work")
    with pytest.raises(ValueError, match=option):
        digits.run(replace(TINY, folder=tmp_path, **{option: value}))
    assert [*tmp_path.iterdir()] == [work]


@pytest.mark.parametrize("option", ["digit", "width", "base_iterations", "base_batch_size"])
def test_bad_options_of_a_run_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} must be .* got -1"):
        replace(TINY, **{option: -1})


def test_what_an_infinite_error_judges_is_within_nothing():
    few = resample_tilt(torch.randn(100, 2), lambda x, cond: 60 * x[:, 0])
    certain, gap = torch.zeros(10), torch.eye(10)[0] - torch.eye(10)[9]
    unknown = torch.full((10,), few.log_z_stderr)
    judged = Comparison(certain, certain + gap, certain, certain, unknown, few)
    assert int((judged.z.abs() <= 2).sum()) == 0
