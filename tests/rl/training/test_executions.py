"""Training compiled, and updates launched in blocks, give the same runs."""

import pytest
import torch
from helpers.killed_rl import configuration
from helpers.same_run import BOTH, assert_same_run, equal, fit
from helpers.tiny import options

from applications.rl import AgentLoss, Batch, Phases, Replay, make_agent
from applications.rl.training import train as training
from flows.training import checkpoint as checkpoints
from flows.training.config import TrainerConfig
from flows.training.stacked import StackedTrainers
from flows.training.trainer import Trainer
from flows.training.update_graph import UpdateGraph

torch.set_num_threads(1)


class Replays:
    """Stands for a CUDA graph: the block itself."""

    launches = 0

    def __call__(self, block, generators):
        def launch():
            self.launches += 1
            return block()

        return launch


@pytest.mark.parametrize("seeds", [(1,), (0, 1)], ids=["one", "two"])
@pytest.mark.slow
def test_updates_launched_in_blocks(seeds, tmp_path, monkeypatch):
    phases = {**BOTH, "offline_steps": 9}
    fit(tmp_path / "plain", phases, seeds=seeds, stacked=len(seeds))
    replays = Replays()
    graph = UpdateGraph(2, capture=replays)
    monkeypatch.setattr(training, "_update_graph", lambda config: graph)
    fit(tmp_path / "ahead", phases, seeds=seeds, stacked=len(seeds))
    assert replays.launches == 3  # nine updates: two to warm up, the last by itself
    for seed in seeds:
        assert_same_run(*[tmp_path / name / f"seed{seed}" for name in ("ahead", "plain")])


@pytest.mark.slow
def test_training_in_bfloat16(tmp_path):
    """Other products, nearly the same run: weights stay in float32, near the plain run's."""
    weights = {}
    for precision in ("float32", "bfloat16"):
        fit(tmp_path / precision, precision=precision)
        saved = checkpoints.load(tmp_path / precision / "seed0" / "checkpoint.pt")["module"]
        weights[precision] = {name: w for name, w in saved.items() if w.is_floating_point()}
    moved = {n: (weights["bfloat16"][n] - w).abs().max() for n, w in weights["float32"].items()}
    assert all(w.dtype == torch.float32 for w in weights["bfloat16"].values())
    assert 0 < max(moved.values()) < 0.05


def test_what_needs_a_gpu_is_refused_without(tmp_path):
    with pytest.raises(
        ValueError, match="cuda_graphs must be 0 on device cpu, got 2: it needs cuda"
    ):
        fit(tmp_path, cuda_graphs=2)
    with pytest.raises(ValueError, match="precision must be float32 or bfloat16 on device cpu"):
        fit(tmp_path, precision="tf32")
    assert not any(tmp_path.iterdir())
    with pytest.raises(
        ValueError, match="checkpoint_every must be a multiple of cuda_graphs=3, got 4"
    ):
        configuration(
            tmp_path, {"offline_steps": 9}, eval_every=0, checkpoint_every=4, cuda_graphs=3
        )


class Drawn(AgentLoss):
    """The loss at random batches."""

    def sample(self, module, generator):
        batch = Batch(*(torch.randn(shape, generator=generator) for shape in SHAPES))
        return batch, module.draw_noise(B, generator)


B, SHAPES = 6, [(6, 4), (6, 5, 2), (6,), (6,), (6,), (6, 4)]


def steps(name, members, compiled):
    """Metrics and weights of trainers after two steps."""
    trainers = []
    for seed in range(members):
        agent = make_agent(options(name, flow_steps=2), 4, 2, seed=seed)
        loss = Drawn(Replay(0, 4, 2), Phases(9), batch_size=B, compiled=compiled)
        config = TrainerConfig(lr_schedule="constant", ema_decay=0, seed=seed)
        trainers.append(Trainer(agent, loss, config))
    step = StackedTrainers(trainers).step if members > 1 else lambda: [trainers[0].step()]
    metrics = [step() for _ in range(2)]
    return metrics, [trainer.module.state_dict() for trainer in trainers]


@pytest.mark.parametrize(("name", "members"), [("qam", 1), ("bc", 2), ("trqam", 2), ("sqam", 1)])
@pytest.mark.slow
def test_the_loss_is_compiled_where_asked_for(name, members, monkeypatch):
    compiled, torch_compile = [], torch.compile

    def compile_(function, **kwargs):
        compiled.append(torch_compile(function, backend="aot_eager", fullgraph=True, **kwargs))
        return compiled[-1]

    monkeypatch.setattr(torch, "compile", compile_)
    expected = steps(name, members, compiled=False)
    assert not compiled
    found = steps(name, members, compiled=True)
    assert compiled
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["trqam", "sqam"])
@pytest.mark.slow
def test_the_multiplier_follows_each_update(name):
    """The state is that which the last update reports, alone and with seeds stacked."""
    found = {}
    for members in (1, 2):
        metrics, states = steps(name, members, compiled=False)
        for own, state in zip(metrics[-1], states, strict=True):
            assert state["trust_region.multiplier"] == own["actor/multiplier"] < 1
            assert state["trust_region.kl_average"] == own["actor/path_kl_average"]
        found[members] = [each[0]["actor/multiplier"] for each in metrics]
    assert found[1][0] != found[1][1]
    torch.testing.assert_close(*found.values())


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_multiplier(tmp_path):
    run = {"agent": "trqam", "options": options("trqam", horizon=3), "eval_every": 0}
    fit(tmp_path / "whole", {"offline_steps": 8}, **run)
    for steps_so_far in (4, 8):
        fit(tmp_path / "resumed", {"offline_steps": steps_so_far}, **run)
    files = [tmp_path / name / "seed0" / "checkpoint.pt" for name in ("whole", "resumed")]
    whole, resumed = (checkpoints.load(file)["module"] for file in files)
    assert equal(whole, resumed)
    assert resumed["trust_region.multiplier"] < 1
