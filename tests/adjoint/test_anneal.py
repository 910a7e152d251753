"""Tilts at falling temperatures: how the next one is chosen, when to stop, and how to resume."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.linear_tilt import BASE, FAST, S2, Shift
from torch import nn

from adjoint import TiltConfig, anneal
from adjoint.anneal import LEAST_ESS, PATIENCE, next_fraction, reason_to_stop
from flows import GaussianMixture, Residual
from flows.training.callbacks import Callback, StopTraining

F64 = torch.float64
STAGES = replace(FAST, iterations=60, certificate_samples=512, base_samples=512)


def far(x, cond=None):
    """A slope that shifts the base by 4 of its standard deviations: 8 nats."""
    return 4.0 / S2**0.5 * x[:, 0]


def run(reward=far, config=STAGES, model=None, **options):
    return anneal(
        BASE,
        reward,
        shape=(2,),
        config=config,
        model=Shift() if model is None else model,
        dtype=F64,
        **options,
    )


class Push(nn.Module):
    """A velocity that is one trained vector."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=F64))

    def forward(self, x, t, cond=None):
        return self.w.expand_as(x)


def test_the_next_temperature_keeps_a_half_of_the_effective_samples():
    """Gaussian rewards of standard deviation a leave exp(-δ² a²): δ a = √log 2 = .83."""
    rewards = 5.0 * torch.randn(1, 20_000, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = next_fraction(torch.zeros_like(rewards), rewards, 0.0, 0.5)
    assert found == pytest.approx(math.sqrt(math.log(2.0)) / 5.0, rel=0.03)
    assert next_fraction(torch.zeros_like(rewards), rewards, 0.9, 0.5) == 1.0
    smaller = next_fraction(torch.zeros_like(rewards), rewards, 0.0, 0.9)
    assert smaller == pytest.approx(math.sqrt(-math.log(0.9)) / 5.0, rel=0.05)


def test_weights_of_the_stage_are_part_of_the_next_ones():
    """Where log w undoes the step, the weights become even, and all of it can be gone."""
    rewards = 5.0 * torch.randn(1, 2000, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert next_fraction(-0.5 * rewards, rewards, 0.5, 0.5) == 1.0


@pytest.mark.slow
def test_a_far_reward_is_reached_in_stages_that_grow_to_all_of_it():
    annealed = run()
    assert annealed.stopped is None
    fractions = [stage.fraction for stage in annealed.stages]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert 4 <= len(fractions) <= 7  # 4 / .83 = 4.8
    assert all(stage.temperature * stage.fraction == pytest.approx(1) for stage in annealed.stages)
    assert all(stage.ess > 0.8 for stage in annealed.stages)
    exact = torch.tensor([4.0 * S2**0.5, 0.0], dtype=F64)
    torch.testing.assert_close(annealed.tilted.field.w, exact, atol=0.02, rtol=0)
    assert annealed.tilted.config.iterations == 60
    assert "1.0000" in str(annealed)


@pytest.mark.slow
def test_stages_go_on_with_the_model_of_the_stage_before():
    class Starts(Callback):
        def on_start(self, trainer):
            starts.append(trainer.module.w.detach().clone())
            trained.append(trainer.module.w.requires_grad)

    starts, trained, model = [], [], Shift()
    annealed = run(callbacks=[Starts()], config=replace(STAGES, ema_decay=0.9), model=model)
    assert float(model.w.detach().norm()) == 0.0  # stages go on from the averaged weights, copies
    assert len(starts) == len(annealed.stages)
    assert all(trained)
    assert float(starts[0].norm()) == 0.0
    shifts = [float(start[0]) for start in starts]
    assert shifts == sorted(shifts)
    assert shifts[-1] > 2.0 * S2**0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:judgement")
def test_a_residual_network_goes_on_too():
    """The frozen base inside of it stays frozen, and no stage trains what the last did not."""

    class Base(nn.Module):
        """A flow that has a weight."""

        def __init__(self):
            super().__init__()
            self.flow = GaussianMixture.isotropic(torch.zeros(1, 2, dtype=F64), 1.0)
            self.mean = nn.Parameter(torch.zeros(2, dtype=F64))

        def forward(self, x, t, cond=None):
            return self.flow(x, t, cond) + self.mean

    class Trained(Callback):
        def on_start(self, trainer):
            weights = dict(trainer.module.named_parameters())
            trained.append({name for name, p in weights.items() if p.requires_grad})
            starts.append(float(weights["correction.w"].detach().norm()))

    config, base, trained, starts = replace(STAGES, iterations=3, lr=1e-3), Base(), [], []
    annealed = anneal(
        base,
        lambda x, c: 2.0 * x[:, 0],
        shape=(2,),
        config=config,
        model=Residual(base, Push()),
        stage_iterations=2,
        dtype=F64,
        callbacks=[Trained()],
    )
    assert len(annealed.stages) >= 2
    assert trained == [{"correction.w"}] * len(annealed.stages)
    assert starts[0] == 0.0
    assert min(starts[1:]) > 0
    weights = dict(annealed.tilted.field.named_parameters())
    assert float(weights["base.mean"].norm()) == 0


@pytest.mark.slow
def test_a_reward_without_a_tilt_is_not_run_after():
    """Under N(m, s²) and r = x²/(1.2 s²) no more than .6 of the reward has a finite mean."""

    class Scale(nn.Module):
        """The velocity of N(m, s² I) for a base N(M, S2 I), with m and log s² to be learned."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.0, 0.0], dtype=F64))

        def forward(self, x, t, cond=None):
            mean, variance = BASE.means[0] + self.w[0], S2 * self.w[1].exp()
            t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
            spread = t**2 * variance + (1 - t) ** 2
            return mean + (t * variance - (1 - t)) / spread * (x - t * mean)

    def square(x, cond=None):
        return (x - BASE.means[0]).square().sum(1) / (1.2 * S2)

    config = replace(STAGES, iterations=240, steps=20, batch_size=64)
    with pytest.warns(UserWarning, match="no finite mean"):
        annealed = run(square, model=Scale(), config=config)
    assert annealed.stopped is not None
    assert PATIENCE <= len(annealed.stages) < 10
    reached = annealed.stages[-1]
    assert 0.3 < reached.fraction < 0.6
    assert annealed.tilted.config.temperature == reached.temperature


@pytest.mark.parametrize(
    ("fractions", "shapes", "ess", "reason"),
    [
        ([0, 0.4, 0.6, 0.7, 0.75, 0.775], 5 * [1.5], 0.9, "no finite mean"),
        ([0, 0.4, 0.6, 0.7, 0.75, 0.775], [1.5] * 4 + [0.9], 0.9, None),  # the tail has an end
        ([0, 0.4, 0.6, 0.7, 0.75], 4 * [1.5], 0.9, "no finite mean"),
        ([0, 0.4, 0.6, 0.7], 3 * [1.5], 0.9, None),  # too early to tell
        ([0, 0.1, 0.2, 0.3, 0.4, 0.5], 5 * [1.5], 0.9, None),  # far, but at an equal pace
        ([0, 0.2], 2 * [0.5], 0.9 * LEAST_ESS, "effective"),
        ([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], 9 * [0.5], 0.9, "most_stages"),
    ],
)
def test_the_reasons_to_stop(fractions, shapes, ess, reason):
    found = reason_to_stop(fractions, shapes, ess, most_stages=8)
    assert found is None if reason is None else reason in found


@pytest.mark.slow
def test_an_interrupted_run_is_resumed_to_the_same_numbers(tmp_path):
    class Interrupt(Callback):
        def __init__(self):
            self.left = 45  # in the third stage of 20 updates

        def on_step(self, trainer, iteration, metrics):
            self.left -= 1
            if not self.left:
                raise KeyError("interrupted")

    class Count(Callback):
        def on_step(self, trainer, iteration, metrics):
            updates.append(iteration)

    config, updates = replace(STAGES, checkpoint_every=1), []
    whole = run(config=config)
    with pytest.raises(KeyError):
        run(config=config, folder=tmp_path, callbacks=[Interrupt()])
    again = run(config=config, folder=tmp_path, resume=True, callbacks=[Count()])
    assert torch.equal(whole.tilted.field.w, again.tilted.field.w)
    assert whole.stages == again.stages
    made = 20 * (len(whole.stages) - 1) + 60
    assert made - 45 <= len(updates) <= made - 44


def test_a_callback_that_stops_a_stage_stops_the_run():
    class Stop(Callback):
        def on_step(self, trainer, iteration, metrics):
            raise StopTraining("enough")

    with pytest.warns(UserWarning, match="enough"):
        annealed = run(callbacks=[Stop()])
    assert len(annealed.stages) == 1
    assert "enough" in str(annealed)


@pytest.mark.parametrize(
    "options",
    [
        {"kept": 1.0},
        {"most_stages": 0},
        {"stage_iterations": 0},
        {"resume": True},
        {"config": TiltConfig(certificate_samples=0)},
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_any_work(options):
    name = next(iter(options)).replace("config", "certificate_samples")
    with pytest.raises(ValueError, match=name):
        run(**options)
