"""A model that sees the reward: its features against closed forms, and what tilting makes of it."""

import copy
import math

import pytest
import torch
from torch import nn

from adjoint.evaluator import Evaluator, velocity_along
from adjoint.models.reward_informed import RewardInformed, reward_informed
from adjoint.rewards.decoded import decoded
from adjoint.rewards.reward import Reward
from adjoint.tilt import TiltConfig, tilt
from flows.autodiff import velocity_and_vjp
from flows.mixture import GaussianMixture
from flows.networks.mlp import MLPVelocity
from flows.sampling import log_likelihood
from flows.training.callbacks import Callback

F64 = torch.float64
MEAN = torch.tensor([0.5, -1.0], dtype=F64)
COVARIANCE = torch.tensor([[0.7, 0.3], [0.3, 0.4]], dtype=F64)
SLOPE = torch.tensor([0.8, -0.5], dtype=F64)
ANISOTROPIC = GaussianMixture(torch.ones(1, dtype=F64), MEAN[None], COVARIANCE[None])


def linear(x, cond=None):
    return x @ SLOPE.to(x)


def curved(x, cond=None):
    return torch.sin(2 * x[:, 0]) + 0.3 * x[:, 0] * x[:, 1]


def steered(x, cond):
    return curved(x) * cond["c"][:, 0]


class Conditional(nn.Module):
    """A conditional base of which every part depends on x, t and the condition."""

    broadcasts = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.network = MLPVelocity(2, hidden=(8,), cond_dims={"c": 1}).double()

    def forward(self, x, t, cond=None):
        return self.network(x, t, cond)


class Guidance(nn.Module):
    """The correction (1 - t)/t s."""

    def forward(self, x, t, cond=None):
        t = torch.as_tensor(t).reshape(-1, *([1] * (x.ndim - 1)))
        return (1 - t) / t * cond["slope"]


class Recorder(nn.Module):
    """A correction of zero that keeps what it is given."""

    def forward(self, x, t, cond=None):
        self.seen = cond
        return torch.zeros_like(x)


def awake(model, seed=5):
    """``model`` with random weights in gain and last layer, so that nothing of it is zero."""
    generator = torch.Generator().manual_seed(seed)
    for weight in (model.gain.weight, model.correction.last.weight):
        weight.data = torch.randn(weight.shape, generator=generator).to(weight) / 4
    return model


def points(n=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, generator=generator, dtype=F64)


def conditional(reward=steered, seed=0):
    model = reward_informed(Conditional(), reward, 2, hidden=(8, 8), cond_dims={"c": 1}, seed=seed)
    return awake(model.double())


COND = {"c": torch.linspace(-1, 2, 6, dtype=F64)[:, None]}


# --- the features --------------------------------------------------------------------------------


def test_it_starts_at_the_base():
    x, t = points(), torch.linspace(0, 1, 6, dtype=F64)
    model = reward_informed(ANISOTROPIC, curved, 2).double()
    assert torch.equal(model(x, t), ANISOTROPIC(x, t))


@pytest.mark.parametrize("t", [0.01, 0.3, 0.9])
def test_guidance_is_the_exact_tilt_of_a_gaussian_by_a_linear_reward(t):
    tilted = GaussianMixture(
        torch.ones(1, dtype=F64), (MEAN + COVARIANCE @ SLOPE)[None], COVARIANCE[None]
    )
    x, t = points(), torch.tensor(t, dtype=F64)
    model = RewardInformed(ANISOTROPIC, linear, Guidance()).double()
    torch.testing.assert_close(model(x, t), tilted(x, t), rtol=1e-9, atol=1e-9)


def test_the_features_are_the_estimate_and_the_gradient_of_its_reward():
    base, recorder, x = Conditional(), Recorder(), points()
    t = torch.linspace(0.05, 0.95, 6, dtype=F64)
    RewardInformed(base, steered, recorder).double()(x, t, COND)
    z = x.clone().requires_grad_(True)
    estimate = z + (1 - t[:, None]) * base(z, t, COND)
    (slope,) = torch.autograd.grad(steered(estimate, COND).sum(), z)
    torch.testing.assert_close(recorder.seen["estimate"], estimate.detach())
    torch.testing.assert_close(recorder.seen["slope"], slope)
    assert torch.equal(recorder.seen["c"], COND["c"])


def test_a_capped_reward_is_pulled_back_capped():
    x, t = 3 * points(), torch.tensor(0.4, dtype=F64)
    capped, whole = Recorder(), Recorder()
    RewardInformed(ANISOTROPIC, Reward(linear, max_norm=0.1), capped).double()(x, t)
    RewardInformed(ANISOTROPIC, linear, whole).double()(x, t)
    expected = whole.seen["slope"] * 0.1 / SLOPE.norm()
    torch.testing.assert_close(capped.seen["slope"], expected)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_the_ends_of_time_are_finite(t):
    model, x = conditional(), points()
    assert torch.isfinite(model(x, torch.tensor(t, dtype=F64), COND)).all()


def test_states_of_several_times_are_those_one_by_one():
    model = conditional()
    assert model.broadcasts
    xs = torch.stack([points(seed=s) for s in range(3)])
    times = torch.tensor([0.1, 0.5, 0.8], dtype=F64)
    together = velocity_along(model, xs, times, COND)
    alone = torch.stack([model(x, t, COND) for x, t in zip(xs, times, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    parts = Evaluator(model, micro_batch=4).along(xs, times, COND)
    torch.testing.assert_close(parts, alone, rtol=1e-12, atol=1e-12)


def test_images_keep_their_shape():
    class Scaled(nn.Module):
        def forward(self, x, t, cond=None):
            return 0.5 * x

    recorder = Recorder()
    model = RewardInformed(Scaled(), lambda x, c: x.square().sum((1, 2, 3)), recorder)
    x = torch.randn(4, 3, 2, 2)
    v = model(x, torch.tensor(0.2))
    assert torch.equal(v, 0.5 * x)
    torch.testing.assert_close(recorder.seen["slope"], 2 * 1.4 * 1.4 * x)
    assert model(x, torch.full((4,), 0.2)).shape == x.shape


# --- derivatives ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_its_jacobian_is_that_of_finite_differences():
    model, x, t = conditional(), points(), torch.tensor(0.6, dtype=F64)
    with torch.no_grad():
        columns = []
        for e in 1e-6 * torch.eye(2, dtype=F64):
            columns.append((model(x + e, t, COND) - model(x - e, t, COND)) / 2e-6)
    expected = torch.stack(columns, dim=2)  # (B, out, in)
    one = torch.func.jacrev(lambda z: model(z, t, COND).sum(0))(x).permute(1, 0, 2)
    forward = torch.func.jacfwd(lambda z: model(z, t, COND).sum(0))(x).permute(1, 0, 2)
    torch.testing.assert_close(one, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(forward, expected, rtol=1e-6, atol=1e-6)
    cotangent = points(seed=9)
    product = velocity_and_vjp(model, x, t, cotangent, COND)[1]
    torch.testing.assert_close(
        product, torch.einsum("boi,bo->bi", expected, cotangent), rtol=1e-6, atol=1e-6
    )


DECODERS = {
    "plain": lambda: Reward(curved),
    "own gradient": lambda: Reward(
        curved,
        gradient=lambda x, c: torch.stack(
            [2 * torch.cos(2 * x[:, 0]) + 0.3 * x[:, 1], 0.3 * x[:, 0]], 1
        ),
    ),
    "sum": lambda: Reward(curved) + 0.5 * Reward(linear),
    "decoded": lambda: decoded(curved, nn.Linear(2, 2).double(), chunk=4),
}


@pytest.mark.parametrize("name", list(DECODERS))
def test_every_kind_of_reward_gives_the_same_jacobian_by_all_ways(name):
    torch.manual_seed(0)
    reward = DECODERS[name]()
    model = awake(reward_informed(ANISOTROPIC, reward, 2, hidden=(8,)).double())
    x, t = points(), torch.tensor(0.6, dtype=F64)
    with torch.no_grad():
        columns = [(model(x + e, t) - model(x - e, t)) / 2e-6 for e in 1e-6 * torch.eye(2).double()]
    expected = torch.stack(columns, dim=2)
    z = x.clone().requires_grad_(True)
    v = model(z, t)
    rows = [torch.autograd.grad(v[:, i].sum(), z, retain_graph=True)[0] for i in range(2)]
    torch.testing.assert_close(torch.stack(rows, dim=1), expected, rtol=1e-5, atol=1e-6)
    by_func = torch.func.jacrev(lambda z: model(z, t).sum(0))(x).permute(1, 0, 2)
    torch.testing.assert_close(by_func, expected, rtol=1e-5, atol=1e-6)


def test_the_likelihood_of_guidance_is_that_of_the_exact_tilt():
    model = RewardInformed(ANISOTROPIC, linear, Guidance()).double()
    law = torch.distributions.MultivariateNormal(MEAN + COVARIANCE @ SLOPE, COVARIANCE)
    x1, t0 = points(), 1e-6
    grid = torch.tensor([0.0, 0.5, 1.0], dtype=F64)

    def field(x, t, cond=None):
        return model(x, t.clamp_min(t0), cond)

    found, _ = log_likelihood(field, x1, grid=grid, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found, law.log_prob(x1), rtol=0, atol=2e-5)


class Judge(nn.Module):
    """A reward with weights that were left trainable."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x, cond=None):
        return self.network(x)[:, 0]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.slow
def test_only_gain_and_correction_are_trained(compiled):
    judge = Judge().double()
    model = awake(
        reward_informed(Conditional(), judge, 2, hidden=(8,), cond_dims={"c": 1}).double()
    )
    names = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert names == {"gain", "correction"}
    call = torch.compile(model, backend="aot_eager") if compiled else model
    x, t = points(), torch.tensor(0.3, dtype=F64)
    v = call(x, t, COND)
    torch.testing.assert_close(v, model(x, t, COND), rtol=1e-10, atol=1e-12)
    v.square().sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    assert all(bool(g.abs().sum() > 0) for g in got.values())
    assert [p.grad for p in judge.parameters()] == [None] * 4
    model.zero_grad()
    model(x, t, COND).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-9, atol=1e-12)


def test_a_given_gradient_leaves_no_graph_to_its_weights():
    judge = Judge().double()

    def slope(x, cond=None):
        return judge.network[0](x)[:, :2]

    model = awake(
        reward_informed(ANISOTROPIC, Reward(linear, gradient=slope), 2, hidden=(8,)).double()
    )
    model(points(), torch.tensor(0.3, dtype=F64)).sum().backward()
    assert [p.grad for p in judge.parameters()] == [None] * 4


def test_inference_mode_is_refused():
    model = reward_informed(ANISOTROPIC, linear, 2).double()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad"):
        model(points(), torch.tensor(0.3, dtype=F64))


def test_copies_share_the_reward_and_the_base_stays_in_evaluation_mode():
    judge = Judge()
    model = reward_informed(Conditional(), judge, 2, cond_dims={"c": 1})
    clone = copy.deepcopy(model)
    assert clone._reward is model._reward
    assert clone.gain.weight is not model.gain.weight
    assert not any("judge" in name or "reward" in name for name in model.state_dict())
    model.train()
    assert model.correction.training
    assert not model.base.training


# --- tilting -------------------------------------------------------------------------------------


class Stop(Callback):
    """Ends a training in its third update."""

    def on_step(self, trainer, iteration, metrics):
        if iteration == 3:
            raise KeyboardInterrupt


class Small(nn.Module):
    """A base with weights, in 8 dimensions."""

    broadcasts = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.network = MLPVelocity(8, hidden=(8,))

    def forward(self, x, t, cond=None):
        return self.network(x, t)


@pytest.mark.slow
def test_it_learns_sooner_than_a_model_that_sees_the_state_only():
    """Where guidance is nearly right."""
    generator = torch.Generator().manual_seed(2)
    root = torch.randn(16, 16, generator=generator) / 4
    covariance = root @ root.T + 0.1 * torch.eye(16)
    base = GaussianMixture(torch.ones(1), torch.zeros(1, 16), covariance[None])

    def reward(x, cond=None):
        return torch.tanh(x[:, :8]).sum(1)

    config = TiltConfig(
        iterations=40,
        steps=10,
        batch_size=64,
        lr=3e-3,
        ema_decay=0.9,
        base_samples=512,
        certificate_samples=1024,
        refine_fraction=0.0,
    )
    own = tilt(base, reward, shape=(16,), config=config, model=reward_informed(base, reward, 16))
    plain = tilt(base, reward, shape=(16,), config=config)
    spread = [found.certificate.log_weight_std for found in (own, plain)]
    assert spread[0] < 0.95 * spread[1] < 0.5 * plain.certificate_base.log_weight_std
    z, error = own.certificate.log_z, own.certificate.log_z_stderr
    other = plain.certificate_base
    assert abs(z - other.log_z) < 4 * math.hypot(error, other.log_z_stderr)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"micro_batch": 24}, {"reward_batch": 16}])
def test_a_tilt_resumes_and_its_options_change_nothing(tmp_path, options):
    file = tmp_path / "tilt.pt"
    judge = Judge()

    def rewarded(x, cond=None):
        return judge(x[:, :2])

    def train(**more):
        kinds = {"iterations": 4, "steps": 4, "batch_size": 32}
        kinds |= {"certificate_samples": 0, "base_samples": 64}
        config = TiltConfig(**kinds, checkpoint_every=2, **more.pop("options", {}))
        model = reward_informed(Small(), rewarded, 8, hidden=(16,))
        return tilt(Small(), rewarded, shape=(8,), config=config, model=model, **more).field

    whole = train()
    with pytest.raises(KeyboardInterrupt):
        train(options=options, checkpoint=file, callbacks=[Stop()])
    saved = torch.load(file, weights_only=True)["module"]
    assert saved
    assert not any(name.startswith("base.") for name in saved)  # the caller has it
    resumed = train(options=options, checkpoint=file, resume=True).state_dict()
    exact = not options
    for name, value in whole.state_dict().items():
        if exact:
            assert torch.equal(resumed[name], value)
        torch.testing.assert_close(resumed[name], value, rtol=1e-3, atol=1e-5)


# --- refusals ------------------------------------------------------------------------------------


def test_names_of_features_are_refused_among_conditions():
    with pytest.raises(ValueError, match=r"cond_dims must not name \['slope'\]"):
        reward_informed(ANISOTROPIC, linear, 2, cond_dims={"slope": 1})
    with pytest.raises(ValueError, match=r"cond must not name \['estimate'\]"):
        RewardInformed(ANISOTROPIC, linear, Recorder())(
            points(), torch.tensor(0.5), {"estimate": points()}
        )


def test_a_condition_that_the_reward_misses_is_named():
    with pytest.raises(ValueError, match="needs a condition"):
        RewardInformed(ANISOTROPIC, steered, Recorder())(points(), torch.tensor(0.5))
