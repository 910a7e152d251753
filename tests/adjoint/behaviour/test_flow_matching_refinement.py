"""The refinement by flow matching on weighted samples of the tilted chain."""

import math

import pytest
import torch
from helpers.tilt_problems import PROBLEMS
from torch import nn

from adjoint.chain.kernels import make_kernel, measure_mmse
from adjoint.config import TiltConfig
from adjoint.cost import chosen_sizes
from adjoint.flow_matching_loss import (
    CALM,
    FEWEST,
    FlowMatchingLoss,
    has_rare_weights,
    is_worthwhile,
)
from adjoint.rewards.reward import Reward
from adjoint.tilt import tilt
from adjoint.tilt_loss import TiltLoss
from adjoint.weighted_samples import WeightedSamples
from flows import grid as grids
from flows.mixture import GaussianMixture
from flows.training import distributed
from flows.training.callbacks import Callback

F64 = torch.float64


def samples_of(x, log_weights, cond=None):
    return WeightedSamples(x, log_weights.to(F64), cond, {})


def test_draws_follow_the_weights_within_each_group():
    log_w = torch.tensor([[0.0, math.log(3.0), -math.inf], [1.0, 1.0, 1.0 + math.log(2.0)]])
    x = torch.arange(6.0)[:, None]
    cond = {"c": torch.tensor([10.0, 20.0])}
    drawn, conditions = samples_of(x, log_w, cond).draw(400, 300, torch.Generator().manual_seed(0))
    assert drawn.shape == (400, 300, 1)
    group = (drawn[..., 0] >= 3).long()
    assert torch.equal(group, group[:1].expand_as(group))  # a column is of one condition
    torch.testing.assert_close(conditions["c"], 10.0 + 10.0 * group[0])
    counts = torch.bincount(drawn.flatten().long(), minlength=6).to(F64)
    for first, expected in ((0, [1 / 4, 3 / 4, 0]), (3, [1 / 4, 1 / 4, 1 / 2])):
        found = counts[first : first + 3] / counts[first : first + 3].sum()
        torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), atol=0.006, rtol=0)
    assert 0.4 < float(group[0].to(F64).mean()) < 0.6


def test_numbers_of_the_weights():
    log_w = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -math.inf, -math.inf, -math.inf]])
    assert samples_of(torch.zeros(8, 1), log_w).effective == pytest.approx(5.0)
    spread = torch.tensor([[1.0, 3.0], [10.0, 14.0]])
    assert samples_of(torch.zeros(4, 1), spread).variance == pytest.approx((2.0 + 8.0) / 2)


def test_flow_matching_is_worthwhile_where_samples_outweigh_dimensions():
    def worthwhile(n, dim, std):
        log_w = std * torch.randn(1, n, generator=torch.Generator().manual_seed(0))
        return is_worthwhile(samples_of(torch.zeros(n, dim), log_w))

    assert worthwhile(2000, 2, 0.5)
    assert not worthwhile(2000, 256, 0.5)  # second moments alone are d²/2 numbers
    assert not worthwhile(2000, 2, 1e-3)  # the model is better already
    assert not worthwhile(FEWEST // 2, 1, 0.5)
    assert not worthwhile(2000, 1, 6.0)  # few trajectories have all the weight


def test_flow_matching_is_not_worthwhile_where_each_condition_has_few_samples():
    """One heavy sample in each of 256 groups makes 256 effective samples, but none of a tilt."""
    generator = torch.Generator().manual_seed(0)
    for std, expected in ((0.5, True), (6.0, False)):
        log_w = std * torch.randn(256, 64, generator=generator)
        assert is_worthwhile(samples_of(torch.zeros(256 * 64, 2), log_w)) is expected


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
def test_samples_are_renewed_where_the_calls_between_were_replayed(accumulate):
    """A recording makes whole updates and adds them to the calls of the tilt's loss alone."""
    loss = refinement(PROBLEMS["square"], batch_size=4, refine_samples=64, accumulate=accumulate)
    tilted, _ = PROBLEMS["square"].exact()
    model, generator = Between(PROBLEMS["square"].base, tilted, 0.0), torch.Generator()
    draw, draws = loss.refining.draw, []
    loss.refining.draw = lambda *arguments: draws.append(1) or draw(*arguments)
    loss(model, generator)
    loss.calls = 4 * accumulate
    assert loss.phase == "refine 0"
    loss.calls = 5 * accumulate  # half of ten updates
    assert loss.phase == "refine 1"
    loss(model, generator)
    assert len(draws) == 2


def test_reported_numbers_are_where_the_samples_are():
    """A copy from the host in each update would wait for the device, and stop a recording."""
    samples = WeightedSamples(torch.zeros(2, 1), torch.zeros(1, 2), None, {"ess": torch.ones(())})
    assert samples.to(torch.device("meta")).metrics["ess"].device.type == "meta"


@pytest.mark.slow
def test_no_time_is_rounded_up_to_one(monkeypatch):
    """A velocity (x̂1 - x) / (1 - t) is not finite there, where no other loss is taken."""
    loss = refinement(PROBLEMS["square"], batch_size=4, refine_samples=64)
    times = []

    def velocity(x, t, cond=None):
        times.append(t)
        return PROBLEMS["square"].base(x, t)

    model = Between(velocity, velocity, 0.0)
    monkeypatch.setattr(torch, "rand", lambda *n, **options: torch.ones(n, dtype=F64) - 1e-16)
    loss.refining.samples = samples_of(torch.zeros(64, 2, dtype=F64), torch.zeros(1, 64))
    loss.refining.flow_matching(model, torch.Generator())
    assert float(torch.cat(times).max()) < 1


class Stop(Callback):
    def __init__(self, at):
        self.at = at

    def on_step(self, trainer, iteration, metrics):
        if iteration == self.at:
            raise KeyError("stop")


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 4, 7])
def test_a_refinement_that_is_resumed_is_the_undisturbed_one(at, tmp_path):
    """At its start, with its first samples, and with its second; with labels and dropout."""

    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))

        def forward(self, x, t, cond):
            label = cond["label"].to(x.dtype)[:, None]
            return self.layers(torch.cat([x, t.expand(len(x))[:, None], label], 1))

    def train(*callbacks):
        config = TiltConfig(
            iterations=8,
            steps=3,
            batch_size=4,
            accumulate=2,
            refine_loss="flow_matching",
            refine_steps=4,
            refine_samples=128,
            base_samples=64,
            certificate_samples=0,
            checkpoint_every=1,
        )
        return tilt(
            Labelled(),
            lambda x, cond: cond["label"] * x[:, 0],
            shape=(2,),
            config=config,
            cond_sampler=lambda n, generator: {
                "label": torch.randint(3, (n,), generator=generator)
            },
            callbacks=callbacks,
            checkpoint=tmp_path / ("c.pt" if callbacks else "whole.pt"),
            resume=True,
        ).field.state_dict()

    whole = train()
    with pytest.raises(KeyError):
        train(Stop(at))
    again = train(Stop(-1))
    for name, weight in whole.items():
        assert torch.equal(weight, again[name]), name


@pytest.mark.slow
def test_processes_share_the_weights_of_one_unconditional_chain(monkeypatch):
    """Each process alone would give its part of the samples a half of the weight."""
    loss = refinement(PROBLEMS["square"], refine_samples=128)
    tilted, _ = PROBLEMS["square"].exact()
    model = Between(PROBLEMS["square"].base, tilted, 0.0)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda part: torch.cat([part, part + 1]))
    samples = loss.refining.draw(model, torch.Generator().manual_seed(0))
    assert samples.log_weights.shape == (1, 128)


def refinement(problem, *, steps=10, batch_size=4096, **options):
    """The loss of a tilt that refines from its first update, on the given problem in float64."""
    generator = torch.Generator().manual_seed(1)
    x1 = problem.base.sample(20_000, generator=generator)
    config = TiltConfig(
        steps=steps,
        batch_size=batch_size,
        iterations=10,
        refine_fraction=1.0,
        refine_loss="flow_matching",
        **options,
    )
    grid = grids.uniform(160)
    kernel = make_kernel(
        "moment_matched", grid, mmse=measure_mmse(problem.base, grid, x1, generator=generator)
    )
    return TiltLoss(
        problem.base, Reward(problem.reward), kernel, shape=(2,), config=config, dtype=F64
    )


class Between(nn.Module):
    """A velocity a v* + (1 - a) v_β of base and exact tilt, with a to be trained."""

    def __init__(self, base, tilted, a):
        super().__init__()
        self.base, self.tilted = base, tilted
        self.a = nn.Parameter(torch.tensor(a, dtype=F64))

    def forward(self, x, t, cond=None):
        v, best = self.base(x, t), self.tilted(x, t)
        return v + self.a * (best - v)


@pytest.mark.slow
def test_the_velocity_of_the_exact_tilt_is_the_minimum_whatever_draws_the_samples():
    """The samples are drawn by models away from the tilt; the minimum in a is at a = 1."""
    problem = PROBLEMS["square"]
    tilted, _ = problem.exact()
    for start in (0.0, 0.6):
        loss = refinement(problem, refine_samples=16384)
        model, generator = Between(problem.base, tilted, start), torch.Generator().manual_seed(0)
        losses = []
        for a in (0.0, 1.0, 2.0):  # a parabola in a; the samples are drawn in the first call
            if losses:
                model.a.data.fill_(a)
            else:
                model.a.data.fill_(start)
                loss(model, torch.Generator().manual_seed(5))
                model.a.data.fill_(a)
            generator.manual_seed(0)  # the same noise and times for each a
            losses.append(float(loss.refining.flow_matching(model, generator)[0].detach()))
        below, at, above = losses
        minimum = 1 + 0.5 * (below - above) / (below - 2 * at + above)
        assert minimum == pytest.approx(1.0, abs=0.05), start


@pytest.mark.slow
def test_samples_are_drawn_twice_and_pooled():
    class Scripted(FlowMatchingLoss):
        def draw(self, module, generator):
            drawn.append(len(drawn))
            x = torch.full((100, 2), float(len(drawn)), dtype=F64)
            return samples_of(x, torch.zeros(1, 100))

        def flow_matching(self, module, generator):
            used.append(self.samples.x[:, 0].unique().tolist())
            return torch.zeros(()), {}

    drawn, used = [], []
    loss = refinement(PROBLEMS["square"], refine_samples=64)
    scripted = Scripted(loss.source, loss.refining.kernel, loss.matching, renewal=3, always=True)
    for _ in range(6):
        scripted(nn.Linear(1, 1), torch.Generator())
    assert len(drawn) == 2
    assert used == [[1.0]] * 3 + [[1.0, 2.0]] * 3


def test_two_sets_of_samples_are_drawn_by_their_effective_numbers():
    """One set of 100 equal weights and one in which 25 of 100 samples have them."""
    uneven = torch.full((1, 100), -math.inf)
    uneven[0, :25] = math.log(4.0)  # so that both estimate Z = 1
    first = samples_of(torch.zeros(100, 1), torch.zeros(1, 100))
    second = WeightedSamples(torch.ones(100, 1), uneven.to(F64), None, {"ess": torch.tensor(0.25)})
    pooled = first.pooled(second)
    assert pooled.metrics == second.metrics  # of the model as it is now
    drawn, _ = pooled.draw(20, 4000, torch.Generator().manual_seed(0))
    assert float(drawn.mean()) == pytest.approx(0.2, abs=0.02)
    assert pooled.effective == pytest.approx(125)


@pytest.mark.parametrize("blind", [0, 1])
def test_samples_that_are_blind_to_a_mode_are_left_out(blind):
    """A half of the tilt's mass in a mode that one model in 20 trajectories visits, or never.

    The blind set has equal weights, and so the larger effective number.
    """
    x = (torch.arange(1000) % 20 == 0).to(F64)[:, None]
    seen = torch.where(x[:, 0] == 1, math.log(19.0), 0.0)[None]
    sets = [samples_of(x, seen), samples_of(torch.zeros(1000, 1), torch.zeros(1, 1000))]
    assert sets[1].effective > 5 * sets[0].effective
    first, second = sets[blind], sets[1 - blind]
    drawn, _ = first.pooled(second).draw(100, 100, torch.Generator().manual_seed(0))
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.02)


def test_pooled_samples_keep_their_conditions():
    cond = {"c": torch.tensor([0.0, 1.0])}
    other = {"c": torch.tensor([2.0])}
    first = samples_of(torch.tensor([[0.0], [0.0], [1.0], [1.0]]), torch.zeros(2, 2), cond)
    second = samples_of(torch.tensor([[2.0], [2.0]]), 5 + torch.zeros(1, 2), other)
    pooled = first.pooled(second)
    drawn, conditions = pooled.draw(3, 3000, torch.Generator().manual_seed(0))
    assert torch.equal(drawn[0, :, 0], conditions["c"])  # each with its own
    shares = torch.bincount(conditions["c"].long()) / 3000
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), atol=0.03, rtol=0)


def test_pooled_samples_survive_a_checkpoint():
    first = samples_of(torch.zeros(50, 1), torch.zeros(1, 50))
    pooled = first.pooled(samples_of(torch.ones(50, 1), torch.zeros(1, 50)))
    again = WeightedSamples(**pooled.state_dict()).to(torch.device("cpu"))
    draws = [one.draw(5, 40, torch.Generator().manual_seed(3))[0] for one in (pooled, again)]
    assert torch.equal(*draws)
    assert 0 < float(draws[0].mean()) < 1


def test_a_sample_outside_of_the_tilt_does_not_hide_the_variance():
    """A log-weight of -∞ made it NaN, so that flow matching was never found worth it."""
    log_w = 0.5 * torch.randn(1, 2000, generator=torch.Generator().manual_seed(0))
    whole = samples_of(torch.zeros(2000, 2), log_w)
    assert whole.variance == pytest.approx(float(log_w.var(1)))
    log_w[0, :20] = -math.inf
    cut = samples_of(torch.zeros(2000, 2), log_w)
    assert cut.variance == pytest.approx(0.25 - 2 * math.log(0.99), abs=0.02)
    assert is_worthwhile(cut)
    assert not has_rare_weights(cut)
    log_w[0] = 0.0
    log_w[0, :1000] = -math.inf  # the tilt has a half of the model's samples, alike
    half = samples_of(torch.zeros(2000, 2), log_w)
    assert half.variance == pytest.approx(2 * math.log(2.0))
    assert is_worthwhile(half)


@pytest.mark.slow
def test_the_terms_of_a_reward_are_reported_during_the_refinement():
    loss = refinement(PROBLEMS["square"], batch_size=4, refine_samples=64, eval_batch_size=48)
    terms = Reward(lambda x, c: x[:, 0], name="a") + 2 * Reward(lambda x, c: x[:, 1], name="b")
    loss.source.reward = type(loss.source.reward)(terms)
    tilted, _ = PROBLEMS["square"].exact()
    model = Between(PROBLEMS["square"].base, tilted, 0.0)
    _, metrics = loss(model, torch.Generator().manual_seed(0))
    names = {name for name in metrics if name.startswith("reward.")}
    matching = loss.matching(model, torch.Generator().manual_seed(0))[1]
    assert names == {name for name in matching if name.startswith("reward.")}
    assert len(names) == 2
    mean = loss.refining.samples.x[:, 0].mean()
    torch.testing.assert_close(metrics["reward.a"], mean)


@pytest.mark.slow
def test_the_first_process_alone_saves_the_samples(monkeypatch):
    """All have the same: R copies would fill the checkpoint."""
    loss = refinement(PROBLEMS["square"], batch_size=4, refine_samples=64)
    tilted, _ = PROBLEMS["square"].exact()
    loss(Between(PROBLEMS["square"].base, tilted, 0.0), torch.Generator().manual_seed(0))
    first = loss.refining.state_dict()
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    second = loss.refining.state_dict()
    assert second["samples"] is None
    monkeypatch.setattr(distributed, "from_first", lambda function: first["samples"])
    again = refinement(PROBLEMS["square"], batch_size=4, refine_samples=64).refining
    again.load_state_dict(second)
    assert torch.equal(again.samples.x, loss.refining.samples.x)
    assert again.calls == 1


@pytest.mark.slow
def test_the_bar_says_what_is_made(capsys):
    loss = refinement(PROBLEMS["square"], batch_size=4, refine_samples=64)
    loss.refining.progress = True
    tilted, _ = PROBLEMS["square"].exact()
    loss(Between(PROBLEMS["square"].base, tilted, 0.0), torch.Generator().manual_seed(0))
    err = capsys.readouterr().err
    assert "samples" in err
    assert "certificate" not in err


def test_adjoint_matching_goes_on_where_samples_are_no_better():
    """Without a reward log w is constant: every update is one of adjoint matching."""
    base = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    seen = []

    class Watch:
        writes = False

        def on_start(self, trainer):
            pass

        def on_step(self, trainer, iteration, metrics):
            seen.append("adjoint_norm" in metrics)

        def on_end(self, trainer):
            pass

    for refine_loss, expected in (("auto", 6), ("flow_matching", 3)):
        seen.clear()
        config = TiltConfig(
            iterations=6,
            batch_size=16,
            steps=4,
            refine_fraction=0.5,
            refine_loss=refine_loss,
            certificate_samples=0,
            base_samples=64,
        )
        tilt(base, lambda x, c: 0 * x[:, 0], shape=(2,), config=config, callbacks=[Watch()])
        assert sum(seen) == expected


def test_adjoint_matching_goes_on_where_no_mode_is_to_be_decided():
    """A linear reward on a normal base: samples are worth it by their number, targets are even."""
    base = GaussianMixture(
        torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), torch.eye(2, dtype=F64)[None]
    )
    config = TiltConfig(iterations=4, steps=10, refine_fraction=1.0, refine_samples=2048)
    kernel = make_kernel("ancestral", grids.uniform(10))
    loss = TiltLoss(
        base, Reward(lambda x, c: x[:, 0]), kernel, shape=(2,), config=config, dtype=F64
    )
    model = Between(base, base, 0.0)
    _, metrics = loss(model, torch.Generator().manual_seed(0))
    assert is_worthwhile(loss.refining.samples)
    assert "adjoint_norm" in metrics
    assert loss.refining.refining is False


def test_a_mode_that_is_hardly_visited_has_rare_weights():
    gaussian = 0.8 * torch.randn(1, 4000, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert not has_rare_weights(samples_of(torch.zeros(4000, 1), gaussian))
    rare = torch.zeros(1, 4000, dtype=F64)
    rare[0, :20] = math.log(199.0)  # a half of the weight in one of 200
    assert has_rare_weights(samples_of(torch.zeros(4000, 1), rare))


def test_targets_of_the_control_are_even_on_one_mode_and_uneven_on_several():
    linear = torch.tensor([1.0, 0.5], dtype=F64)
    normal = GaussianMixture(
        torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), torch.eye(2, dtype=F64)[None]
    )
    apart = GaussianMixture(
        torch.full((2,), 0.5, dtype=F64),
        torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=F64),
        0.01 * torch.eye(2, dtype=F64).expand(2, 2, 2),
    )
    found = []
    for base in (normal, apart):
        config = TiltConfig(iterations=10, refine_fraction=1.0, batch_size=256)
        grid = grids.uniform(config.steps)
        kernel = make_kernel("ancestral", grid)
        loss = TiltLoss(
            base, Reward(lambda x, c: x @ linear), kernel, shape=(2,), config=config, dtype=F64
        )
        model = Between(base, base, 0.0)
        found.append(loss.refining.unevenness(model, torch.Generator().manual_seed(0)))
    assert found[0] == pytest.approx(1.0)
    assert found[1] > 10 * CALM


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_numbers_are_refused(value):
    loss = refinement(PROBLEMS["square"], refine_samples=64)
    loss.source.reward = type(loss.source.reward)(Reward(lambda x, c: 0 * x[:, 0] + value))
    tilted, _ = PROBLEMS["square"].exact()
    with pytest.raises(ValueError, match="log-weights are NaN or infinite"):
        loss(Between(PROBLEMS["square"].base, tilted, 0.0), torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("dim", "flops", "expected"),
    [
        (2, 1e3, (160, "covariance_matched", 16384)),
        (16, 1e3, (160, "moment_matched", 16384)),
        (784, 1e5, (80, "moment_matched", 16384)),
        (784, 1e6, (20, "moment_matched", 8192)),
        (784, 1e9, (20, "moment_matched", 64)),
    ],
)
def test_sizes_follow_dimension_and_cost(dim, flops, expected):
    config = chosen_sizes(TiltConfig(), dim, flops)
    assert (config.refine_steps, config.refine_kernel, config.refine_samples) == expected
    assert (config.chain_steps, config.chain_kernel) == expected[:2]


def test_a_short_training_draws_fewer_samples():
    config = chosen_sizes(TiltConfig(iterations=20, batch_size=64, steps=10), 2, 1e3)
    assert config.refine_samples == 256  # 20 · 64 · 10 steps in training, 80 in a sample
    assert chosen_sizes(TiltConfig(refine_fraction=0.0), 2, 1e3).refine_samples is None


@pytest.mark.slow
@pytest.mark.parametrize("rare", [False, True])
def test_narrow_modes_get_their_weights(rare):
    """½ N(-1, .01) + ½ N(1, .01) with r = x; and .99 and .01, lifted to one half.

    The regression alone ends at .70 and at .01 instead.
    """
    weights = torch.tensor([0.99, 0.01] if rare else [0.5, 0.5], dtype=F64)
    base = GaussianMixture(
        weights,
        torch.tensor([[-1.0], [1.0]], dtype=F64),
        torch.full((2, 1, 1), 0.01, dtype=F64),
    )
    slope = 0.5 * math.log(99.0) if rare else 1.0
    exact, _ = base.tilt(torch.zeros(1, 1, dtype=F64), torch.tensor([slope], dtype=F64))
    tilted = tilt(
        base.to(torch.float32),
        lambda x, c: slope * x[:, 0],
        shape=(1,),
        config=TiltConfig(
            iterations=300,
            refine_steps=40,
            base_samples=4096,
            certificate_samples=1024,
        ),
    )
    x = tilted.sample(20_000, generator=torch.Generator().manual_seed(0))
    right = float((x > 0).to(F64).mean())
    assert right == pytest.approx(float(exact.weights[1]), abs=0.05 if rare else 0.02)
    assert tilted.kernel.name == "covariance_matched"
    assert tilted.certificate.log_weight_std < (1.0 if rare else 0.6)
