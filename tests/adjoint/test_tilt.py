"""``tilt`` in one call: every option against closed forms, and its determinism."""

import copy
import math

import pytest
import torch
from helpers.linear_tilt import BASE, FAST, SLOPES, Shift, Slope, run, with_options
from helpers.tilt_problems import S2, M, gaussian
from torch import nn

from adjoint.rewards.reward import Reward
from adjoint.tilt import TiltConfig, tilt
from flows.field import Residual, batch_time
from flows.mixture import GaussianMixture
from flows.networks.mlp import MLPVelocity
from flows.training import checkpoint as checkpoints
from flows.training.callbacks import Callback
from flows.training.checkpoint import CheckpointError


class Watch(Callback):
    """Metrics of every iteration."""

    def __init__(self):
        self.metrics = []

    def on_step(self, trainer, iteration, metrics):
        self.metrics.append({name: float(value) for name, value in metrics.items()})


# --- the right answer ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_linear_reward_moves_a_gaussian_to_the_exact_mean():
    """The default path: a residual network in single precision, judged by the closed form."""
    options = {"warmup": 0, "ema_decay": 0.9, "refine_fraction": 0.0}
    config = TiltConfig(iterations=120, lr=5e-3, steps=5, batch_size=64, **options)
    watch = Watch()
    found = tilt(BASE, Slope(), shape=(2,), config=config, callbacks=[watch])
    exact = M + S2 * SLOPES
    x = found.sample(4096, grid=20, generator=torch.Generator().manual_seed(0))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double().mean(0), exact, rtol=0, atol=0.04)
    torch.testing.assert_close(x.double().var(0), torch.full_like(exact, S2), rtol=0, atol=0.04)
    before, after = found.certificate_base, found.certificate
    spread = float(SLOPES.norm()) * S2**0.5
    assert before.log_weight_std == pytest.approx(spread, rel=0.05)
    assert after.log_weight_std < 0.15 * before.log_weight_std
    assert after.ess > 0.98
    log_z = float(M * SLOPES.sum() + 0.5 * S2 * SLOPES.square().sum())
    assert after.log_z == pytest.approx(log_z, abs=3 * after.log_z_stderr + 0.01)
    assert before.reward == pytest.approx(float(M * SLOPES.sum()), abs=0.05)
    assert after.reward == pytest.approx(float(exact @ SLOPES), abs=0.05)
    assert after.path_kl == pytest.approx(0.5 * spread**2, rel=0.1)  # KL of the two Gaussians
    weighted, error = before.weighted_mean(before.samples)
    assert bool(((weighted - exact).abs() < 4 * error).all())
    assert watch.metrics[-1]["log_weight_std"] < 0.3 * watch.metrics[0]["log_weight_std"]
    for name in after.summary():
        assert name in str(found)


OPTIONS = [
    {},
    {"kernel": "ancestral"},
    {"kernel": "covariance_matched"},
    {"steps": 8, "shift": 2.0},
    {"accumulate": 3},
    {"replay_size": 64, "losses_per_rollout": 4},
    {"importance": True},
    {"control_variates": True},
    {"control_variates": True, "importance": True, "replay_size": 64, "losses_per_rollout": 4},
    {"replay_size": 64, "losses_per_rollout": 4, "importance": True, "clip_quantile": True},
    {"late_fraction": 0.25, "early_fraction": 0.5},
    {"clip": 100.0},
    {"clip_quantile": True},
    {"ema_decay": 0.9},
    {"autocast": True},
    {"refine_fraction": 0.6},
    {"refine_fraction": 0.6, "refine_loss": "log_variance"},
    {
        "refine_fraction": 1.0,
        "refine_loss": "log_variance",
        "late_fraction": 0.25,
        "early_fraction": 0.5,
        "accumulate": 2,
    },
    {"refine_fraction": 1.0, "refine_loss": "log_variance", "kernel": "covariance_matched"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.slow
def test_every_option_reaches_the_exact_tilt(options):
    found = run(with_options(**options))
    # The first step's rule is read at t = .02 instead of 0, which costs a little of w.
    torch.testing.assert_close(found.field.w.detach(), S2 * SLOPES, rtol=0.015, atol=0)


@pytest.mark.slow
def test_temperature_divides_the_reward():
    found = run(with_options(temperature=4.0, certificate_samples=256))
    torch.testing.assert_close(found.field.w.detach(), S2 * SLOPES / 4, rtol=0.015, atol=0)
    log_z = float(M * SLOPES.sum() / 4 + 0.5 * S2 * SLOPES.square().sum() / 16)
    assert found.certificate.log_z == pytest.approx(log_z, abs=2e-3)
    assert found.certificate.log_weight_std < 0.01


@pytest.mark.slow
def test_a_conditional_reward_on_a_conditional_base_tilts_each_condition():
    """N(c, s²) and reward λ(c)·x with λ(c) = (2 c₂, -c₁): mean c + s² λ(c), log Z λ·c + ½ s² λ²."""

    def base(x, t, cond):  # the mean of the clean sample enters as the velocity's constant
        t = batch_time(t, x)
        gain = (t * S2 - (1 - t)) / (t**2 * S2 + (1 - t) ** 2)
        return cond["c"] + gain * (x - t * cond["c"])

    matrix = torch.tensor([[0.0, 2.0], [-1.0, 0.0]], dtype=torch.float64)

    def reward(x, cond):
        return (x * (cond["c"] @ matrix.T)).sum(1)

    def cond_sampler(n, generator):
        angle = (
            2 * math.pi * torch.arange(n, dtype=torch.float64) / n
        )  # known without the generator
        return {"c": torch.stack([angle.cos(), 0.5 * angle.sin()], 1)}

    for kernel, refine in (
        ("moment_matched", 0.0),
        ("covariance_matched", 0.0),
        ("moment_matched", 0.7),
    ):
        config = with_options(
            kernel=kernel,
            certificate_samples=512,
            batch_size=64 if refine else 16,  # eight different conditions
            replay_size=64,
            losses_per_rollout=2,
            late_fraction=0.5,
            refine_fraction=refine,
            refine_loss="log_variance",
        )
        found = tilt(
            base,
            reward,
            shape=(2,),
            config=config,
            model=Shift(base, (2, 2)),
            cond_sampler=cond_sampler,
            dtype=torch.float64,
        )
        torch.testing.assert_close(found.field.w.detach(), S2 * matrix, rtol=0.02, atol=0.01)
        c = cond_sampler(8, None)["c"].repeat_interleave(64, 0)
        slopes = c @ matrix.T
        log_z = (slopes * c).sum(1) + 0.5 * S2 * slopes.square().sum(1)
        error = found.certificate.log_weights - log_z
        assert float(error.std()) < 0.03
        assert abs(float(error.mean())) < 0.01
        assert float(found.certificate.log_weights.std()) > 0.15  # of log Z(c)
        assert found.certificate.log_weight_std < 0.03
        assert found.certificate.log_z == pytest.approx(float(log_z.mean()), abs=0.01)
        one = {"c": torch.tensor([[0.6, -0.3]], dtype=torch.float64).expand(20_000, 2)}
        x = found.sample(20_000, cond=one, generator=torch.Generator().manual_seed(0))
        exact = one["c"][0] + S2 * (matrix @ one["c"][0])
        torch.testing.assert_close(x.mean(0), exact, rtol=0, atol=0.02)
        if kernel == "covariance_matched":  # within conditions, not across them
            eye = torch.eye(2, dtype=torch.float64)
            measured = found.kernel.state_noise.start_covariance
            torch.testing.assert_close(measured, S2 * eye, rtol=0, atol=0.03)


# --- options do what they say --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rollouts"),
    [
        ({}, 10),
        ({"accumulate": 3}, 30),
        ({"replay_size": 64}, 10),
        ({"replay_size": 64, "losses_per_rollout": 4}, 3),
        ({"replay_size": 64, "losses_per_rollout": 100}, 1),
    ],
    ids=str,
)
def test_rollouts_per_update(options, rollouts):
    reward = Slope()
    run(with_options(iterations=10, **options), reward=reward)
    assert reward.sizes.count(FAST.batch_size) == rollouts  # the others are checks


@pytest.mark.slow
def test_a_subset_of_the_steps_always_has_the_late_ones():
    model = Shift()
    run(with_options(iterations=60, steps=8, late_fraction=0.25, early_fraction=0.5), model=model)
    steps = [(8 * times).round().long().tolist() for times in model.times]
    assert len(steps) == 60
    assert all(len(chosen) == 5 and chosen[-2:] == [6, 7] for chosen in steps)
    early = torch.tensor([k for chosen in steps for k in chosen[:-2]]).bincount(minlength=6)
    assert bool(((early > 15) & (early < 45)).all())  # 30 expected, 3.9 standard deviations


@pytest.mark.slow
def test_a_constant_cap_removes_the_gradient_above_it_and_nothing_below():
    free, high, low = (
        run(with_options(iterations=20, clip=clip)).field.w.detach() for clip in (0.0, 1e6, 1e-9)
    )
    assert torch.equal(free, high)
    assert torch.equal(low, torch.zeros_like(low))


@pytest.mark.slow
def test_a_running_cap_is_the_mean_of_the_quantiles_and_caps_the_loss(tmp_path):
    watch, path = Watch(), tmp_path / "c.pt"
    config = with_options(iterations=20, clip_quantile=True, lr=1e-30, steps=4)
    run(config, reward=quadratic_reward, callbacks=[watch], checkpoint=path)
    cap, capped = None, []
    for metrics in watch.metrics:
        capped.append(cap is None or metrics["loss"] <= 4 * cap)
        seen = metrics["term_quantile"]
        cap = seen if cap is None else 0.99 * cap + 0.01 * seen
    assert all(capped)
    assert float(checkpoints.load(path)["loss"]["matching"]["cap"]) == pytest.approx(cap, rel=1e-5)
    free = Watch()
    run(with_options(iterations=20, lr=1e-30, steps=4), reward=quadratic_reward, callbacks=[free])
    assert free.metrics[0]["loss"] == watch.metrics[0]["loss"]  # no cap is known yet
    later = [(a["loss"], b["loss"]) for a, b in zip(watch.metrics, free.metrics, strict=True)][1:]
    assert all(a < b for a, b in later)


def quadratic_reward(x, cond=None):
    return (x - 0.5 * x.square()).sum(1)


class Table(nn.Module):
    """The base plus an affine function of the state for each step: the tilt of a Gaussian."""

    def __init__(self, base, steps):
        super().__init__()
        self.base, self.steps = base, steps
        self.slope = nn.Parameter(torch.zeros(steps, 1, dtype=torch.float64))
        self.offset = nn.Parameter(torch.zeros(steps, 1, dtype=torch.float64))

    def forward(self, x, t, cond=None):
        k = (t.reshape(-1) * self.steps).round().long().clamp_max(self.steps - 1)
        return self.base(x, t) + self.slope[k] * x + self.offset[k]


@pytest.mark.parametrize("importance", [True, False])
@pytest.mark.slow
def test_importance_weights_make_stale_trajectories_unbiased(importance):
    """Only trajectories of the untilted base, replayed: right with their weights, else not.

    With r = x - x²/2 on N(m, s²) the tilt has precision 1/s² + 1 and mean (m/s² + 1)/(1/s² + 1).
    """
    base, steps = gaussian(), 10
    variance = 1 / (1 / S2 + 1)
    exact = gaussian(variance * (M / S2 + 1), variance)
    config = TiltConfig(
        iterations=200,
        lr=0.05,
        ema_decay=0.0,
        steps=steps,
        batch_size=4096,
        replay_size=4096,
        losses_per_rollout=1000,
        importance=importance,
        certificate_samples=0,
        refine_fraction=0.0,
    )
    found = tilt(
        base,
        quadratic_reward,
        shape=(1,),
        config=config,
        model=Table(base, steps),
        dtype=torch.float64,
    )
    errors = []
    for t in found.kernel.t[2:-1]:
        x = exact.marginal(float(t)).sample(4000, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wrong = found.field(x, t) - exact(x, t)
        errors.append(wrong.norm() / (exact(x, t) - base(x, t)).norm())
    error = float(torch.stack(errors).mean())
    assert error < 0.06 if importance else error > 0.2


@pytest.mark.slow
def test_autocast_computes_the_network_in_bfloat16_and_the_chain_in_float32():
    seen = set()

    class Probe(MLPVelocity):
        def forward(self, x, t, cond=None):
            v = super().forward(x, t, cond)
            seen.add((x.dtype, v.dtype))
            return v

    torch.manual_seed(0)
    model = Residual(BASE, Probe(2, hidden=(32,), zero_init=True))
    config = with_options(autocast=True, iterations=150, lr=0.01, batch_size=64)
    found = tilt(BASE, Slope(), shape=(2,), config=config, model=model)
    # float32 throughout only where the model is checked, before training
    assert seen == {(torch.float32, torch.float32), (torch.float32, torch.bfloat16)}
    assert all(p.dtype == torch.float32 for p in found.field.parameters())
    x = found.sample(4096, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(x.mean(0), M + S2 * SLOPES, rtol=0, atol=0.08)


# --- a pure function of its arguments ------------------------------------------------------------


def small_tilt(seed=0, **options):
    config = with_options(iterations=5, seed=seed, certificate_samples=64, importance=True)
    return tilt(BASE, Slope(), shape=(2,), config=config, **options)


def outcome(found):
    weights = [p.detach().flatten().double() for p in found.field.parameters()]
    return torch.cat([*weights, found.certificate.log_weights.double()])


@pytest.mark.slow
def test_the_seed_determines_the_result_and_the_global_generator_plays_no_part(monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU's stream"))
    state = torch.get_rng_state()
    first = outcome(small_tilt())
    assert torch.equal(torch.get_rng_state(), state)
    torch.default_generator.manual_seed(2)
    assert torch.equal(outcome(small_tilt()), first)
    assert not torch.equal(outcome(small_tilt(seed=1)), first)


def test_the_base_is_never_changed():
    torch.manual_seed(0)
    base = MLPVelocity(2, hidden=(16,)).train()
    before = copy.deepcopy(base.state_dict())
    found = tilt(base, Slope(), shape=(2,), config=with_options(iterations=5))
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert base.training
    assert all(p.requires_grad and p.grad is None for p in base.parameters())
    assert all(torch.equal(value, before[name]) for name, value in found.base.state_dict().items())
    changed = [
        not torch.equal(value, before[name]) for name, value in found.field.state_dict().items()
    ]
    assert all(changed)  # what was trained is a copy


def test_double_precision_is_kept_where_no_model_is_named():
    config = with_options(iterations=2, certificate_samples=16)
    found = tilt(BASE, Slope(), shape=(2,), config=config, dtype=torch.float64)
    assert found.certificate.samples.dtype == torch.float64
    assert found.sample(3).dtype == torch.float64


def test_trajectories_and_loss_are_without_dropout():
    """At the base log w is the reward itself, and the control zero; noise would be in both."""

    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.w = torch.nn.Dropout(0.5), torch.nn.Parameter(torch.zeros(2))

        def forward(self, x, t, cond=None):
            return BASE(x, t) + self.drop(torch.ones_like(x)) - 1 + self.w

    loss_metrics = {}

    class Watch(Callback):
        def on_step(self, trainer, iteration, metrics):
            loss_metrics.update(metrics)

    flat = Reward(lambda x, c: 0 * x.sum(1))
    config = with_options(iterations=1, certificate_samples=0)
    tilt(BASE, flat, shape=(2,), config=config, model=Noisy(), callbacks=[Watch()])
    assert float(loss_metrics["log_weight_std"]) < 1e-6
    assert float(loss_metrics["control_norm"]) < 1e-6


@pytest.mark.parametrize("options", [{}, {"micro_batch": 16}, {"refine_fraction": 1.0}])
def test_a_flat_reward_leaves_a_model_with_batch_statistics_where_it_is(options):
    class Normalised(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

        def forward(self, x, t, cond=None):
            flat = x.reshape(-1, 2)
            return BASE(x, t) + self.net(flat.float()).reshape(x.shape)

    torch.manual_seed(0)
    model = Normalised()
    flat = Reward(lambda x, c: 0 * x.sum(1))
    config = with_options(iterations=3, base_samples=64, certificate_samples=64, **options)
    found = tilt(model, flat, shape=(2,), config=config)
    assert found.certificate.log_weight_std < 1e-5
    assert int(found.field.net[1].num_batches_tracked) == 0


@pytest.mark.parametrize("closed_form", [False, True])
def test_a_resume_on_another_base_is_refused(tmp_path, closed_form):
    """Where all weights are trained, the checkpoint holds none of the base (or its buffers)."""
    config = TiltConfig(iterations=2, steps=3, batch_size=8, base_samples=64, certificate_samples=0)
    path = tmp_path / "tilt.pt"
    torch.manual_seed(0)
    one, other = MLPVelocity(2, hidden=(8,)), MLPVelocity(2, hidden=(8,))
    if closed_form:
        one, other = (GaussianMixture.isotropic(torch.full((1, 2), m), 0.6) for m in (0.0, 3.0))
    tilt(one, Slope(), shape=(2,), config=config, checkpoint=path)
    with pytest.raises(CheckpointError, match="belongs to another run; base: "):
        tilt(other, Slope(), shape=(2,), config=config, checkpoint=path, resume=True)
    tilt(one, Slope(), shape=(2,), config=config, checkpoint=str(path), resume=True)
