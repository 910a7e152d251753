"""The digits frontier: metrics on known samples, alternatives where they are exact, a whole run."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.frontier_batches import batches
from torch import nn

from applications.toy2d.digits import data as digit_data
from applications.toy2d.digits import unet_flow
from applications.toy2d.digits.classifier import Classifier
from benchmarks.digits_frontier import (
    __main__ as digits_frontier,
)
from benchmarks.digits_frontier import (
    config as frontier_config,
)
from benchmarks.digits_frontier import (
    runs as frontier_runs,
)
from benchmarks.digits_frontier import (
    study as frontier_study,
)
from benchmarks.digits_frontier.alternatives import RewardGuidance, backpropagate, best_of
from benchmarks.digits_frontier.config import FrontierConfig, Problem
from benchmarks.digits_frontier.distributions import (
    SampleSet,
    certificate_summary,
    compare_with_exact,
)
from benchmarks.digits_frontier.margins import margin
from benchmarks.digits_frontier.metrics import SampleMetrics
from benchmarks.digits_frontier.rewards import make_rewards
from benchmarks.digits_frontier.rows import ALTERNATIVES, Point, line, margins
from flows.mixture import GaussianMixture
from flows.training.checkpoint import CheckpointError


class Template(Classifier):
    """Reads the class off the first ten pixels."""

    def __init__(self):
        super().__init__(4)

    def forward(self, x):
        return 2 * x[:, :10]


def one_of(labels):
    """Images whose first ten pixels are one-hot, and whose last pixel is 1."""
    x = nn.functional.one_hot(labels, 64).float()
    x[:, -1] = 1
    return x


def test_best_of_n_takes_the_best_of_every_group():
    rewards = torch.tensor([1.0, 3.0, 2.0, 0.0, 5.0, 4.0, 9.0])
    assert best_of(rewards, 3).tolist() == [1, 4]
    assert best_of(rewards, 1).tolist() == list(range(7))


def test_guidance_is_the_tilt_where_the_reward_is_linear_and_the_base_gaussian():
    """log E[exp(r/T) | x_t] is then r(E[x_1 | x_t]) / T plus a number."""
    base = GaussianMixture(
        torch.ones(1, dtype=torch.float64),
        torch.tensor([[1.0, -1.0]], dtype=torch.float64),
        torch.tensor([[[2.0, 0.5], [0.5, 1.0]]], dtype=torch.float64),
    )
    b, temperature = torch.tensor([0.7, -0.3], dtype=torch.float64), 2.0
    tilted, _ = base.tilt(torch.zeros(2, 2, dtype=torch.float64), b / temperature)
    found = RewardGuidance(base, lambda x, cond: x @ b, 1 / temperature)
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in (0.05, 0.5, 0.9, 1.0):
        time = torch.tensor(t, dtype=torch.float64)
        torch.testing.assert_close(found(x, time), tilted(x, time))
    assert found(x, torch.tensor(0.0, dtype=torch.float64)).isfinite().all()


class Scaled(nn.Module):
    """v = a x."""

    def __init__(self, a=0.3):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, x, t, cond=None):
        return self.a * x


@pytest.mark.parametrize("last_only", [True, False])
def test_backpropagation_follows_the_gradient_of_its_steps(last_only, monkeypatch):
    """Of x (1 + a/K)^K the derivative in a is x (1 + a/K)^(K-1), in the last step's a / K of it."""
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)
    field, steps, lr = Scaled(), 4, 0.1
    x0 = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    stops = backpropagate(
        field,
        lambda x, cond: x[:, 0],
        lambda n, generator: (x0, None),
        last_only=last_only,
        stops=(1, 3),
        steps=steps,
        lr=lr,
    )
    stop, model = next(stops)
    slope = 2 * (1 + 0.3 / steps) ** (steps - 1) * (1 / steps if last_only else 1)
    assert stop == 1
    assert float(model.a.detach()) == pytest.approx(0.3 + lr * slope)
    assert [stop for stop, _ in stops] == [3]
    assert float(field.a.detach()) == 0.3


def test_margin_is_the_height_above_the_most_diverse_passing_segment():
    curve = [batches(0, 10), batches(4, 6), batches(2, 2)]
    found = margin(batches(1, 10), curve, "classes")
    assert (found.difference, found.stderr) == (pytest.approx(1), 0)
    found = margin(batches(3, 6), curve, "classes")  # 7 on the way there, 4 on the way back
    assert found.difference == pytest.approx(-1)
    assert not found.at_least
    assert margin(batches(5, 6), curve, "classes") is None
    assert margin(batches(-1, 6), curve, "classes") is None


def test_the_standard_error_of_a_margin_is_that_of_its_repetitions():
    g = torch.Generator().manual_seed(0)

    def noisy(reward, diversity, size=1.0):
        r, d = size * torch.randn(2, 32, generator=g, dtype=torch.float64)
        return {"reward": reward + 2 * r, "classes": diversity - 1.5 * r + d}

    found = [
        margin(noisy(0, 8), [noisy(-4, 14, 3.0), noisy(8, 2), noisy(20, 1)], "classes")
        for _ in range(400)
    ]
    differences = torch.tensor([m.difference for m in found])
    stated = torch.tensor([m.stderr for m in found]).square().mean().sqrt()
    assert float(differences.mean()) == pytest.approx(-2, abs=0.15)
    assert float(stated) == pytest.approx(float(differences.std()), rel=0.12)


def test_what_decides_is_coverage_and_distance():
    def point(method, strength, reward, **diversity):
        values = {"classes": 5.0, "distance": 5.0, "coverage": 5.0, "reward": reward, "kl": 1.0}
        values |= diversity
        metrics = {name: torch.full((4,), v, dtype=torch.float64) for name, v in values.items()}
        return Point("ink", method, strength, metrics, torch.zeros(1, 64), {})

    others = [point("base", 0, 0.0), point("best_of_n", 4, 2.0), point("guidance", 1, 0.5)]
    changes = ({}, 1), ({"classes": 4.0}, 1), ({"kl": 9.0}, 1), ({"coverage": 4.9}, 0)
    for change, expected in changes:
        row = margins(point("tilt", 1, 1.0, **change), others)
        assert row["at_least_best_of_n"] == expected
        assert row["at_least_guidance"] == -1
        assert row["distance_over_best_of_n"] == 0
        assert "distance_over_guidance" not in row
    assert margins(point("tilt", 1, 1.0, distance=4.0), others)["at_least_best_of_n"] == 0


def test_labels_are_dropped_for_the_one_that_stands_for_none(monkeypatch):
    data = digit_data.load(0)
    monkeypatch.setattr(unet_flow, "fit_flow", lambda flow, sampler, **options: sampler)
    fit = {"widths": (4,), "iterations": 1}
    sampler = unet_flow.fit_unet(data, labelled=True, **fit)
    x, cond = sampler(4000, torch.Generator().manual_seed(0))
    dropped = cond["label"] == 10
    assert 0.08 < float(dropped.double().mean()) < 0.12
    nearest = torch.cdist(x, data.train).argmin(1)
    right = data.train_labels[nearest] == cond["label"]
    assert float(right[~dropped].double().mean()) > 0.99
    assert unet_flow.fit_unet(data, labelled=False, **fit)(3, torch.Generator()).shape == (3, 64)


def test_metrics_measure_diversity():
    data = digit_data.load(0)
    measure = SampleMetrics(Template(), data, 400)
    labels = torch.arange(800) % 4
    found = measure(one_of(labels), labels.float())
    assert found["classes"].tolist() == [pytest.approx(4.0)] * 2
    assert found["reward"].tolist() == [1.5, 1.5]
    apart = 0.75 * math.sqrt(2) * 400 / 399  # a quarter of the pairs is equal
    assert found["distance"].tolist() == [pytest.approx(apart, abs=1e-5)] * 2
    assert found["coverage"].max() == 0
    real = digit_data.add_noise(data.train, generator=torch.Generator().manual_seed(1))
    sevens = SampleMetrics(Template(), data, 60)
    some = sevens(real[data.train_labels == 7], torch.zeros(len(real)))["coverage"]
    everything = SampleMetrics(Template(), data, 600)(real, torch.zeros(len(real)))["coverage"]
    assert 0.05 < float(some.mean()) < 0.12
    assert float(everything.mean()) > 0.7
    with pytest.raises(ValueError, match="two batches of 600, got 1000"):
        SampleMetrics(Template(), data, 600)(real[:1000], torch.zeros(1000))


def test_labels_keep_their_share_in_the_exact_tilt():
    """Under label 0 digits 0 or 1, under label 1 digits 0 or 2: the tilt is of each by itself."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (40_000,), generator=g)
    second = torch.rand(40_000, generator=g) < 0.5
    x = one_of(torch.where(second, labels + 1, 0))
    reward = make_rewards(Template(), 0)["digit"]
    up, down = (float(reward(one_of(torch.tensor([c])))) for c in (0, 1))
    share = math.exp(up) / (math.exp(up) + math.exp(down))
    exact = [share, (1 - share) / 2, (1 - share) / 2]
    drawn = one_of(torch.where(torch.rand(40_000, generator=g) > share, labels + 1, 0))
    found = compare_with_exact(
        Template(), SampleSet(x, labels), SampleSet(drawn, labels), reward, 1.0
    )
    assert found.exact[:3].tolist() == pytest.approx(exact, abs=0.01)
    assert found.z.abs().max() < 3.5
    weighted = compare_with_exact(
        Template(),
        SampleSet(x, labels),
        SampleSet(x, labels, reward(x) + labels),  # what all of a label share does not matter
        reward,
        1.0,
        weighted=True,
    )
    assert weighted.tilted[:3].tolist() == pytest.approx(exact, abs=0.01)
    plain = compare_with_exact(Template(), SampleSet(x, labels), SampleSet(x, labels), reward, 1.0)
    assert plain.z.abs().max() > 5


def test_the_certificate_is_taken_label_by_label():
    labels = torch.arange(100) % 2
    summary = certificate_summary(SampleSet(torch.zeros(100, 64), labels, 3.0 * labels))
    assert summary == {
        "log_weight_std": 0,
        "ess": pytest.approx(1),
        "log_z": pytest.approx(1.5),
        "log_z_stderr": pytest.approx(0, abs=1e-12),
    }


def test_rewards_have_about_unit_spread_and_know_their_image():
    data = digit_data.load(0)
    rewards = make_rewards(Template(), 3)
    for name in ("ink", "symmetry"):
        assert 0.5 < float(rewards[name](data.train).std()) < 2
    mirrored = data.train.reshape(-1, 8, 8)
    even = (mirrored + mirrored.flip(2)).flatten(1) / 2
    assert float(rewards["symmetry"](even).abs().max()) < 1e-9
    assert float(rewards["ink"](torch.ones(1, 64))) == 16


TINY = {
    "problems": ("ink", "guided ink"),
    "steps": 3,
    "iterations": 2,
    "batch_size": 8,
    "backprop_batch": 8,
    "widths": (4,),
    "base_iterations": 2,
    "classifier_iterations": 5,
    "stops": (1, 2),
    "candidates": (2, 3),
    "base_samples": 240,
    "samples": 80,
    "batch": 40,
    "ode_steps": 3,
}


@pytest.mark.slow
def test_a_run_is_kept_and_its_rows_are_flat(tmp_path, monkeypatch, capsys):
    small = Problem("ink", False, (2, 4), (2,), (0.5,), 2)
    guided = Problem("ink", True, (2,), (), (0.5,), 2)
    monkeypatch.setattr(frontier_config, "PROBLEMS", {"ink": small, "guided ink": guided})
    pytest.importorskip("peft", reason="the low-rank tilt needs peft")
    results = tmp_path / "results" / "frontier.json"
    config = FrontierConfig(**TINY, folder=tmp_path / "run", output=results)
    digits_frontier.main(config)
    rows = json.loads(results.read_text())
    found = [(row["problem"], row["method"], row["strength"]) for row in rows]
    assert len(set(found)) == len(rows) == 13 + 9
    assert ("ink", "best_of_n", 3) in found
    assert ("guided ink", "best_of_n", 3) not in found  # label by label, too few for two batches
    unknown = {k for row in rows for k, v in row.items() if not isinstance(v, str | int | float)}
    # Eight samples a label are too few for an error.
    assert all(name.startswith(("max_z", "log_z")) for name in unknown), unknown
    assert all(row["problem"] == "guided ink" for row in rows for v in row.values() if v is None)
    tilts = [row for row in rows if row["method"].startswith("tilt")]
    assert len(tilts) == 4
    for row in tilts:
        assert row["at_least_guidance"] in (-1, 0, 1)
        assert ("distance_over_guidance" in row) == (row["at_least_guidance"] >= 0)
        assert 0 <= row["within_weighted"] <= 10
        assert row["method"] in line({k: math.inf if v is None else v for k, v in row.items()})
    for row in rows:
        assert isinstance(row["kl"], float)
        assert (row["kl_stderr"] > 0) == (row["method"] not in ("base", "best_of_n"))
        if row["method"] == "base":
            assert row["kl"] == 0
        if (row["method"], row["strength"]) == ("best_of_n", 3):
            assert row["kl"] == pytest.approx(math.log(3) - 2 / 3)
        by_ode = row["method"] not in ("base", "best_of_n", "exact")
        assert ("kl_step_error" in row) == by_ode
        assert ("as_close_guidance" in row) == (row["method"] in ("tilt", "tilt_lora", "exact"))
    assert results.with_suffix(".png").exists()
    assert results.with_name("frontier_images.png").exists()

    monkeypatch.setattr(frontier_study, "fit_unet", None)  # nothing is computed a second time
    for name in ("tilt", "sample_ode", "sample_chain"):
        monkeypatch.setattr(frontier_runs, name, None)
    digits_frontier.main(config)
    assert json.loads(results.read_text()) == rows
    for option in ("iterations", "kl_probes"):
        with pytest.raises(CheckpointError, match=option):
            digits_frontier.main(replace(config, **{option: 3}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"problems": ("inc",)}, r"problems must be of .*, got \['inc'\]"),
        ({"samples": 1000}, "at least two batches of 512, got 1000"),
        ({"kl_probes": 0}, "kl_probes must be at least 1, got 0"),
        ({"base_samples": 32_767}, "best of 32, got 32767"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        FrontierConfig(**options)


def test_the_readme_counts_what_the_record_has():
    root = Path(__file__).parents[2]
    rows = json.loads((root / "benchmarks/results/digits_frontier.json").read_text())

    def count(method, metric):
        ahead = [
            row[f"{metric}_over_{other}"] >= -2 * row[f"{metric}_over_{other}_stderr"]
            for row in rows
            if row["method"] == method
            for other in ALTERNATIVES
            if f"{metric}_over_{other}" in row
        ]
        return f"{sum(ahead)} of {len(ahead)}"

    said = " ".join((root / "README.md").read_text(encoding="utf-8").split())
    begins = {
        "coverage": "Tilts cover",
        "distance": "Mean distances of two",
        "closeness": "In relative entropy tilts are",
    }
    for metric, begin in begins.items():
        tilt, low_rank, exact = (count(m, metric) for m in ("tilt", "tilt_lora", "exact"))
        found = re.findall(r"\d+ of \d+", said[said.index(begin) :])[:3]
        assert found == [tilt, low_rank, exact], metric

    point = {(row["problem"], row["method"], row["strength"]): row for row in rows}
    one_update, exact_tilt = point["digit", "backprop_last", 1], point["digit", "exact", 4]
    assert exact_tilt["reward"] > one_update["reward"]
    kl = f"is {one_update['kl']:.1f} nats from the base, the exact tilt of a higher reward "
    assert f"{kl}{exact_tilt['kl']:.2f}." in said
    tilts = [row for row in rows if "within_ode" in row and row["problem"] != "guided ink"]
    weighted = [row["within_weighted"] for row in tilts]
    others = [row[f"within_{kind}"] for row in tilts for kind in ("ode", "chain")]
    assert f"weights ({min(weighted)} to {max(weighted)} of 10 within two standard errors" in said
    assert f"short tilts are not ({min(others)} to {max(others)} of 10)" in said
