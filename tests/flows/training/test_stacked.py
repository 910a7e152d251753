"""Trainings at once are what each of them is alone."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from flows.training.callbacks import Callback
from flows.training.config import TrainerConfig
from flows.training.divergence import TrainingDiverged
from flows.training.loss import SplitLoss
from flows.training.stacked import StackedTrainers, train_stacked
from flows.training.trainer import Trainer

CONFIG = TrainerConfig(
    iterations=12,
    lr=0.02,
    ema_decay=0.9,
    grad_clip=0.5,
    weight_decay=0.1,
    accumulate=2,
    checkpoint_every=5,
)
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


class Network(nn.Module):
    """A perceptron in float64 with a frozen parameter, a buffer, and one that no loss reaches."""

    def __init__(self, seed, width=8):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def parameter(*shape):
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

        self.first, self.second, self.unused = parameter(3, width), parameter(width), parameter(2)
        self.scale = nn.Parameter(torch.tensor(1.0 + seed), requires_grad=False)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        return (x @ self.first).tanh() @ self.second * self.scale


class Regression(SplitLoss):
    """A split loss with state, random numbers, a buffer it changes, and slow weights."""

    def __init__(self, slow=0.5):
        self.count, self.slow = 0, slow

    def host_step(self, module, generator):
        self.count += 1
        return {"count": torch.tensor(float(self.count))}

    def sample(self, module, generator):
        x = torch.randn(16, 3, generator=generator, dtype=torch.float64)
        return {"x": x}, torch.tensor(float(self.count))

    def evaluate(self, module, inputs):
        x, count = inputs[0]["x"], inputs[1]
        with torch.no_grad():
            module.seen.add_(x.mean(0))
        error = (module(x) - count.sqrt() * x.prod(1)).square().mean()
        return error, {"largest": x.amax(), "seen": module.seen.sum()}

    def before_update(self, module):
        module.scale.mul_(0.9).add_(self.slow * module.second.detach().mean(), alpha=0.1)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Rows(Callback):
    """What callbacks are told, as numbers, and that they hear of the end."""

    def __init__(self):
        self.rows, self.ended = [], 0

    def on_step(self, trainer, iteration, metrics):
        self.rows.append({"iteration": iteration, **{k: float(v) for k, v in metrics.items()}})

    def on_end(self, trainer):
        self.ended += 1


class Poison(Callback):
    """Spoils the weights after an iteration."""

    def __init__(self, iteration):
        self.iteration = iteration

    def on_step(self, trainer, iteration, metrics):
        if iteration == self.iteration:
            trainer.module.first.data.fill_(torch.nan)


def make(seed, config=CONFIG, callbacks=(), **options):
    rows = Rows()
    config = replace(config, seed=seed)
    trainer = Trainer(Network(seed), Regression(), config, callbacks=[rows, *callbacks], **options)
    return trainer, rows


def close(a, b):
    """Near equality of nested data."""
    if isinstance(a, torch.Tensor):
        return torch.allclose(a.double(), b.double(), **CLOSE)
    if isinstance(a, dict):
        return [*a] == [*b] and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, rel=1e-9, abs=1e-11) if isinstance(a, float) else a == b


def test_each_is_what_it_is_alone(tmp_path):
    """Also where one has more iterations than another; the last goes on alone."""
    configs = [CONFIG, replace(CONFIG, iterations=7), replace(CONFIG, lr=0.05, iterations=15)]
    alone = [make(seed, config) for seed, config in enumerate(configs)]
    paths = [tmp_path / f"{seed}.pt" for seed in range(3)]
    each = [make(s, c, checkpoint=paths[s]) for s, c in enumerate(configs)]
    for trainer, _ in alone:
        trainer.fit()
    assert train_stacked([trainer.training() for trainer, _ in each]) == [None] * 3
    for (expected, expected_rows), (found, rows), path in zip(alone, each, paths, strict=True):
        assert close(expected.state_dict(), found.state_dict())
        assert close(expected_rows.rows, rows.rows)
        assert rows.ended == 1
        saved = torch.load(path, weights_only=True)
        assert close(found.state_dict(), {k: saved[k] for k in found.state_dict()})
        for tensor in (*found.module.parameters(), *found.module.buffers()):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes  # its own again


def test_a_single_one_is_trained_as_alone_bit_by_bit():
    (expected, _), (found, _) = make(3), make(3)
    expected.fit()
    train_stacked([found.training()])
    for a, b in zip(expected.module.parameters(), found.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_runs_that_were_stopped_anywhere_go_on_together(tmp_path):
    for seed, stop in enumerate((3, 5, 11)):
        short = replace(CONFIG, iterations=stop, lr_schedule="constant")
        make(seed, short, checkpoint=tmp_path / f"{seed}.pt")[0].fit()
    whole = replace(CONFIG, lr_schedule="constant")
    each = [make(seed, whole, checkpoint=tmp_path / f"{seed}.pt")[0] for seed in range(3)]
    train_stacked([trainer.training(resume=True) for trainer in each])
    for seed, found in enumerate(each):
        expected, _ = make(seed, whole)
        expected.fit()
        assert close(expected.state_dict(), found.state_dict())


def test_one_that_fails_leaves_the_others():
    class Broken(Regression):
        def host_step(self, module, generator):
            if self.count == 8:
                raise KeyError("no more data")
            return super().host_step(module, generator)

    seen = []

    def watched(run):
        try:
            return (yield from run)
        except Exception as error:
            seen.append(error)
            raise

    each = [make(0, callbacks=[Poison(4)]), make(1), make(2)]
    each[1][0].loss = Broken()
    runs = [watched(trainer.training()) for trainer, _ in each]
    diverged, broken, none = train_stacked(runs)
    assert seen == [broken, diverged]  # as if each had failed alone, where it stood
    assert isinstance(diverged, TrainingDiverged)
    assert "nan in iteration 5" in str(diverged)
    assert isinstance(broken, KeyError)
    assert none is None
    assert [rows.ended for _, rows in each] == [1, 1, 1]
    assert [rows.rows[-1]["iteration"] for _, rows in each] == [4, 4, 12]
    expected, _ = make(2)
    expected.fit()
    assert close(expected.state_dict(), each[2][0].state_dict())


def test_what_all_have_in_common_fails_for_all():
    class Vector(Regression):
        def evaluate(self, module, inputs):
            return module.second, {}

    each = [make(0), make(1)]
    for trainer, _ in each:
        trainer.loss = Vector()
    with pytest.raises(ValueError, match=r"loss must be a scalar, got shape \(8,\)"):
        train_stacked([trainer.training() for trainer, _ in each])
    assert [rows.ended for _, rows in each] == [1, 1]


def test_one_update_of_all():
    alone, each = [make(seed)[0] for seed in range(2)], [make(seed)[0] for seed in range(2)]
    together = StackedTrainers(each)
    for _ in range(3):
        expected, found = [trainer.step() for trainer in alone], together.step()
        for a, b in zip(expected, found, strict=True):
            assert close({k: v.detach() for k, v in a.items()}, b)
    states = copy.deepcopy([trainer.state_dict() for trainer in each])
    assert close([trainer.state_dict() for trainer in alone], states)


def test_what_cannot_be_trained_together_is_refused():
    trainer, _ = make(0)
    other = Trainer(Network(1, width=9), Regression(), CONFIG)
    with pytest.raises(ValueError, match="modules must have the same parameters and buffers"):
        StackedTrainers([trainer, other])
    other = Trainer(Network(1), Regression(), replace(CONFIG, accumulate=3))
    with pytest.raises(ValueError, match="accumulate and autocast must be the same in all"):
        StackedTrainers([trainer, other])
    other = Trainer(Network(1), lambda m, g: (m(torch.ones(2, 3)).sum(), {}), CONFIG)
    with pytest.raises(TypeError, match=r"loss must be a flows\.training\.SplitLoss"):
        StackedTrainers([trainer, other])
