"""Updates launched in blocks are the updates made one by one.

No GPU: the block that a CUDA graph would replay is called again instead, so what is tested is that
it holds all that an update does on the device, and nothing of what is the host's.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from flows.training.callbacks import Callback
from flows.training.config import TrainerConfig
from flows.training.gradient_graph import GradientGraph
from flows.training.loss import Loss, SplitLoss
from flows.training.stacked import train_stacked
from flows.training.trainer import Trainer
from flows.training.update_graph import UpdateGraph

CONFIG = TrainerConfig(
    iterations=14, lr=0.02, lr_schedule="constant", ema_decay=0, checkpoint_every=4
)
CLOSE = {"rtol": 1e-6, "atol": 1e-7}


class Network(nn.Module):
    """A line whose target network follows it."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, generator=generator))
        self.register_buffer("target", self.weight.detach().clone())

    def forward(self, x):
        return x @ self.weight


class Regression(SplitLoss):
    """A loss that counts on the host, and for which the last updates are the host's."""

    def __init__(self, free):
        self.count, self.free = 0, free

    def host_step(self, module, generator):
        self.count += 1
        return {"count": torch.tensor(float(self.count))}

    def sample(self, module, generator):
        return (torch.randn(8, 3, generator=generator),)

    def updates_without_host(self):
        return self.free - self.count

    def evaluate(self, module, inputs):
        error = (module(inputs[0]) - inputs[0] @ module.target - 1).square().mean()
        return error, {"largest": inputs[0].amax()}

    def before_update(self, module):
        module.target.lerp_(module.weight.detach(), 0.1)

    def state_dict(self):
        return {"count": self.count}


class Rows(Callback):
    """What callbacks are told."""

    def __init__(self):
        self.rows = []

    def on_step(self, trainer, iteration, metrics):
        self.rows.append([iteration, *[float(v) for _, v in sorted(metrics.items())]])


class Replays:
    """Stands for the graph: the block itself.

    As a graph does, it leaves the gradients of ``module`` where they were recorded, and only there.
    """

    def __init__(self, module=None):
        self.launches = self.captures = 0
        self.module = module

    def __call__(self, block, generators):
        self.captures += 1

        def launch():
            self.launches += 1
            result = block()
            if self.module is not None:
                self.module.zero_grad(set_to_none=True)
            return result

        return launch


def runs(seeds, path, free=14, config=CONFIG):
    """Trainers, the rows that their callbacks see, and their generators of steps."""
    rows = [Rows() for _ in seeds]
    trainers = [
        Trainer(Network(s), Regression(free), config, callbacks=[r], checkpoint=path / f"{s}.pt")
        for s, r in zip(seeds, rows, strict=True)
    ]
    for seed, trainer in zip(seeds, trainers, strict=True):
        trainer.generator.manual_seed(seed)
    return trainers, rows


@pytest.mark.parametrize("seeds", [(3,), (3, 4, 5)], ids=["one", "three"])
@pytest.mark.parametrize("free", [14, 9], ids=["all", "nine"])
def test_launched_updates_are_those_made_one_by_one(seeds, free, tmp_path):
    paths = [tmp_path / "plain", tmp_path / "ahead"]
    (plain, expected), (ahead, found) = [runs(seeds, path, free) for path in paths]
    for trainer in plain:
        trainer.fit()
    replays = Replays()
    train_stacked([t.training() for t in ahead], update_graph=UpdateGraph(4, capture=replays))
    assert (replays.captures, replays.launches) == (1, 2 if free == 14 else 1)
    for a, b, rows, others in zip(plain, ahead, expected, found, strict=True):
        torch.testing.assert_close(rows.rows, others.rows, **CLOSE)
        torch.testing.assert_close(a.module.state_dict(), b.module.state_dict(), **CLOSE)
        assert a.loss.count == b.loss.count == a.iteration == b.iteration == 14
        assert torch.equal(a.generator.get_state(), b.generator.get_state())
    for seed in seeds:
        saved = [torch.load(path / f"{seed}.pt", weights_only=True) for path in paths]
        torch.testing.assert_close(saved[0]["module"], saved[1]["module"], **CLOSE)
        torch.testing.assert_close(saved[0]["optimizer"], saved[1]["optimizer"], **CLOSE)


def test_a_checkpoint_within_launches_is_that_of_its_iteration(tmp_path):
    saved = []
    for name, graph in (("plain", None), ("ahead", UpdateGraph(2, capture=Replays()))):
        trainers, _ = runs((3,), tmp_path / name)
        steps = trainers[0].training()

        def until_eight(steps=steps, trainer=trainers[0]):
            for each in steps:
                if trainer.iteration == 8:
                    return
                yield each

        train_stacked([until_eight()], update_graph=graph)
        saved.append(torch.load(tmp_path / name / "3.pt", weights_only=True))
    assert saved[0]["iteration"] == saved[1]["iteration"] == 8
    torch.testing.assert_close(saved[0]["module"], saved[1]["module"], **CLOSE)


def test_nothing_is_launched_between_multiples(tmp_path):
    """Else a block would go past a checkpoint, or past what callbacks are to see."""
    (trainer,), _ = runs((3,), tmp_path)
    graph = UpdateGraph(4, capture=Replays())
    made = []
    for _ in range(8):
        graph((trainer,), None)
        made.append(len(trainer.unreported))
        trainer.unreported.clear()
        trainer.iteration += 1
    assert made == [4, 0, 0, 0, 4, 0, 0, 0]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lr_schedule": "cosine"}, "lr_schedule must be 'constant'"),
        ({"ema_decay": 0.9}, "ema_decay must be 0"),
        ({"accumulate": 2}, "accumulate must be 1"),
        ({"checkpoint_every": 6}, "checkpoint_every must be a multiple of 4"),
    ],
)
def test_what_cannot_be_recorded_is_refused(change, match, tmp_path):
    (trainer,), _ = runs((3,), tmp_path, config=replace(CONFIG, **change))
    with pytest.raises(ValueError, match=match):
        UpdateGraph(4, capture=Replays())((trainer,), None)


def test_other_devices_and_losses_are_refused(tmp_path):
    (trainer,), _ = runs((3,), tmp_path)
    with pytest.raises(ValueError, match="CUDA graph on cuda, got device cpu"):
        UpdateGraph(4)((trainer,), None)
    plain = Trainer(Network(3), lambda module, generator: None, CONFIG)
    with pytest.raises(TypeError, match=r"loss must be a flows\.training\.SplitLoss"):
        UpdateGraph(4, capture=Replays())((plain,), None)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        UpdateGraph(0)


class Repeated(Loss):
    """A loss that enters another phase, of another size, after some calls."""

    def __init__(self, until):
        self.calls, self.until = 0, until

    @property
    def phase(self):
        return self.calls < self.until

    def __call__(self, module, generator):
        x = torch.randn(8 if self.phase else 4, 3, generator=generator)
        self.calls += 1
        return (module(x) - x.sum(1)).square().mean(), {"largest": x.amax()}

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_recorded_gradient_is_that_of_an_update(accumulate, tmp_path):
    """With a schedule, an average, losses that add up; in two phases."""
    config = TrainerConfig(iterations=12, lr=0.02, accumulate=accumulate, checkpoint_every=5)
    found = []
    for name in ("plain", "recorded"):
        rows = Rows()
        loss = Repeated(7 * accumulate)
        trainer = Trainer(
            Network(0), loss, config, callbacks=[rows], checkpoint=tmp_path / f"{name}.pt"
        )
        replays = Replays(trainer.module)
        backward = GradientGraph(trainer, capture=replays) if name == "recorded" else None
        trainer.fit(backward=backward)
        found.append((trainer.module.weight, trainer.ema.weight, rows.rows, loss.calls))
    assert replays.captures == 2, "one of each phase"
    assert replays.launches == 12 - 2 * GradientGraph.WARM
    plain, recorded = found
    assert torch.equal(plain[0], recorded[0])
    assert torch.equal(plain[1], recorded[1])
    assert plain[2:] == recorded[2:]


def test_what_cannot_be_recorded_is_said():
    trainer = Trainer(Network(0), Repeated(9), CONFIG)
    with pytest.raises(ValueError, match="CUDA graph on cuda, got device cpu"):
        GradientGraph(trainer)

    def capture(block, generators):
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(
        ValueError, match=r"reward, base or sampler.*cuda_graphs=False.*not permitted"
    ):
        trainer.fit(backward=GradientGraph(trainer, capture=capture))


def test_a_recorded_training_resumes(tmp_path):
    """Stopped in the middle of what is recorded, it goes on as if it had not been."""
    config = TrainerConfig(iterations=12, lr=0.02, checkpoint_every=5)
    trainers = {
        name: Trainer(Network(0), Repeated(20), config, checkpoint=tmp_path / f"{name}.pt")
        for name in ("plain", "stopped", "again")
    }
    trainers["plain"].fit()
    stopped = trainers["stopped"]
    steps = stopped.training()
    backward = GradientGraph(stopped, capture=Replays())
    for _ in range(8):  # the checkpoint is that of iteration 5
        next(steps)
        backward()
    steps.close()
    (tmp_path / "stopped.pt").rename(tmp_path / "again.pt")
    again = trainers["again"]
    again.fit(resume=True, backward=GradientGraph(again, capture=Replays()))
    assert again.loss.calls == 12
    assert torch.equal(again.module.weight, trainers["plain"].module.weight)
    assert torch.equal(again.ema.weight, trainers["plain"].ema.weight)


def test_a_gradient_is_recorded_of_a_loss_with_phases_only():
    trainer = Trainer(Network(0), Regression(9), CONFIG)
    with pytest.raises(TypeError, match="loss must say in its property phase"):
        GradientGraph(trainer, capture=Replays())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("updates", [1, 4])
@pytest.mark.parametrize("seeds", [(3,), (3, 4, 5)], ids=["one", "three"])
def test_a_graph_on_a_gpu_makes_the_updates_of_the_host(updates, seeds, tmp_path):
    found = []
    for graph in (None, UpdateGraph(updates)):
        trainers = []
        for seed in seeds:
            trainer = Trainer(Network(seed).cuda(), OnDevice(14), CONFIG)
            trainer.generator.manual_seed(seed)
            trainers.append(trainer)
        train_stacked([t.training() for t in trainers], update_graph=graph)
        found.append([trainer.module.weight.detach() for trainer in trainers])
    for plain, launched in zip(*found, strict=True):
        torch.testing.assert_close(launched, plain, rtol=1e-5, atol=1e-6)


class OnDevice(Regression):
    """`Regression` with its inputs drawn where the generator is."""

    def sample(self, module, generator):
        return (torch.randn(8, 3, generator=generator, device=generator.device),)
