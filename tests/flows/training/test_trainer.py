"""The training loop against closed forms, real kills, and what must stop it."""

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from helpers.killed_training import ITERATIONS, train
from helpers.killing import run_with_kills
from torch import nn

from flows.mixture import GaussianMixture
from flows.networks.mlp import MLPVelocity
from flows.training import Loss, Trainer, TrainerConfig, learning_rate
from flows.training import checkpoint as checkpoints
from flows.training.callbacks import Callback
from flows.training.checkpoint import CheckpointError
from flows.training.fit import TrainingDiverged, data_sampler, fit_flow
from flows.training.loggers import CSVLogger

PLAIN = TrainerConfig(iterations=40, lr=0.01, lr_schedule="constant", grad_clip=0, ema_decay=0)
TARGET = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)


class Point(nn.Module):
    """A vector of parameters, a frozen one, and a buffer that counts the losses."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("losses", torch.zeros(()))


def quadratic(module, generator):
    """0.5 (theta - target - noise)^2, a loss with gradient theta - target - noise."""
    noise = 0.1 * torch.randn(4, generator=generator, dtype=torch.float64)
    module.losses += 1
    return 0.5 * (module.theta - TARGET - noise).square().sum(), {"theta": module.theta.mean()}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))


def regression(module, generator):
    x = torch.randn(16, 3, generator=generator)
    return (module(x) - x.sin().sum(1, keepdim=True)).square().mean(), {}


def equal(a, b):
    """Bitwise equality of nested data."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return a == b


class Recorder(Callback):
    def __init__(self):
        self.events = []
        self.thetas = []

    def on_start(self, trainer):
        self.events.append("start")

    def on_step(self, trainer, iteration, metrics):
        assert iteration == trainer.iteration
        self.events.append(iteration)
        self.thetas.append(copy.deepcopy(next(trainer.module.parameters()).detach()))

    def on_end(self, trainer):
        self.events.append("end")


# --- the step against closed forms ---------------------------------------------------------------


def test_the_trajectory_is_adams():
    trainer = Trainer(Point(), quadratic, replace(PLAIN, seed=3))
    generator = torch.Generator().manual_seed(3)
    theta, m, v = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    for n in range(1, 21):  # Kingma and Ba, algorithm 1
        g = theta - TARGET - 0.1 * torch.randn(4, generator=generator, dtype=torch.float64)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        theta = theta - 0.01 * (m / (1 - 0.9**n)) / ((v / (1 - 0.999**n)).sqrt() + 1e-8)
        trainer.step()
        torch.testing.assert_close(trainer.module.theta.detach(), theta, rtol=0, atol=1e-12)
    assert trainer.iteration == 20
    assert equal(trainer.module.fixed.data, torch.ones(2))


def test_weight_decay_is_decoupled():
    def flat(module, generator):
        return 0.0 * module.theta.sum(), {}

    module = Point()
    module.theta.data.fill_(2.0)
    Trainer(module, flat, replace(PLAIN, lr=0.1, weight_decay=0.5, iterations=3)).fit()
    expected = torch.full((4,), 2.0 * (1 - 0.1 * 0.5) ** 3, dtype=torch.float64)
    torch.testing.assert_close(module.theta.detach(), expected)


def test_learning_rate_and_its_use():
    config = TrainerConfig(iterations=100, warmup=20, lr=0.4)
    assert [learning_rate(config, i) for i in (0, 9, 19)] == pytest.approx([0.02, 0.2, 0.4])
    cosine = [0.4, 0.2 * (1 + math.cos(math.pi / 4)), 0.2, 0.0]
    assert [learning_rate(config, i) for i in (20, 40, 60, 100)] == pytest.approx(cosine)
    assert learning_rate(replace(config, lr_schedule="constant"), 90) == 0.4

    # With a constant gradient every step of Adam has the length of its rate.
    module, recorder = Point(), Recorder()
    config = TrainerConfig(iterations=30, warmup=5, lr=0.1, grad_clip=0)
    Trainer(module, lambda m, g: (m.theta.sum(), {}), config, callbacks=[recorder]).fit()
    position = -torch.tensor([learning_rate(config, i) for i in range(30)]).cumsum(0)
    found = torch.stack(recorder.thetas)[:, 0].float()
    torch.testing.assert_close(found, position, rtol=1e-5, atol=1e-6)


def test_accumulated_losses_are_the_joined_batch():
    x = torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss_on_parts(parts):
        rows = iter(range(10**6))

        def loss(module, generator):
            part = x.chunk(parts)[next(rows) % parts]
            error = (module(part) - part.prod(1, keepdim=True)).square().mean()
            return error, {"first": part[:, 0].mean()}

        return loss

    joined = Trainer(network().double(), loss_on_parts(1), PLAIN)
    split = Trainer(network().double(), loss_on_parts(3), replace(PLAIN, accumulate=3))
    for _ in range(10):
        expected, found = joined.step(), split.step()
        assert list(found) == ["loss", "grad_norm", "first"]
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)
    for a, b in zip(joined.module.parameters(), split.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_clipping_acts_after_the_norm_is_reported():
    slope = torch.tensor([3.0, 0.0, 4.0, 0.0], dtype=torch.float64)
    for clip, factor in ((0.0, 1.0), (1.0, 0.2), (10.0, 1.0)):
        config = replace(PLAIN, grad_clip=clip)
        trainer = Trainer(Point(), lambda m, g: (m.theta @ slope, {}), config)
        assert float(trainer.step()["grad_norm"]) == pytest.approx(5.0)
        first_moment = trainer.state_dict()["optimizer"][0]["exp_avg"]
        torch.testing.assert_close(first_moment, 0.1 * factor * slope, rtol=1e-5, atol=0)


def test_before_update_comes_between_the_clipped_gradient_and_the_update():
    class Watched(Loss):
        seen = ()
        losses = 0

        def __call__(self, module, generator):
            self.losses += 1
            bad = math.nan if self.losses > 4 else 1.0
            return bad * 3.0 * module.theta.sum(), {}

        def before_update(self, module):
            theta, gradient = module.theta, module.theta.grad
            self.seen = (*self.seen, (self.losses, theta.detach().clone(), gradient.clone()))

    module, watched = Point(), Watched()
    trainer = Trainer(module, watched, replace(PLAIN, accumulate=2, grad_clip=1.0))
    after = [torch.zeros(4, dtype=torch.float64)]
    for _ in range(2):
        trainer.step()
        after.append(module.theta.detach().clone())
    with pytest.raises(TrainingDiverged):
        trainer.step()
    assert [losses for losses, _, _ in watched.seen] == [2, 4]  # not told of the bad one
    for (_, theta, gradient), expected in zip(watched.seen, after[:2], strict=True):
        assert torch.equal(theta, expected)
        assert float(gradient.norm()) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_average_against_its_closed_form(decay):
    recorder = Recorder()
    config = replace(PLAIN, ema_decay=decay)
    trainer = Trainer(Point(), quadratic, config, callbacks=[recorder])
    average = trainer.fit()
    # ema_n = sum_i (1 - d_i) (prod_{j > i} d_j) theta_{i+1} + (prod_j d_j) theta_0, theta_0 = 0
    d = torch.tensor([min(decay, (1 + i) / (10 + i)) for i in range(40)], dtype=torch.float64)
    weights = torch.stack([(1 - d[i]) * d[i + 1 :].prod() for i in range(40)])
    expected = (weights[:, None] * torch.stack(recorder.thetas)).sum(0)
    torch.testing.assert_close(average.theta, expected, rtol=1e-12, atol=1e-12)
    assert average is trainer.ema
    assert not average.training
    assert not average.theta.requires_grad
    assert float(average.losses) == 40  # buffers are copied


def test_without_averaging_the_module_itself_comes_back():
    module = network()
    trained = Trainer(module, regression, PLAIN).fit()
    assert trained is module
    assert not module.training


def in_half(module, generator):
    x = torch.randn(16, 3, generator=generator)
    return (module(x.bfloat16()).float() - 1).square().mean(), {}


def test_training_weights_in_half_precision_warns_as_small_steps_are_lost():
    with pytest.warns(UserWarning, match=r"4 of 4 trained parameters .*precision, 0.weight for"):
        trainer = Trainer(network().bfloat16(), in_half, TrainerConfig(iterations=20, lr=1e-5))
    before = copy.deepcopy(trainer.module)
    trainer.fit()
    same = [p == q for p, q in zip(before.parameters(), trainer.module.parameters(), strict=True)]
    assert torch.cat([s.flatten() for s in same]).double().mean() > 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen = network().bfloat16().requires_grad_(False)
        Trainer(nn.Sequential(frozen, nn.Linear(1, 1)), regression, TrainerConfig(iterations=1))


def test_autocast_computes_in_bfloat16_and_keeps_float32_weights():
    seen = []

    def loss(module, generator):
        x = torch.randn(16, 3, generator=generator)
        with torch.no_grad():
            module(x)  # a rollout before the loss must not cost the weights their gradient
        y = module(x)
        seen.append(y.dtype)
        return (y - x.sin().sum(1, keepdim=True)).square().mean(), {}

    module = network()
    config = TrainerConfig(iterations=150, lr=0.02, autocast=True)
    trainer = Trainer(module, loss, config)
    before = copy.deepcopy(module.state_dict())
    first = float(trainer.step()["loss"])
    trainer.fit()
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert all(not torch.equal(before[name], p) for name, p in module.state_dict().items())
    assert float(trainer.step()["loss"]) < 0.5 * first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_does_not_wait_for_the_gpu(monkeypatch):
    monkeypatch.setattr("flows.training.divergence.CHECK_EVERY", 1000)
    x = torch.randn(16, 3, device="cuda")
    trainer = Trainer(network().cuda(), lambda m, g: (m(x).square().mean(), {}), TrainerConfig())
    trainer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            trainer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_average_shares_what_is_not_trained():
    """So it is what the module has, also where the loss changes it between two updates."""

    class Slow(Loss):
        def __call__(self, module, generator):
            return quadratic(module, generator)

        def before_update(self, module):
            module.fixed.mul_(2.0)

    trainer = Trainer(Point(), Slow(), replace(PLAIN, ema_decay=0.9))
    assert trainer.ema.fixed is trainer.module.fixed
    assert trainer.ema.theta is not trainer.module.theta
    for _ in range(3):
        trainer.step()
    assert trainer.ema.fixed.tolist() == [8.0, 8.0]
    assert not torch.equal(trainer.ema.theta, trainer.module.theta)
    state = trainer.state_dict()
    assert state["module"]["fixed"].tolist() == state["ema"]["fixed"].tolist() == [8.0, 8.0]
    other = Trainer(Point(), Slow(), replace(PLAIN, ema_decay=0.9))
    other.load_state_dict(copy.deepcopy(state))
    assert equal(other.state_dict(), state)


# --- the loop ------------------------------------------------------------------------------------


def test_callbacks_see_every_iteration_and_the_end_even_of_a_failure():
    recorder = Recorder()
    Trainer(Point(), quadratic, replace(PLAIN, iterations=3), callbacks=[recorder]).fit()
    assert recorder.events == ["start", 1, 2, 3, "end"]

    def failing(module, generator):
        if recorder.events[-1] == 2:
            raise KeyError("no more data")
        return quadratic(module, generator)

    recorder.events.clear()
    with pytest.raises(KeyError, match="no more data"):
        Trainer(Point(), failing, PLAIN, callbacks=[recorder]).fit()
    assert recorder.events == ["start", 1, 2, "end"]


def test_checkpoints_come_every_so_often_and_at_the_end(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(checkpoints, "save", lambda path, state: written.append(state["iteration"]))
    config = replace(PLAIN, iterations=25, checkpoint_every=10)
    Trainer(Point(), quadratic, config, checkpoint=tmp_path / "c.pt").fit()
    assert written == [10, 20, 25]


def test_the_checkpoint_says_what_made_it(tmp_path):
    config = replace(PLAIN, iterations=2)
    identity = {"target": "ring", "sizes": [4, 4], "note": None}
    Trainer(Point(), quadratic, config, checkpoint=tmp_path / "c.pt", identity=identity).fit()
    state = checkpoints.load(tmp_path / "c.pt", expect=identity)
    assert TrainerConfig(**state["config"]) == config
    assert state["versions"] == checkpoints.versions()


def test_state_dict_continues_another_trainer_exactly_and_shares_nothing():
    config = TrainerConfig(iterations=40, warmup=5)
    first = Trainer(network(), regression, config)
    for _ in range(10):
        first.step()
    second = Trainer(network(seed=1), regression, config)
    second.load_state_dict(first.state_dict())
    for _ in range(10):
        first.step()
    for _ in range(10):
        second.step()
    assert equal(first.state_dict(), second.state_dict())


def test_a_checkpoint_of_another_kind_of_device_goes_on_with_new_random_numbers():
    saved = Trainer(network(), regression, TrainerConfig(iterations=5))
    for _ in range(3):
        saved.step()
    state = saved.state_dict() | {"generator": torch.zeros(16, dtype=torch.uint8)}  # as of cuda
    trainer = Trainer(network(seed=1), regression, TrainerConfig(iterations=5))
    begun = trainer.generator.get_state()
    with pytest.warns(UserWarning, match="saved on another kind of device: random numbers are"):
        trainer.load_state_dict(state)
    assert trainer.iteration == 3
    assert equal(trainer.state_dict()["optimizer"], state["optimizer"])
    assert not torch.equal(trainer.generator.get_state(), begun)
    trainer.step()


def test_resume_without_a_file_starts_and_of_a_finished_run_does_nothing(tmp_path):
    def train():
        trainer = Trainer(network(), regression, TrainerConfig(iterations=5), checkpoint=path)
        return trainer.fit(resume=True).state_dict(), trainer.iteration

    path = tmp_path / "new" / "c.pt"
    averaged, iteration = train()
    content = path.read_bytes()
    again, iteration_again = train()
    assert equal(averaged, again)
    assert iteration == iteration_again == 5
    assert path.read_bytes() == content


@pytest.mark.slow
def test_sigkill_at_random_moments_then_resume_is_bit_identical(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = run_with_kills(train, whole, iterations=ITERATIONS, kills=0, seed=0)
    starts = run_with_kills(train, killed, iterations=ITERATIONS, kills=8, seed=17)
    assert undisturbed == [1]
    assert len(starts) == 9
    assert len({start for start in starts if start > 1}) > 3  # it did resume in the midst

    expected, found = (checkpoints.load(folder / "checkpoint.pt") for folder in (whole, killed))
    for part in ("iteration", "module", "ema", "optimizer", "generator", "loss"):
        assert equal(expected[part], found[part]), part
    assert expected["iteration"] == ITERATIONS
    for name in ("metrics.csv", "metrics.jsonl"):
        content = (whole / name).read_bytes()
        assert content.count(b"\n") >= ITERATIONS // 10
        assert (killed / name).read_bytes() == content


# --- what must stop it ---------------------------------------------------------------------------


def poisoned(at, where):
    """The quadratic, with a NaN in the loss or only in its gradient from iteration ``at`` on."""

    def loss(module, generator):
        value, metrics = quadratic(module, generator)
        if module.losses >= at:
            bad = (0.0 * module.theta[0]).sqrt()  # 0 with the gradient 0 * inf
            value = value + (bad / 0.0 if where == "loss" else bad)
        return value, metrics

    return loss


@pytest.mark.parametrize("where", ["loss", "gradient norm"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nan_stops_training_and_keeps_the_last_good_checkpoint(tmp_path, where, device):
    path = tmp_path / "c.pt"
    config = TrainerConfig(iterations=100, checkpoint_every=9)
    trainer = Trainer(Point(), poisoned(23, where), config, checkpoint=path)
    trainer._device = torch.device(device)  # on a GPU the numbers are read with a delay
    with pytest.raises(TrainingDiverged, match=rf"{where} is nan in iteration 23.*iteration 18\)"):
        trainer.fit()
    reference = Trainer(Point(), quadratic, config)
    for _ in range(18):
        reference.step()
    state = checkpoints.load(path)
    assert all(equal(state[key], value) for key, value in reference.state_dict().items())
    if device == "cpu":  # seen before the weights changed
        assert trainer.module.theta.isfinite().all()

    resumed = Trainer(Point(), quadratic, config, checkpoint=path)
    resumed.fit(resume=True)
    assert resumed.iteration == 100


def test_nan_before_the_first_checkpoint_says_so_and_keeps_an_older_file(tmp_path):
    (tmp_path / "c.pt").write_bytes(b"another run's")
    trainer = Trainer(Point(), poisoned(3, "loss"), TrainerConfig(), checkpoint=tmp_path / "c.pt")
    with pytest.raises(TrainingDiverged, match="iteration 3; this run has saved no checkpoint"):
        trainer.fit()
    assert (tmp_path / "c.pt").read_bytes() == b"another run's"


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Vandal(Callback):
        def on_step(self, trainer, iteration, metrics):
            if iteration == 20:
                trainer.module.theta.data[1] = math.inf

    path, config = tmp_path / "c.pt", TrainerConfig(iterations=40, checkpoint_every=10)
    trainer = Trainer(Point(), quadratic, config, callbacks=[Vandal()], checkpoint=path)
    with pytest.raises(TrainingDiverged, match="weight is not finite after iteration 20"):
        trainer.fit()
    assert checkpoints.load(path)["iteration"] == 10


def test_large_but_finite_float64_losses_are_no_divergence():
    config = replace(PLAIN, iterations=2)
    Trainer(Point(), lambda m, g: (m.theta.sum() + 1e200, {}), config).fit()


def test_checkpoints_that_do_not_fit(tmp_path):
    path, config = tmp_path / "c.pt", TrainerConfig(iterations=3)
    Trainer(network(), regression, config, checkpoint=path, identity={"target": "ring"}).fit()

    def resume(module, identity):
        Trainer(module, regression, config, checkpoint=path, identity=identity).fit(resume=True)

    resume(network(), {"target": "ring"})
    with pytest.raises(CheckpointError, match="target: 'ring' in the checkpoint, expected 'moons'"):
        resume(network(), {"target": "moons"})
    with pytest.raises(CheckpointError, match="does not fit this trainer"):
        resume(nn.Linear(3, 1), {"target": "ring"})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        resume(network(), {"target": "ring"})


def adapted(scale=1.0):
    """A large frozen layer below a small one that is trained."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4000), nn.BatchNorm1d(4000), nn.Linear(4000, 1))
    module[0].requires_grad_(False).weight.mul_(scale)
    return module


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_checkpoints_without_frozen_weights_resume_exactly_and_know_them(tmp_path, decay):
    path = tmp_path / "c.pt"
    config = replace(PLAIN, lr=1e-4, ema_decay=decay)

    def fit(module, iterations, **options):
        options = {"checkpoint": path, "save_frozen": False, "identity": {"a": 1}} | options
        trainer = Trainer(module, regression, replace(config, iterations=iterations), **options)
        return trainer.fit(resume=trainer.checkpoint is not None).state_dict()

    whole = fit(adapted(), 6, checkpoint=None)
    fit(adapted(), 4, checkpoint=tmp_path / "all.pt", save_frozen=True)
    fit(adapted(), 4)
    state = checkpoints.load(path)
    assert not {"0.weight", "0.bias"} & state["module"].keys()
    assert {"1.running_mean", "2.weight"} <= state["module"].keys()
    assert (state["ema"] or state["module"]).keys() == state["module"].keys()
    assert state["identity"].keys() == {"a", "frozen_weights"}
    saved = (tmp_path / "all.pt").stat().st_size - path.stat().st_size
    assert saved > 4000 * 4 * 4 - 1000

    with pytest.raises(CheckpointError, match=r"another run; frozen_weights: '\w{16}' in the"):
        fit(adapted(scale=1.001), 6)
    with pytest.raises(CheckpointError, match="frozen_weights: 'absent' in the checkpoint"):
        fit(adapted(), 6, checkpoint=tmp_path / "all.pt")
    with pytest.raises(CheckpointError, match="in the checkpoint, expected 'absent'"):
        fit(adapted(), 6, save_frozen=True)
    assert equal(fit(adapted(), 6), whole)

    del state["module"]["2.weight"]
    checkpoints.save(path, state)
    with pytest.raises(CheckpointError, match=r"(?s)does not fit this trainer.*2\.weight"):
        fit(adapted(), 6)


def test_without_frozen_weights_a_checkpoint_is_the_same_either_way(tmp_path):
    for name, save_frozen in (("a", True), ("b", False)):
        options = {"checkpoint": tmp_path / name, "identity": {"a": 1}, "save_frozen": save_frozen}
        Trainer(network(), regression, PLAIN, **options).fit()
    assert equal(*(checkpoints.load(tmp_path / name) for name in ("a", "b")))


def test_unwritable_places_are_known_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    below, losses = tmp_path / "file" / "below" / "c.pt", []

    def loss(module, generator):
        losses.append(1)
        return quadratic(module, generator)

    with pytest.raises(OSError, match="checkpoint: cannot write"):
        Trainer(Point(), loss, PLAIN, checkpoint=below).fit()
    with pytest.raises(OSError, match="logger: cannot write"):
        Trainer(Point(), loss, PLAIN, callbacks=[CSVLogger(below)]).fit()
    assert losses == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iterations", -1),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr_schedule", "linear"),
        ("warmup", -1),
        ("weight_decay", -0.1),
        ("ema_decay", 1.0),
        ("grad_clip", math.nan),
        ("accumulate", 0),
        ("checkpoint_every", 0),
    ],
)
def test_configuration_is_checked(name, value):
    with pytest.raises(ValueError, match=rf"{name} must .*got '?{value}"):
        TrainerConfig(**{name: value})


def test_losses_and_modules_are_checked():
    with pytest.raises(ValueError, match=r"loss must be a scalar, got shape \(4,\)"):
        Trainer(Point(), lambda m, g: (m.theta, {}), PLAIN).step()
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        Trainer(network().requires_grad_(False), regression, PLAIN)


# --- fitting a flow ------------------------------------------------------------------------------


def test_data_sampler_draws_rows_with_their_conditions():
    data = torch.arange(20.0)[:, None]
    sampler = data_sampler(data, {"c": 2 * data, "label": torch.arange(20)})
    x, cond = sampler(100, torch.Generator().manual_seed(0))
    assert torch.equal(cond["c"], 2 * x)
    assert torch.equal(cond["label"], x[:, 0].long())
    assert torch.equal(x, data_sampler(data)(100, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match=r"cond\['c'\] must have the leading size 20 of x"):
        data_sampler(data, {"c": data[:3]})


def test_data_sampler_draws_rows_evenly_by_the_generator():
    data = torch.arange(5.0)[:, None] * torch.tensor([1.0, 10.0])
    sampler = data_sampler(data)
    rows = sampler(10_000, torch.Generator().manual_seed(0))
    assert torch.equal(rows, sampler(10_000, torch.Generator().manual_seed(0)))
    assert torch.equal(rows[:, 1], 10 * rows[:, 0])
    counts = rows[:, 0].long().bincount()
    assert ((counts - 2000).square() / 2000).sum() < 18.5  # chi-squared, 4 degrees: p = 0.001
    for bad in (data[:0], data[:, 0], data / 0):
        with pytest.raises(ValueError, match="data must"):
            data_sampler(bad)


@pytest.mark.slow
def test_fit_flow_finds_the_velocity_of_a_mixture():
    mixture = GaussianMixture.isotropic(torch.tensor([[-1.5], [1.0]]), 0.4)
    field = MLPVelocity(1, hidden=(64, 64))
    torch.manual_seed(0)
    config = TrainerConfig(iterations=1000, lr=5e-3, ema_decay=0.99)
    fitted = fit_flow(field, lambda n, g: mixture.sample(n, generator=g), config=config)
    generator = torch.Generator().manual_seed(1)
    for time in (0.1, 0.5, 0.9):
        x = mixture.marginal(time).sample(2000, generator=generator)
        t = torch.tensor(time)
        with torch.no_grad():
            exact, found = mixture(x, t), fitted(x, t)
        assert (found - exact).square().mean() < 0.01 * exact.square().mean()


class KnowsTheEnd(nn.Module):
    """(x1 - x_t) / (1 - t) with x1 as a condition: the loss is 0 if they belong together."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x, t, cond=None):
        return (cond["end"] - x) / (1 - t.reshape(-1, 1)) + self.shift


@pytest.mark.parametrize("coupling", ["independent", "optimal_transport"])
def test_conditions_stay_with_their_data(coupling):
    class Worst(Callback):
        loss = 0.0

        def on_step(self, trainer, iteration, metrics):
            self.loss = max(self.loss, float(metrics["loss"]))

    def sampler(n, generator):
        x1 = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return x1, {"end": x1.clone()}

    worst, config = Worst(), TrainerConfig(iterations=5, lr=1e-30)
    options = {"batch_size": 64, "coupling": coupling, "callbacks": [worst]}
    fit_flow(KnowsTheEnd().double(), sampler, config=config, **options)
    assert worst.loss < 1e-20


def test_optimal_transport_shortens_the_paths():
    def mean_square_velocity(coupling):
        torch.manual_seed(0)
        lengths = []

        class Lengths(Callback):
            def on_step(self, trainer, iteration, metrics):
                lengths.append(float(metrics["loss"]))

        field = MLPVelocity(2, hidden=(4,), zero_init=True)  # v = 0: the loss is |x1 - x0|^2 / d
        data = data_sampler(torch.randn(500, 2))
        config = TrainerConfig(iterations=20, lr=1e-30)
        fit_flow(
            field, data, config=config, batch_size=128, coupling=coupling, callbacks=[Lengths()]
        )
        return sum(lengths) / len(lengths)

    assert mean_square_velocity("independent") == pytest.approx(2.0, rel=0.2)
    assert mean_square_velocity("optimal_transport") < 0.4


def test_fit_flow_resumes_and_checks_its_arguments(tmp_path):
    def fit(iterations, path, **options):
        torch.manual_seed(0)
        recorder = Recorder()
        field, data = MLPVelocity(2, hidden=(8,)), torch.randn(64, 2)
        config = TrainerConfig(iterations=iterations, lr_schedule="constant")
        options = {"batch_size": 32, "callbacks": [recorder], "checkpoint": path, **options}
        fitted = fit_flow(field, data_sampler(data), config=config, **options)
        return fitted.state_dict(), recorder.events

    whole, _ = fit(30, None)
    fit(13, tmp_path / "c.pt", identity={"data": "normal"})
    resumed, events = fit(30, tmp_path / "c.pt", resume=True, identity={"data": "normal"})
    assert equal(resumed, whole)
    assert events == ["start", *range(14, 31), "end"]
    with pytest.raises(CheckpointError, match="data: 'normal' in the checkpoint"):
        fit(30, tmp_path / "c.pt", resume=True, identity={"data": "digits"})
    with pytest.raises(ValueError, match=r"coupling must be one of .*got 'sinkhorn'"):
        fit(1, None, coupling="sinkhorn")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        fit(1, None, batch_size=0)


def test_a_restart_is_a_second_training_from_the_average():
    """Bit by bit: seven iterations, then five more with a new optimiser and new schedules."""

    def loss(module, generator):
        x = torch.randn(16, 2, generator=generator)
        return (module(x) - x.sin()).square().mean(), {}

    def network():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return torch.nn.Linear(2, 2)

    options = {"lr": 0.05, "warmup": 2, "ema_decay": 0.9}
    once = Trainer(network(), loss, TrainerConfig(iterations=12, **options), restart=7).fit()
    first = Trainer(network(), loss, TrainerConfig(iterations=7, **options))
    start = first.fit().requires_grad_(True)
    second = Trainer(start, loss, TrainerConfig(iterations=5, **options))
    second.generator.set_state(first.generator.get_state())
    for name, value in second.fit().state_dict().items():
        assert torch.equal(value, once.state_dict()[name]), name
    plain = Trainer(network(), loss, TrainerConfig(iterations=12, **options)).fit()
    assert not torch.equal(plain.weight, once.weight)
