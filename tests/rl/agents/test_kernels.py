"""Kernels as an option of the agents: running error of the base, and exactness on a Gaussian.

Base X_1 ~ N(m, S²), Q linear with slope b: the tilt is N(m + τ b S², S²), and
mmse(t) = S² (1-t)² / (t² S² + (1-t)²).
"""

import pytest
import torch
from helpers.agent_problems import HORIZON, OPTIONS, batch, make, measure, noise
from torch import nn

from adjoint.chain.kernels import make_kernel, measure_mmse, own_time_kernel
from applications.rl.agents.chain_kernel import FLOOR, DenoiserError
from applications.rl.agents.losses import chain_adjoint, matching_loss
from applications.rl.agents.options import AGENT_KERNELS
from applications.rl.agents.rollouts import condition
from applications.rl.data.replay import Batch
from flows import grid as grids

CPU = torch.device("cpu")
M, S2, SLOPE, TAU = 0.5, 0.49, 1.25, 0.8


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


class Gaussian(nn.Module):
    """Velocity of N(mean, S²) in every dimension, whatever the observation."""

    def __init__(self, mean):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(float(mean), dtype=torch.float64))

    def forward(self, x, t, cond=None):
        t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1)
        scale = t**2 * S2 + (1 - t) ** 2
        x1 = self.mean + t * S2 / scale * (x - t * self.mean)
        x0 = (1 - t) / scale * (x - t * self.mean)
        return x1 - x0


class Linear(nn.Module):
    """Two critics whose mean has slope SLOPE in every dimension of the action."""

    def forward(self, observations, actions, *, stop_weight_gradient=False):
        q = SLOPE * actions.sum(1)
        return torch.stack([0.5 * q, 1.5 * q])


def gaussian_agent(kernel, steps=8, **options):
    agent = make(
        "qam",
        kernel=kernel,
        flow_steps=steps,
        clip_terminal=False,
        inverse_temperature=TAU,
        **options,
    )
    agent.target_behaviour = Gaussian(M).requires_grad_(False)
    agent.target_critic = Linear()
    agent.policy = Gaussian(M + TAU * SLOPE * S2)
    return agent


def gaussian_batch(size, seed=0):
    actions = torch.randn(size, HORIZON, 2, generator=gen(seed), dtype=torch.float64)
    one = torch.ones(size, dtype=torch.float64)
    s = torch.zeros(size, 5, dtype=torch.float64)
    return Batch(s, M + S2**0.5 * actions, 0 * one, one, one, s)


def mmse(t):
    return S2 * (1 - t) ** 2 / (t**2 * S2 + (1 - t) ** 2)


def test_running_error_is_the_mmse_of_the_base():
    agent = gaussian_agent("moment_matched")
    size = 80_000
    data, eps = gaussian_batch(size), {}
    eps["bc_x0"] = torch.randn(size, 6, generator=gen(1), dtype=torch.float64)
    measure(agent, data, eps)
    t = grids.uniform(8)[:-1]
    # 10 000 rows of 6 dimensions a time: relative deviation √(2 / 60 000).
    torch.testing.assert_close(agent.kernel.error.mmse(), mmse(t), rtol=0.025, atol=0)
    measured = measure_mmse(agent.flow.reference, grids.uniform(8), data.actions.flatten(1))
    torch.testing.assert_close(agent.kernel.error.mmse(), measured, rtol=0.03, atol=0)
    torch.testing.assert_close(
        agent.kernel.on(CPU).std,
        make_kernel("moment_matched", grids.uniform(8), mmse=agent.kernel.error.mmse()).std,
    )


def test_running_error_is_an_average_that_forgets_its_start():
    error = DenoiserError(grids.uniform(2))
    torch.testing.assert_close(error.mmse(), torch.tensor([1.0, 0.25], dtype=torch.float64))

    def update(value, valid):
        x1 = torch.full((4, 3), value**0.5)
        error.update(lambda x, t, c: torch.zeros_like(x), 0 * x1, x1, torch.tensor(valid), {})

    update(4.0, [1.0, 1, 1, 1])
    torch.testing.assert_close(error.mean(), torch.full((2,), 4.0, dtype=torch.float64))
    update(8.0, [1.0, 0, 0, 0])  # rows 0 and 2 are at the first time, 1 and 3 at the second
    expected = (0.99 * 0.01 * 4 + 0.01 * 8) / (0.99 * 0.01 + 0.01)
    torch.testing.assert_close(error.mean(), torch.tensor([expected, 4.0], dtype=torch.float64))
    for _ in range(1500):
        update(0.0, [1.0, 1, 1, 1])
    assert (error.mmse() >= FLOOR).all()
    assert (error.mean() < 1e-5).all()


def test_running_error_with_a_batch_smaller_than_the_grid():
    error = DenoiserError(grids.uniform(5))
    x1 = torch.tensor([[1.0], [2.0]])
    error.update(lambda x, t, c: 0 * x, 0 * x1, x1, torch.ones(2), {"observation": x1})
    # rows 0 .. 5 are data 0 1 0 1 0 1 at times 0 1 2 3 4 0
    expected = torch.tensor([2.5, 4.0, 1.0, 4.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(error.mean(), expected)


def test_running_error_is_part_of_the_state():
    agent, other = (make("qam", kernel="moment_matched", seed=seed) for seed in (1, 2))
    eps = noise(agent)
    for _ in range(3):
        agent.loss(batch(), eps)
    other.load_state_dict(agent.state_dict())
    assert torch.equal(agent.kernel.on(CPU).std, other.kernel.on(CPU).std)
    assert not torch.equal(
        agent.kernel.on(CPU).std, make("qam", kernel="moment_matched").kernel.on(CPU).std
    )
    assert torch.equal(agent.loss(batch(), eps)[0], other.loss(batch(), eps)[0])
    assert make("qam").kernel.error is None


@pytest.mark.parametrize("kernel", [k for k in AGENT_KERNELS if k != "moment_matched"])
def test_constant_kernels_are_the_core_tables(kernel):
    table, expected = (
        make("qam", kernel=kernel).kernel.on(CPU),
        make_kernel(kernel, grids.uniform(4)),
    )
    for column in (
        "t",
        "mean_x",
        "mean_v",
        "std",
        "adjoint_x",
        "adjoint_v",
        "residual_v",
        "residual_a",
    ):
        assert torch.equal(getattr(table, column), getattr(expected, column))


def exact_error(agent, size=80_000):
    """Set the running error to what it is for the Gaussian."""
    t = grids.uniform(agent.config.flow_steps)[:-1]
    agent.kernel.error.total.copy_(mmse(t) / (1 - t) ** 2)
    agent.kernel.error.weight.fill_(1.0)


@pytest.mark.parametrize("steps", [5, 10])
def test_moment_matched_rollout_of_the_tilt_has_its_mean_and_variance(steps):
    agent = gaussian_agent("moment_matched", steps)
    exact_error(agent)
    size = 40_000
    eps = {
        "sde_x0": torch.randn(size, 6, generator=gen(), dtype=torch.float64),
        "sde_eps": torch.randn(steps, size, 6, generator=gen(1), dtype=torch.float64),
        "next_action_noise": torch.zeros(size, 1, 6, dtype=torch.float64),
    }
    end = agent.rollouts(gaussian_batch(size), eps).chain.xs[-1]
    # 240 000 numbers: deviations .0014 of the mean and .0014 of the variance.
    assert end.mean().item() == pytest.approx(M + TAU * SLOPE * S2, abs=0.006)
    assert end.var().item() == pytest.approx(S2, abs=0.006)


@pytest.mark.parametrize("steps", [5, 10])
def test_moment_matched_has_the_exact_tilt_as_its_fixed_point(steps):
    agent = gaussian_agent("moment_matched", steps)
    exact_error(agent)
    eps = noise(agent)
    s, chain = batch().observations, agent.rollouts(batch(), eps).chain
    kernel, xs = chain.kernel, chain.xs
    adjoint = chain_adjoint(agent.flow, chain, s, agent.reward)
    cond = condition(s)
    for k in range(steps):
        target = adjoint.v_base[k] - (1 - kernel.t[k]) * adjoint.values[k]
        exact = agent.policy(xs[k], kernel.t[k], cond)
        # At t = 0 the rule is read at t = .02 and is off by 4 percent of the control.
        tolerance = 1e-9 if k else 0.05 * TAU * SLOPE * S2
        torch.testing.assert_close(target, exact, rtol=0, atol=tolerance)
    wrong = gaussian_agent("moment_matched", steps)
    exact_error(wrong)
    wrong.config = wrong.config.__class__(**{**vars(wrong.config), "inverse_temperature": 10 * TAU})
    errors = [matching_loss(a.flow, chain, s, a.reward)[0] for a in (wrong, agent)]
    assert errors[0] > 100 * errors[1]


def test_the_published_kernel_does_not_have_it_as_its_fixed_point():
    """Negative control: at few steps the published pair's target is off where ours is exact."""
    agent = gaussian_agent("euler_published", 5)
    eps, s = noise(agent), batch().observations
    chain = agent.rollouts(batch(), eps).chain
    kernel, xs = chain.kernel, chain.xs
    adjoint = chain_adjoint(agent.flow, chain, s, agent.reward)
    ratio = (kernel.residual_a / kernel.residual_v)[:, None, None]
    target = adjoint.v_base - ratio * adjoint.values[:-1]
    exact = torch.stack([agent.policy(xs[k], kernel.t[k]) for k in range(5)])
    assert (target - exact)[1:].abs().max() > 0.05


@pytest.mark.parametrize("name", ["qam", "qam-e", "qam-f"])
@pytest.mark.parametrize("kernel", AGENT_KERNELS)
def test_every_adjoint_matching_agent_trains_with_every_kernel(name, kernel):
    agent = make(name, kernel=kernel, dtype=torch.float32)
    data = batch(dtype=torch.float32)
    optimizer = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad], lr=3e-4)
    before = agent.policy.mlp.layers[0].weight.clone()
    for step in range(3):
        optimizer.zero_grad()
        loss, metrics = agent.loss(data, noise(agent, step))
        loss.backward()
        agent.update_targets()
        optimizer.step()
        assert all(value.isfinite() for value in metrics.values())
    assert not torch.equal(before, agent.policy.mlp.layers[0].weight)
    assert agent.policy.mlp.layers[0].weight.dtype == torch.float32


def test_own_time_kernel_is_a_function_of_tensors():
    """Gradients reach the mmse, which a wait for the device would have cut."""
    error = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
    own_time_kernel(grids.uniform(4), error).std.sum().backward()
    assert (error.grad > 0).all()


def test_kernels_are_options_of_the_adjoint_matching_agents_only():
    with_kernel = {n for n in OPTIONS if hasattr(make(n).config, "kernel")}
    assert with_kernel == {"qam", "qam-e", "qam-f", "trqam", "sqam"}
