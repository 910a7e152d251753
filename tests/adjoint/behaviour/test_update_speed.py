"""What makes an update fast: times once a step, no waiting for the device, compiled fields."""

from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode

from adjoint.chain.kernels import make_kernel
from adjoint.config import TiltConfig
from adjoint.evaluator import velocity_along
from adjoint.rewards.reward import Reward
from adjoint.tilt import tilt
from adjoint.tilt_loss import TiltLoss
from adjoint.trajectory_source import compiled
from flows.field import frozen
from flows.grid import uniform
from flows.mixture import GaussianMixture
from flows.networks.mlp import MLPVelocity

SMALL = {"steps": 4, "batch_size": 8, "kernel": "ancestral", "certificate_samples": 0}


pytestmark = pytest.mark.usefixtures("one_thread")


def network(seed=0, **options):
    torch.manual_seed(seed)
    return MLPVelocity(2, hidden=(8, 6), time_dim=4, **options)


def conditions(n, generator):
    return {"c": torch.randn(n, 1, generator=generator)}


def reward(x, cond):
    return x.sin().sum(1)


def loss_of(**options):
    config = TiltConfig(**{**SMALL, **options})
    mmse = torch.full((4,), 0.3).double() if config.kernel == "moment_matched" else None
    kernel = make_kernel(config.kernel, uniform(config.steps), mmse=mmse)
    base = frozen(network(1, cond_dims={"c": 1}))
    return TiltLoss(
        base, Reward(reward), kernel, shape=(2,), config=config, cond_sampler=conditions
    )


def slopes(model, v):
    return torch.autograd.grad(v.square().sum(), list(model.parameters()))


def gradients(loss, model, seed):
    """Loss, metrics and gradients of one update."""
    model.zero_grad()
    value, metrics = loss(model, torch.Generator().manual_seed(seed))
    value.backward()
    return {"loss": value.detach(), **metrics}, [p.grad for p in model.parameters()]


def test_times_are_embedded_once_a_step():
    model = network(cond_dims={"c": 1}).double()

    def foreign(x, t, cond):
        return model(x, t, cond)

    seen = []
    model.time.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    g = torch.Generator().manual_seed(2)
    xs = torch.randn(3, 5, 2, generator=g, dtype=torch.float64)
    t, cond = torch.tensor([0.0, 0.2, 0.9]), conditions(5, g)
    found = velocity_along(model, xs, t, cond)
    assert seen == [3]
    one_by_one = torch.stack([model(x, time, cond) for x, time in zip(xs, t, strict=True)])
    torch.testing.assert_close(found, one_by_one, rtol=1e-12, atol=1e-12)
    repeated = velocity_along(foreign, xs, t, cond)
    torch.testing.assert_close(found, repeated, rtol=1e-12, atol=1e-12)
    assert seen[-1] == 15
    for once, each in zip(slopes(model, found), slopes(model, repeated), strict=True):
        torch.testing.assert_close(once, each, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (3,), (3, 5), (1, 5)])
def test_states_at_several_times_need_a_time_each(shape):
    with pytest.raises(ValueError, match=r"t must be a scalar or \(3, 1\), got shape"):
        network()(torch.zeros(3, 5, 2), torch.zeros(shape))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel": "euler_published"},
        {"kernel": "moment_matched", "importance": True},
        {"late_fraction": 0.25, "early_fraction": 0.5, "clip_quantile": True},
        {"refine_fraction": 1.0, "refine_loss": "log_variance", "batch_size": 16},
        {"micro_batch": 5, "reward_batch": 3},
    ],
)
@pytest.mark.slow
def test_an_update_never_waits_for_the_device(options):
    """Fake tensors have no numbers: what would be read from one, on a GPU by waiting, is an error.

    The chain, the adjoint and both losses then depend on shapes alone.
    """
    loss, model = loss_of(**options), network(cond_dims={"c": 1})
    with FakeTensorMode(allow_non_fake_inputs=True):
        for _ in range(2):
            value, metrics = loss(model, torch.Generator())
            with pytest.raises(RuntimeError):
                float(value.detach())
    assert all(metric.ndim == 0 for metric in metrics.values())


@pytest.fixture
def without_compiler(monkeypatch):
    """`torch.compile` up to the code it would generate."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options", [{"late_fraction": 0.5, "early_fraction": 0.5}, {"micro_batch": 4}]
)
@pytest.mark.slow
def test_compiled_fields_change_nothing_and_are_compiled_once(without_compiler, options):
    plain, fast = loss_of(**options), loss_of(compile=True, **options)
    model = network(cond_dims={"c": 1})
    graphs = []
    for seed in range(3):
        expected, found = gradients(plain, model, seed), gradients(fast, model, seed)
        for name, value in expected[0].items():
            torch.testing.assert_close(found[0][name], value, rtol=1e-5, atol=1e-6)
        for one, other in zip(found[1], expected[1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert 3 <= graphs[0] <= 5
    assert graphs == graphs[:1] * 3


@pytest.mark.slow
def test_many_fields_of_one_class_are_compiled(without_compiler, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile.func, backend="eager"))
    with torch._dynamo.config.patch(cache_size_limit=8):
        for width in range(1, 11):
            compiled(MLPVelocity(2, hidden=(width,)))(torch.zeros(4, 2), torch.tensor(0.5))
    assert counters["stats"]["unique_graphs"] == 10


@pytest.mark.slow
def test_a_resume_may_compile(without_compiler, tmp_path):
    def run(*, compile, resume):
        config = TiltConfig(**SMALL, iterations=2, base_samples=64, compile=compile)
        path = tmp_path / "tilt.pt"
        base = network(1)
        return tilt(base, reward, shape=(2,), config=config, checkpoint=path, resume=resume)

    first, again = run(compile=True, resume=False), run(compile=False, resume=True)
    assert counters["stats"]["unique_graphs"] > 0
    assert first.field.state_dict().keys() == again.field.state_dict().keys()
    for one, other in zip(first.field.parameters(), again.field.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(ValueError, match="compile must be False with kernel 'covariance_matched'"):
        TiltConfig(kernel="covariance_matched", compile=True)
    sharded = nn.Module()
    sharded.unshard = None
    with pytest.raises(ValueError, match="compile must be False for a base or model sharded"):
        loss_of(compile=True)(sharded, torch.Generator())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"refine_fraction": 0.5, "refine_loss": "log_variance", "importance": True},
        {"late_fraction": 0.25, "early_fraction": 0.5, "accumulate": 2},
        {"control_variates": True, "compile": True},
    ],
)
def test_a_tilt_by_graphs_is_the_tilt(options):
    means = torch.tensor([[-1.0, 0], [1, 0.5]])
    base = GaussianMixture(torch.ones(2), means, 0.3 * torch.eye(2).repeat(2, 1, 1))
    found = []
    for graph in (False, True):
        config = TiltConfig(iterations=12, steps=8, batch_size=64, cuda_graphs=graph, **options)
        tilted = tilt(base, lambda x, _: x[:, 0], shape=(2,), config=config, device="cuda")
        found.append([p.detach().cpu() for p in tilted.field.parameters()])
    for plain, recorded in zip(*found, strict=True):
        torch.testing.assert_close(recorded, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replay_size": 64, "batch_size": 64}, "replay_size must be 0 where cuda_graphs"),
        ({"clip_quantile": True}, "clip_quantile must be False where cuda_graphs"),
        ({"micro_batch": 8}, "micro_batch must be 0 where cuda_graphs"),
        ({"kernel": "covariance_matched"}, "cuda_graphs must be False with kernel"),
        ({}, "cuda_graphs must be False on device cpu"),
    ],
)
def test_what_graphs_do_not_go_with_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tilt(
            network(),
            lambda x, _: x[:, 0],
            shape=(2,),
            config=TiltConfig(cuda_graphs=True, **options),
        )
