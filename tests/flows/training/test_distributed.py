"""Two processes train as one does; what is lost when one is lost; whole models from shards."""

import copy
import os
import signal
import time
import warnings
from dataclasses import replace

import pytest
import torch
from helpers.processes import agreed, needs_cpu_shards, several
from torch import nn

from flows.training import Trainer, TrainerConfig, distributed
from flows.training import checkpoint as checkpoints
from flows.training.callbacks import Callback
from flows.training.checkpoint import CheckpointError
from flows.training.fit import TrainingDiverged
from flows.training.loggers import CSVLogger
from flows.training.sharding import local

CONFIG = TrainerConfig(
    iterations=12, lr=0.01, ema_decay=0.9, accumulate=2, grad_clip=0.5, checkpoint_every=4
)
B = 8


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 1)).double()


def joined_regression(module, generator):
    """A loss on this process's rows of the batch that one process would draw."""
    x = distributed.own(torch.randn(B, 3, generator=generator, dtype=torch.float64))
    residual = module(x) - x.sin().sum(1, keepdim=True)
    return residual.square().mean(), {"bias": residual.mean(), "float": residual.mean().float()}


def regression(module, generator):
    x = torch.randn(B, 3, generator=generator, dtype=torch.float64)
    return (module(x) - x.sin().sum(1, keepdim=True)).square().mean(), {"first": x[0, 0]}


def same_numbers(trainer):
    """Let all processes draw what one process draws."""
    trainer.generator.manual_seed(trainer.config.seed)
    return trainer


def differences(a, b, place=""):
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [place]
    if isinstance(a, dict | list):
        keys = a if isinstance(a, dict) else range(len(a))
        return [found for key in keys for found in differences(a[key], b[key], f"{place}/{key}")]
    return [] if a == b else [place]


# --- the parts -----------------------------------------------------------------------------------


def parts(rank):
    a = torch.tensor([[1.0, 2.0]]) * (rank + 1)
    mean, other = a.clone(), torch.full((2,), float(rank), dtype=torch.float64)
    distributed.average_([mean, other])
    assert torch.equal(mean, torch.tensor([[1.5, 3.0]]))
    assert torch.equal(other, torch.full((2,), 0.5, dtype=torch.float64))

    joined = distributed.gather(a)
    assert torch.equal(joined, torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
    assert torch.equal(distributed.own(joined), a)

    sent = [torch.tensor(rank), torch.tensor([rank == 0]), torch.ones(2, 2).T * rank]
    distributed.broadcast_(sent)
    assert [t.tolist() for t in sent] == [0, [True], [[0.0, 0.0], [0.0, 0.0]]]

    p, q, unused = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    p.grad = torch.full((2,), 1.0 + rank)
    q.grad = torch.ones(2) if rank else None  # a branch that one process did not take
    distributed.average_gradients([p, q, unused])
    assert p.grad.tolist() == [1.5, 1.5]
    assert q.grad.tolist() == [0.5, 0.5]
    assert unused.grad is None

    assert distributed.from_first(lambda: f"from {rank}") == "from 0"
    with pytest.raises(CheckpointError, match="damaged 0"):
        distributed.from_first(lambda: raising(rank))
    states = distributed.to_first({"rank": rank})
    assert states == ([{"rank": 0}, {"rank": 1}] if rank == 0 else [])
    assert [distributed.share(n) for n in (0, 7, 8)] == [0, 4, 4]
    return [distributed.seed_of(seed) for seed in range(3)] + [distributed.seed_of(0, 2)]


def raising(rank):
    raise CheckpointError(f"damaged {rank}")


@pytest.mark.slow
def test_the_parts():
    seeds = agreed(several(parts))
    assert seeds[0][:3] == [0, 1, 2]
    assert len({*seeds[0], *seeds[1]}) == 8


def test_one_process_changes_nothing():
    x = torch.randn(3, requires_grad=True)
    assert (distributed.size(), distributed.rank(), distributed.seed_of(5)) == (1, 0, 5)
    assert distributed.gather(x) is x
    assert distributed.from_first(lambda: x) is x
    assert distributed.to_first(x) == [x]


def test_small_buckets_give_the_same(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET", 40)
    tensors = [
        torch.zeros(4),
        torch.zeros(4),
        torch.zeros(4),
        torch.zeros(50),
        torch.zeros(1).int(),
    ]
    sizes = [[t.numel() for t in bucket] for bucket in distributed._buckets(tensors)]
    assert sizes == [[4, 4], [4], [50], [1]]


# --- training ------------------------------------------------------------------------------------


def train_jointly(rank, wrapped):
    module = network(seed=rank)  # those of the first process count
    if wrapped:
        module = nn.parallel.DistributedDataParallel(module)
    trainer = same_numbers(Trainer(module, joined_regression, CONFIG))
    metrics = [trainer.step() for _ in range(5)]
    return trainer.module.state_dict(), trainer.ema.state_dict(), metrics


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_with_the_joined_batch(wrapped):
    alone = train_jointly(0, False)
    for found in agreed(several(train_jointly, wrapped)):
        torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-12)


class Killer(Callback):
    """Kills its process once that has come to an iteration."""

    def __init__(self, iteration):
        self.iteration = iteration

    def on_step(self, trainer, iteration, metrics):
        if iteration == self.iteration:
            os.kill(os.getpid(), signal.SIGKILL)


def train(rank, folder, killed_at=None, loss=regression, config=CONFIG):
    callbacks = [CSVLogger(folder / "log.csv", every=1)]
    if killed_at and rank == 1:
        callbacks.append(Killer(killed_at))
    path = folder / "c.pt" if rank == 0 else folder / f"nobody writes this {rank}" / "c.pt"
    trainer = Trainer(network(), loss, config, callbacks=callbacks, checkpoint=path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ema = trainer.fit(resume=True)
    said = [str(w.message) for w in caught if "saved by" in str(w.message)]
    return ema.state_dict(), trainer.generator.get_state(), said


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_resume_is_exact(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = agreed(several(train, whole))
    assert differences(undisturbed[0][0], undisturbed[1][0]) == []  # equal weights
    assert not torch.equal(undisturbed[0][1], undisturbed[1][1])  # other numbers
    began = time.monotonic()
    first, second = several(train, killed, 7)
    assert time.monotonic() - began < 30
    assert second is None
    assert isinstance(first, distributed.ProcessLost)
    assert "process 0 of 2 lost the others" in str(first)
    assert "was killed" in str(first)
    assert "resume=True" in str(first)
    assert "\n" not in str(first)

    assert checkpoints.load(killed / "c.pt")["iteration"] == 4
    resumed = agreed(several(train, killed))
    for (weights, generator, said), expected in zip(resumed, undisturbed, strict=True):
        assert said == []
        assert differences([weights, generator], list(expected[:2])) == []
    files = [checkpoints.load(folder / "c.pt") for folder in (whole, killed)]
    assert len(files[0]["others"]) == 1
    assert differences(*files) == []
    assert (whole / "log.csv").read_bytes() == (killed / "log.csv").read_bytes()
    assert not any("nobody" in path.name for path in [*whole.iterdir(), *killed.iterdir()])


def late(rank):
    if rank == 1:
        time.sleep(6)
    distributed.average_([torch.zeros(1)])


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_job():
    began = time.monotonic()
    first, second = several(late, patience=2)
    assert time.monotonic() - began < 20
    assert isinstance(first, distributed.ProcessLost)
    assert isinstance(second, distributed.ProcessLost)
    assert "lost the others in averaging gradients or metrics" in str(first)


@pytest.mark.slow
def test_metrics_are_means_over_the_processes(tmp_path):
    def first(seed):
        x = torch.randn(B, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return float(x[0, 0])

    seeds = agreed(several(log, tmp_path))
    rows = (tmp_path / "log.csv").read_text().splitlines()
    found = dict(zip(rows[0].split(","), rows[1].split(","), strict=True))
    assert float(found["first"]) == pytest.approx(sum(map(first, seeds)) / 2, rel=1e-7)


def log(rank, folder):
    train(rank, folder, config=replace(CONFIG, iterations=1, accumulate=1))
    return distributed.seed_of(CONFIG.seed)


@pytest.mark.slow
def test_a_checkpoint_loads_in_another_number_of_processes(tmp_path):
    half = replace(CONFIG, iterations=8)
    agreed(several(on, tmp_path, half))
    saved = checkpoints.load(tmp_path / "c.pt")
    trainer = Trainer(network(1), regression, CONFIG, checkpoint=tmp_path / "c.pt")
    with pytest.warns(UserWarning, match="saved by 2 processes, not 1: random"):
        trainer.fit(resume=True)
    assert trainer.iteration == 12
    alone = checkpoints.load(tmp_path / "c.pt")
    assert (saved["iteration"], alone["iteration"], alone["others"]) == (8, 12, [])
    assert not torch.equal(alone["generator"], saved["generator"])

    fresh = Trainer(network(1), regression, CONFIG)
    with pytest.warns(UserWarning, match="new streams"):
        fresh.load_state_dict(saved)
    begun = torch.Generator().manual_seed(CONFIG.seed)  # whose numbers have been used
    assert not torch.equal(fresh.generator.get_state(), begun.get_state())
    for part in ("module", "ema", "optimizer"):
        assert differences(saved[part], fresh.state_dict()[part]) == []

    results = agreed(several(on, tmp_path, replace(CONFIG, iterations=16)))
    assert ["saved by 1 processes" in "".join(said) for *_, said in results] == [True, False]
    assert not torch.equal(results[0][1], results[1][1])


def on(rank, folder, config):
    return train(rank, folder, config=config)


def sick(module, generator):
    loss, metrics = regression(module, generator)
    sick.calls += 1
    return loss * (float("nan") if sick.calls == 11 and distributed.rank() == 1 else 1), metrics


sick.calls = 0


def test_divergence_in_one_stops_all_with_the_same_message(tmp_path):
    results = several(train, tmp_path, None, sick)
    assert [type(result) for result in results] == [TrainingDiverged] * 2
    said = [str(result).split(";")[0] for result in results]
    assert said == ["training stopped: loss is nan in iteration 6"] * 2
    assert "iteration 4" in str(results[0])
    assert checkpoints.load(tmp_path / "c.pt")["iteration"] == 4


def test_what_the_first_process_cannot_read_stops_all(tmp_path):
    (tmp_path / "c.pt").write_bytes(b"not a checkpoint")
    results = several(train, tmp_path)
    assert [type(result) for result in results] == [CheckpointError] * 2
    assert str(results[0]) == str(results[1])


# --- shards --------------------------------------------------------------------------------------


def train_sharded(rank, folder, iterations):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = network()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(module[0], mesh=mesh)
    fully_shard(module, mesh=mesh)
    with torch.no_grad():
        module(torch.zeros(1, 3, dtype=torch.float64))  # leaves the parameters of the root whole
    config = replace(CONFIG, iterations=iterations)
    trainer = Trainer(module, joined_regression, config, checkpoint=folder / "c.pt")
    same_numbers(trainer).fit(resume=True)
    kept = sum(local(p).numel() for p in module.parameters())
    ema = distributed.whole(trainer.ema.state_dict())
    return ema, kept


@needs_cpu_shards
@pytest.mark.slow
def test_a_sharded_module_trains_as_a_whole_one_and_saves_the_same_file(tmp_path):
    shards, alone = tmp_path / "shards", tmp_path / "alone"
    whole = Trainer(network(), joined_regression, CONFIG, checkpoint=alone / "c.pt")
    ema = copy.deepcopy(whole.fit().state_dict())
    results = agreed(several(train_sharded, shards, 12))
    torch.testing.assert_close(results[0][0], ema, rtol=1e-6, atol=1e-12)
    parameters = sum(p.numel() for p in network().parameters())
    assert max(kept for _, kept in results) < parameters
    assert sum(kept for _, kept in results) == parameters

    # One process goes on from the file of the shards ...
    files = [checkpoints.load(folder / "c.pt") for folder in (shards, alone)]
    for part in ("module", "ema", "optimizer"):
        torch.testing.assert_close(files[0][part], files[1][part], rtol=1e-6, atol=1e-12)
    with pytest.warns(UserWarning, match="saved by 2 processes"):
        Trainer(network(1), regression, CONFIG, checkpoint=shards / "c.pt").fit(resume=True)
    # ... and shards from the file of one: to the end of it, and beyond.
    results = agreed(several(train_sharded, alone, 12))
    torch.testing.assert_close(results[0][0], ema, rtol=0, atol=0)
    agreed(several(train_sharded, alone, 14))
    assert checkpoints.load(alone / "c.pt")["iteration"] == 14
