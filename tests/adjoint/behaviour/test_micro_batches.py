"""Micro-batches, offloading and half precision: the same numbers, in less memory."""

from dataclasses import replace

import pytest
import torch
from helpers.linear_tilt import BASE, SLOPES, Shift, with_options
from torch import Tensor, nn

from adjoint.chain.adjoints import lean_adjoint
from adjoint.chain.kernels import make_kernel
from adjoint.chain.rollout import draw_noise, rollout
from adjoint.config import TiltConfig
from adjoint.evaluator import Evaluator
from adjoint.rewards.reward import Reward
from adjoint.tilt import tilt
from adjoint.tilt_loss import TiltLoss
from benchmarks.memory.ledger import HOST, HostTensor, Ledger, simulated_device
from flows import grid as grids
from flows.field import frozen
from flows.networks.mlp import MLPVelocity
from flows.training.callbacks import Callback

F64 = torch.float64


class Counting(nn.Module):
    """A conditional network that remembers how many states it was given at a time."""

    def __init__(self, seed=0, width=8):
        super().__init__()
        torch.manual_seed(seed)
        self.network = MLPVelocity(2, hidden=(width,), cond_dims={"c": 1}).double()
        self.sizes = []

    def forward(self, x, t, cond=None):
        self.sizes.append(len(x))
        return self.network(x, t, cond)


class Judge:
    """A curved conditional reward that remembers how many samples it was given at a time."""

    def __init__(self):
        self.sizes = []

    def __call__(self, x, cond):
        self.sizes.append(len(x))
        return torch.sin(2 * x[:, 0]) + 0.3 * x[:, 0] * x[:, 1] * cond["c"][:, 0]


def conditions(n, generator):
    return {"c": torch.randn(n, 1, generator=generator, dtype=F64)}


def kernel_of(name, steps=5):
    matched = name in ("moment_matched", "covariance_matched")
    return make_kernel(
        name,
        grids.uniform(steps),
        mmse=torch.linspace(1.0, 0.2, steps, dtype=F64) if matched else None,
        covariance=torch.eye(2, dtype=F64) if name == "covariance_matched" else None,
    )


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# --- the functions -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["moment_matched", "euler_published", "covariance_matched"])
def test_rollout_and_adjoint_do_not_depend_on_the_micro_batch(name):
    generator = torch.Generator().manual_seed(0)
    x0, cond = torch.randn(7, 2, generator=generator, dtype=F64), conditions(7, generator)
    model, base, kernel = Counting(), Counting(1), kernel_of(name)
    noise = draw_noise(kernel, x0, generator=generator)
    running = torch.randn(noise.shape, generator=generator, dtype=F64)
    found = []
    for micro_batch in (0, 3):
        model.sizes, base.sizes = [], []
        trajectory = rollout(
            *(Evaluator(field, micro_batch) for field in (model, base)), kernel, x0, noise, cond
        )
        adjoint = lean_adjoint(
            Evaluator(base, micro_batch),
            kernel,
            trajectory.xs,
            -x0.cos(),
            cond,
            noise=noise,
            running=running,
        )
        found.append((*vars(trajectory).values(), *vars(adjoint).values()))
    for whole, parts in zip(*found, strict=True):
        assert (whole is None) == (parts is None)
        if whole is not None:
            close(parts, whole)
    dim = 2 if name == "covariance_matched" else 1  # its Jacobian is d states for one
    assert max(model.sizes) == 3
    assert max(base.sizes) == 3 * dim


@pytest.mark.parametrize("micro_batch", [1, 4, 15, 100])
def test_velocities_and_their_gradients_do_not_depend_on_the_micro_batch(micro_batch):
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(5, 3, 2, generator=generator, dtype=F64)
    t, cond = torch.linspace(0, 0.9, 5, dtype=F64), conditions(3, generator)
    model, found = Counting(), []
    for size in (0, micro_batch):
        model.zero_grad()
        model.sizes = []
        v = Evaluator(model, size).along(xs, t, cond)
        (v * xs.sin()).sum().backward()
        found.append([v, *(p.grad for p in model.parameters())])
    for whole, parts in zip(*found, strict=True):
        close(parts, whole)
    once = [min(micro_batch, 15 - i) for i in range(0, 15, micro_batch)]
    twice = [*once, *once[::-1]] if len(once) > 1 else once  # again in the backward pass
    assert sorted(model.sizes) == sorted(twice)
    with torch.no_grad():
        model.sizes = []
        close(Evaluator(model, micro_batch).along(xs, t, cond), found[0][0])
        assert model.sizes == once


# --- the loss ------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"replay_size": 14, "losses_per_rollout": 2, "importance": True, "clip_quantile": True},
    {"late_fraction": 0.4, "early_fraction": 0.4},
    {"control_variates": True},
    {"control_variates": True, "kernel": "covariance_matched"},
    {
        "refine_fraction": 1.0,
        "refine_loss": "log_variance",
        "late_fraction": 0.4,
        "early_fraction": 0.4,
    },
    {"refine_fraction": 1.0, "refine_loss": "log_variance", "kernel": "covariance_matched"},
]


def loss_of(base, reward=None, storage_device=None, **options):
    config = TiltConfig(
        **{"batch_size": 7, "steps": 5, "iterations": 4, "refine_fraction": 0.0} | options
    )
    return TiltLoss(
        base,
        Reward(reward or Judge()),
        kernel_of(config.kernel, config.steps),
        shape=(2,),
        config=config,
        cond_sampler=conditions,
        dtype=F64,
        storage_device=storage_device,
    )


def outcome(loss, model, calls=3):
    """Values, metrics and gradients of a few calls."""
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(calls):
        model.zero_grad()
        value, metrics = loss(model, generator)
        value.backward()
        found += [value, *metrics.values(), *(p.grad for p in model.parameters())]
    return [tensor.detach().as_subclass(Tensor).clone() for tensor in found]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_loss_its_gradient_and_metrics_do_not_depend_on_the_parts(options):
    model, base, reward = Counting(), Counting(1), Judge()
    whole = outcome(loss_of(base, **options), model)
    model.sizes, base.sizes = [], []
    parts = outcome(loss_of(base, reward, micro_batch=3, reward_batch=2, **options), model)
    for a, b in zip(whole, parts, strict=True):
        close(b, a)
    dim = 2 if options.get("kernel") == "covariance_matched" else 1
    assert (max(model.sizes), max(base.sizes), max(reward.sizes)) == (3, 3 * dim, 2)


@pytest.mark.parametrize("micro_batch", [0, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.slow
def test_offloading_leaves_the_numbers_and_only_weights_on_the_device(options, micro_batch):
    model, base = Counting(), Counting(1)
    options = {"micro_batch": micro_batch, "reward_batch": micro_batch, **options}
    expected = outcome(loss_of(base, **options), model)
    with simulated_device() as ledger:
        loss = loss_of(base, storage_device=HOST, **options)
        state = torch.Generator().manual_seed(1)
        if not options.get("refine_fraction"):
            batch = loss.matching.collect(model, state)
            tensors = [tensor for tensor, _ in batch.tensors()]
            assert all(isinstance(tensor, HostTensor) for tensor in tensors)
            assert ledger.live[True] >= sum(tensor.nbytes for tensor in tensors)
            del batch, tensors
            assert ledger.live[False] < 600  # what is left are numbers of the coefficients
        found = outcome(loss, model)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)


def test_the_state_of_an_offloading_loss_is_restored_where_it_was():
    options = {"replay_size": 14, "losses_per_rollout": 3, "clip_quantile": True}
    model, base = Counting(), Counting(1)
    with simulated_device():
        loss, other = (loss_of(base, storage_device=HOST, **options) for _ in range(2))
        generator = torch.Generator().manual_seed(0)
        loss(model, generator)
        other.load_state_dict(loss.state_dict())
        assert isinstance(other.matching.cap, HostTensor)
        assert all(isinstance(x, HostTensor) for x, _ in other.matching.buffer.store.tensors())
        again = torch.Generator()
        again.set_state(generator.get_state())
        assert torch.equal(loss(model, generator)[0], other(model, again)[0])


# --- memory --------------------------------------------------------------------------------------


def peak_of(run):
    with Ledger() as ledger:
        result = run()
    return ledger.peak, result


@pytest.mark.parametrize(
    ("name", "micro_batch"), [("ancestral", 0), ("moment_matched", 0), ("euler_published", 16)]
)
@pytest.mark.slow
def test_the_memory_of_the_adjoint_pass_does_not_depend_on_the_steps(name, micro_batch):
    """Beside its results it holds what one step needs, and a few coefficients of each."""
    base, x0 = frozen(Counting(width=256)), torch.randn(16, 2, dtype=F64)
    cond, beside = {"c": torch.zeros(16, 1, dtype=F64)}, []
    for steps in (10, 40, 160):
        kernel = kernel_of(name, steps)
        xs = x0.expand(steps + 1, 16, 2).contiguous()

        def run(kernel=kernel, xs=xs):
            return lean_adjoint(Evaluator(base, micro_batch), kernel, xs, x0, cond)

        peak, adjoint = peak_of(run)
        beside.append(peak - adjoint.values.nbytes - adjoint.v_base.nbytes)
    coefficients = 5 * 8 * 150  # bytes of five columns of 150 more steps
    assert max(beside) - min(beside) < coefficients < 0.1 * min(beside)


def update_peak(**options):
    loss, model = loss_of(Counting(1, width=256), **options), Counting(width=256)
    peak, _ = peak_of(lambda: outcome(loss, model, calls=1))
    return peak


@pytest.mark.slow
def test_the_memory_of_the_loss_is_that_of_one_micro_batch():
    whole = update_peak(batch_size=16, steps=20)
    small = update_peak(batch_size=16, steps=20, micro_batch=8)
    assert small < 0.1 * whole
    assert update_peak(batch_size=32, steps=20, micro_batch=8) < 1.3 * small
    assert update_peak(batch_size=16, steps=40, micro_batch=8) < 1.3 * small


# --- the whole tilt ------------------------------------------------------------------------------

SMALL = replace(
    TiltConfig(),
    iterations=6,
    steps=4,
    batch_size=7,
    lr=0.01,
    ema_decay=0.5,
    base_samples=64,
    certificate_samples=20,
    eval_batch_size=16,
    checkpoint_every=3,
    refine_fraction=0.0,  # its draws are no continuous function of the weights
)
PARTS = {"micro_batch": 3, "reward_batch": 2, "offload": True}


def small_tilt(config, model=None, **options):
    base, reward = Counting(1), Judge()
    model = Counting() if model is None else model
    found = tilt(
        base,
        reward,
        shape=(2,),
        config=config,
        model=model,
        cond_sampler=conditions,
        dtype=F64,
        **options,
    )
    sizes = (max(model.sizes), max(found.base.sizes), max(found.field.sizes), max(reward.sizes))
    weights = [p.detach() for p in found.field.parameters()]
    judged = [value for value in vars(found.certificate).values() if isinstance(value, Tensor)]
    return [*weights, *judged, found.kernel.std], sizes, found


@pytest.mark.parametrize("kernel", ["moment_matched", "covariance_matched"])
@pytest.mark.slow
def test_a_tilt_in_parts_is_the_tilt_at_once(kernel):
    config = replace(SMALL, kernel=kernel)
    whole, _, _ = small_tilt(config)
    parts, sizes, found = small_tilt(replace(config, **PARTS))
    for a, b in zip(whole, parts, strict=True):
        close(b, a)
    dim = 2 if kernel == "covariance_matched" else 1
    assert sizes == (3, 3 * dim, 3, 2)
    x = found.sample(5, cond=conditions(5, torch.Generator().manual_seed(0)))
    assert x.dtype == F64
    assert max(found.field.sizes) == 3


@pytest.mark.slow
def test_a_tilt_in_parts_resumes_exactly_and_the_parts_may_change(tmp_path):
    whole, _, _ = small_tilt(replace(SMALL, **PARTS))
    path = tmp_path / "c.pt"

    class Stop(Callback):
        def on_step(self, trainer, iteration, metrics):
            if iteration == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small_tilt(replace(SMALL, **PARTS), checkpoint=path, callbacks=[Stop()])
    stopped = path.read_bytes()
    resumed, _, _ = small_tilt(replace(SMALL, **PARTS), checkpoint=path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    path.write_bytes(stopped)
    resumed, _, _ = small_tilt(replace(SMALL, micro_batch=5), checkpoint=path, resume=True)
    for a, b in zip(whole, resumed, strict=True):
        close(b, a)


@pytest.mark.slow
def test_the_chain_and_its_adjoint_are_float32_where_the_networks_are_bfloat16():
    torch.manual_seed(0)
    base, model = MLPVelocity(2, hidden=(32, 32)), MLPVelocity(2, hidden=(32, 32))
    slopes = torch.nn.Linear(2, 1)
    for kernel in (kernel_of("moment_matched", 10), kernel_of("covariance_matched", 10)):
        config = TiltConfig(batch_size=64, steps=10, micro_batch=24)
        reward = Reward(lambda x, c: slopes(x)[:, 0])
        loss = TiltLoss(frozen(base), reward, kernel, shape=(2,), config=config)
        exact = loss.matching.collect(model, torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16):
            generator = torch.Generator().manual_seed(0)
            x0 = torch.randn(64, 2, generator=generator)
            assert model(x0, torch.tensor(0.5)).dtype == torch.bfloat16
            noise = draw_noise(kernel, x0, generator=generator)
            trajectory = rollout(Evaluator(model, 24), Evaluator(base, 24), kernel, x0, noise)
            rounded = loss.matching.collect(model, torch.Generator().manual_seed(0))
            value, _ = loss(model, torch.Generator().manual_seed(0))
        assert value.dtype == torch.float32
        for (tensor, _), (plain, _) in zip(rounded.tensors(), exact.tensors(), strict=True):
            assert tensor.dtype == torch.float32
            error = (tensor - plain).norm() / plain.norm()
            assert 1e-7 < error < 0.1
        # The chain itself is exact to float32, whatever the velocities are.
        for k in range(kernel.steps):
            x, v = trajectory.xs[k].double(), trajectory.v[k].double()
            kick = kernel.std[k] * noise[k].double()
            if trajectory.roots is not None:
                kick = (trajectory.roots[k].double() @ noise[k].double()[:, :, None])[:, :, 0]
            ahead = kernel.mean_x[k] * x + kernel.mean_v[k] * v + kick
            torch.testing.assert_close(trajectory.xs[k + 1].double(), ahead, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("refine", [None, "log_variance", "flow_matching"])
def test_velocities_in_bfloat16_leave_the_coefficients_of_the_loss_in_float32(refine):
    """The same rounded velocities as numbers of either type have the same loss."""

    class Rounded(Shift):
        def forward(self, x, t, cond=None):
            return super().forward(x, t).to(torch.bfloat16).to(self.result)

    model, losses = Rounded(), []
    model.w.data.fill_(0.3)
    config = with_options(
        batch_size=32, refine_fraction=float(refine is not None), refine_loss=refine or "auto"
    )
    reward = Reward(lambda x, c: (x * SLOPES.float()).sum(1))
    for model.result in (torch.bfloat16, torch.float32):
        loss = TiltLoss(BASE, reward, kernel_of("moment_matched"), shape=(2,), config=config)
        losses.append(loss(model, torch.Generator().manual_seed(0))[0].detach())
    assert losses[0].dtype == torch.float32
    assert torch.equal(*losses)
