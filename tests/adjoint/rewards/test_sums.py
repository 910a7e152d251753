"""Arithmetic of rewards: exact in value and gradient, whatever the terms are."""

import csv

import pytest
import torch
from helpers.linear_tilt import FAST, SLOPES, run
from helpers.tilt_problems import S2, M

from adjoint.rewards.check import check_reward
from adjoint.rewards.reward import Reward, Sum
from adjoint.tilt import TiltConfig, tilt
from flows.mixture import GaussianMixture
from flows.training.loggers import CSVLogger

X = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2


def quartic(x, cond=None):
    return -(x**4).sum(1)


def wave(x, cond=None):
    return (2 * x).sin().sum(1)


def step(x, cond=None):
    return (x[:, 0] > 0).to(x)


def conditional(x, cond):
    return (x * cond["c"]).sum(1)


TERMS = {
    "capped": Reward(quartic, max_norm=2.0, name="capped"),
    "smooth": Reward(wave, smoothing=0.3, scale=0.7, name="smooth"),
    "given": Reward(step, gradient=lambda x, c: torch.cos(x), name="given"),
    "conditional": Reward(conditional, name="conditional"),
}
COND = {"c": torch.randn(9, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}


def pair(reward):
    return reward.value_and_gradient(X, COND)[:2]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("first", TERMS)
@pytest.mark.parametrize("second", TERMS)
@pytest.mark.slow
def test_linear_combinations_are_exact(first, second):
    a, b = TERMS[first], TERMS[second]
    (v, g), (w, h) = pair(a), pair(b)
    for found, factors in (
        (a + b, (1, 1)),
        (a - b, (1, -1)),
        (2 * a - b * 3 / 4, (2, -0.75)),
        (-(a + 0.5 * b), (-1, -0.5)),
        (3 * (a - b), (3, -3)),
        (0 * a + b, (0, 1)),
    ):
        alpha, beta = factors
        value, gradient = pair(found)
        close(value, alpha * v + beta * w)
        close(gradient, alpha * g + beta * h)
        close(found(X, COND), value)
        assert not gradient.requires_grad


def test_sum_and_plain_functions():
    a, b, c = TERMS["capped"], TERMS["smooth"], TERMS["given"]
    close(pair(sum([a, b, c]))[1], pair(a)[1] + pair(b)[1] + pair(c)[1])
    close(pair(a + wave)[1], pair(a)[1] + 2 * (2 * X).cos())
    close(pair(a - wave)[0], pair(a)[0] - wave(X))
    assert len(((a + b) + (c - a)).parts) == 4


def test_a_cap_of_the_whole_and_caps_of_terms():
    whole = (TERMS["capped"] + wave).capped(1.5)
    inner = pair(TERMS["capped"])[1] + 2 * (2 * X).cos()
    norms = inner.norm(dim=1, keepdim=True)
    assert bool((norms > 1.5).any())
    close(pair(whole)[1], inner * (1.5 / norms).clamp_max(1))
    close(pair(whole)[0], quartic(X) + wave(X))
    close(pair(-2 * whole)[1], -2 * pair(whole)[1])
    close(pair(whole + wave)[1], pair(whole)[1] + 2 * (2 * X).cos())  # not taken apart


def test_a_temperature_leaves_every_cap_where_it_is():
    whole = (Reward(quartic, max_norm=2.0) + wave).capped(1.5)
    inner = Reward(quartic, max_norm=2.0, scale=0.25) + Reward(wave, scale=0.25)
    close(pair(whole.scaled(0.25))[1], pair(inner.capped(1.5))[1])
    steep = X[X.norm(dim=1) > 1.5]
    single = Reward(quartic, max_norm=2.0)
    for reward in (single, single + Reward(lambda x, c: 0 * x.sum(1))):
        _, gradient, _ = reward.scaled(0.25).value_and_gradient(steep)
        norms = (0.25 * 4 * steep**3).norm(dim=1).clamp_max(2.0)
        close(gradient.norm(dim=1), norms)


def test_the_parts_are_not_changed():
    a = Reward(quartic, max_norm=2.0)
    before = pair(a)
    total = a + wave
    _ = pair(-(3 * total).scaled(2.0).capped(0.1)), pair(total)
    close(pair(a), before)
    assert (a.scale, a.max_norm, total.max_norm) == (1.0, 2.0, None)


def test_terms_add_up_and_keep_their_names():
    total = TERMS["capped"] - 2 * TERMS["smooth"] + wave + wave + (lambda x, c: x[:, 0])
    _, gradient, terms = total.value_and_gradient(X, COND)
    assert list(terms) == ["capped", "smooth", "wave", "wave_2", "reward"]
    close(terms["smooth"], -2 * TERMS["smooth"](X))
    close(sum(terms.values()), total(X, COND))
    close(gradient, pair(total)[1])
    for name, value in total.terms(X, COND).items():
        close(value, terms[name])
    _, own, alone = TERMS["given"].value_and_gradient(X)
    assert not alone
    assert list(TERMS["given"].terms(X)) == ["given"]
    close(own, torch.cos(X))


def test_each_part_is_evaluated_once():
    calls = []

    def counted(x, cond=None):
        calls.append(len(x))
        return x.sum(1)

    pair(Reward(counted) + 2 * Reward(counted))
    assert calls == [9, 9]


def test_a_subclass_keeps_its_gradient_in_a_sum():
    class Constant(Reward):
        def value_and_gradient(self, x, cond=None, *, create_graph=False):
            return torch.ones(len(x)).to(x), torch.full_like(x, 7.0), {}

    close(pair(Constant(quartic) + wave)[1], 7 + 2 * (2 * X).cos())


@pytest.mark.slow
def test_the_tilt_of_a_sum_is_that_of_the_total():
    def slope(x, cond=None):
        return x @ SLOPES.to(x)

    found = run(FAST, reward=2 * Reward(slope) - Reward(lambda x, c: x[:, 0], name="first"))
    exact = 2 * SLOPES - torch.tensor([1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(found.field.w.detach(), S2 * exact, rtol=0.015, atol=0)
    avoided = run(FAST, reward=-Reward(slope))
    torch.testing.assert_close(avoided.field.w.detach(), -S2 * SLOPES, rtol=0.015, atol=0)
    assert M > 0  # the base is off the centre, so that a sign error in the value would show


def test_bad_arithmetic_is_refused():
    a = TERMS["capped"]
    for wrong in (lambda: a + 1.0, lambda: a - "x", lambda: 1.0 + a, lambda: a * a, lambda: a * X):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(ValueError, match="finite number, got nan"):
        a * float("nan")
    with pytest.raises(TypeError, match="two arguments"):
        a + (lambda x: x)
    with pytest.raises(ValueError, match=r"reward 'conditional' needs a condition"):
        check_reward(TERMS["conditional"] + wave, X)
    assert isinstance(a + wave, Sum)


@pytest.mark.parametrize("refine", [0.0, 1.0])
@pytest.mark.slow
def test_a_training_logs_every_term(tmp_path, refine):
    path = tmp_path / "metrics.csv"
    reward = Reward(lambda x, c: 0.3 * x[:, 0], name="right") - Reward(
        lambda x, c: 0.1 * x.square().sum(1), name="far"
    )
    base = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    config = TiltConfig(
        iterations=3,
        batch_size=16,
        steps=4,
        base_samples=64,
        reward_batch=5,
        temperature=2.0,
        refine_fraction=refine,
        refine_loss="log_variance",
    )
    tilt(base, reward, shape=(2,), config=config, callbacks=[CSVLogger(path, every=1)])
    with path.open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert len(rows) == 3
    for row in rows:
        assert row["reward.right"] + row["reward.far"] == pytest.approx(row["reward"], rel=1e-5)
        assert row["reward.far"] < -0.02  # minus what is subtracted, at temperature 2
