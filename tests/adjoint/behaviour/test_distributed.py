"""Two processes tilt as one does: gradients, kernel, certificate, checkpoints; and by torchrun."""

import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.processes import agreed, needs_cpu_shards, several
from helpers.tilt_problems import PROBLEMS
from helpers.torchrun_tilt import CONFIG, train

from adjoint.chain.kernels import make_kernel
from adjoint.config import TiltConfig
from adjoint.models.lora import lora
from adjoint.rewards.reward import as_reward
from adjoint.tilt import tilt
from adjoint.tilt_loss import TiltLoss
from flows.field import frozen
from flows.networks.mlp import MLPVelocity
from flows.training import Trainer, distributed
from flows.training import checkpoint as checkpoints
from flows.training.callbacks import Callback

PROBLEM = PROBLEMS["three"]
STEPS = 4
OPTIONS = {
    "plain": {},
    "micro_batches": {"micro_batch": 3, "reward_batch": 3, "accumulate": 2},
    "weighted": {
        "importance": True,
        "min_ess": 0.0,
        "clip": 3.0,
        "early_fraction": 0.5,
        "late_fraction": 0.25,
    },
    "refined": {"refine_fraction": 1.0, "refine_loss": "log_variance"},
}


def network(seed=0):
    torch.manual_seed(seed)
    return MLPVelocity(2, hidden=(8,)).double()


def conditional(x, cond):
    return PROBLEM.reward(x) + (x * cond["c"]).sum(1)


class Guest(torch.nn.Module):
    """A field that sees its condition."""

    def __init__(self):
        super().__init__()
        self.field = network()

    def forward(self, x, t, cond=None):
        return self.field(x, t) + (0 if cond is None else cond["c"])


def gradients(rank, options, with_cond):
    """Of one update, with the numbers that one process would draw for the whole batch."""
    plain = torch.randn

    def drawn(shape, **rest):  # states (n, d), noises (K, n, d)
        shape, dim = list(shape), len(shape) - 2
        shape[dim] *= distributed.size()
        return plain(shape, **rest).chunk(distributed.size(), dim)[rank]

    def conditions(n, generator):
        return {"c": drawn((n, 2), generator=generator, dtype=torch.float64)}

    torch.randn = drawn
    try:
        base, model = Guest(), Guest()
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.data += 0.2 * plain(parameter.shape, dtype=torch.float64)
        mmse = torch.linspace(1.0, 0.1, STEPS, dtype=torch.float64)
        grid = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
        loss = TiltLoss(
            frozen(base),
            as_reward(conditional if with_cond else PROBLEM.reward),
            make_kernel("moment_matched", grid, mmse=mmse),
            shape=(2,),
            config=(config := TiltConfig(steps=STEPS, batch_size=32, grad_clip=0.0, **options)),
            cond_sampler=conditions if with_cond else None,
            dtype=torch.float64,
        )
        trainer = Trainer(model, loss, config)
        trainer.generator.manual_seed(0)
        metrics = trainer.step()
    finally:
        torch.randn = plain
    metrics.pop("term_quantile", None)  # a mean of quantiles
    return [p.grad for p in trainer.module.parameters()], metrics


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("with_cond", [False, True])
@pytest.mark.slow
def test_two_processes_have_the_gradient_of_the_joined_batch(name, with_cond):
    expected, metrics = gradients(0, OPTIONS[name], with_cond)
    assert min(float(g.norm()) for g in expected) > 1e-3
    for found, seen in agreed(several(gradients, OPTIONS[name], with_cond)):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(seen, metrics, rtol=1e-6, atol=1e-9)


class Stop(Callback):
    def on_step(self, trainer, iteration, metrics):
        if iteration == 5:
            raise KeyError("stop")


def whole_tilt(rank, folder):
    tilted = train(folder)
    saved = checkpoints.load(folder / "c.pt")
    return tilted.kernel, tilted.certificate, tilted.field.state_dict(), tilted, saved


@pytest.mark.slow
def test_a_tilt_of_two_processes(tmp_path):
    (kernel, certificate, weights, tilted, saved), other = agreed(several(whole_tilt, tmp_path))
    assert torch.equal(kernel.std, other[0].std)
    assert torch.equal(certificate.log_weights, other[1].log_weights)
    torch.testing.assert_close(weights, other[2], rtol=0, atol=0)
    n = CONFIG.certificate_samples
    assert certificate.samples.shape == (n, 2)
    assert not torch.isclose(certificate.samples[: n // 2], certificate.samples[n // 2 :]).any()
    exact = float(PROBLEM.exact()[1])
    for before in (tilted.certificate_base, certificate):
        assert abs(before.log_z - exact) < 5 * before.log_z_stderr + 0.05
    assert abs(tilted.log_z_ode - exact) < 5 * tilted.log_z_ode_stderr + 0.05

    # The same cap everywhere, a share of the replayed trajectories in each.
    own = [state["loss"]["matching"] for state in (saved, *saved["others"])]
    assert own[0]["cap"] == own[1]["cap"]
    stored = [loss["buffer"]["store"]["xs"] for loss in own]
    assert [len(xs[0]) for xs in stored] == [CONFIG.replay_size // 2] * 2
    assert not torch.isclose(stored[0], stored[1]).any()


def refined_by_flow_matching(rank, folder, with_cond):
    config = TiltConfig(
        iterations=4,
        steps=3,
        batch_size=8,
        refine_loss="flow_matching",
        refine_fraction=1.0,
        refine_steps=4,
        refine_samples=256,
        base_samples=64,
        certificate_samples=256,
        checkpoint_every=1,
    )

    def labels(n, generator):
        c = torch.randint(2, (n, 1), generator=generator, dtype=torch.float64)
        return {"c": c.expand(n, 2)}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this base is no flow of independent noise
        tilted = tilt(
            Guest(),
            conditional if with_cond else PROBLEM.reward,
            shape=(2,),
            config=config,
            cond_sampler=labels if with_cond else None,
            checkpoint=folder / "c.pt",
            dtype=torch.float64,
        )
    samples = checkpoints.load(folder / "c.pt")["loss"]["refining"]["samples"]
    return tilted.field.state_dict(), tilted.certificate.groups, samples


@pytest.mark.parametrize(("with_cond", "groups"), [(False, 1), (True, 4)])
@pytest.mark.slow
def test_two_processes_refine_by_the_samples_of_both(with_cond, groups, tmp_path):
    found, other = agreed(several(refined_by_flow_matching, tmp_path, with_cond))
    torch.testing.assert_close(found[0], other[0], rtol=0, atol=0)
    assert found[1] == groups
    assert found[2]["x"].shape == (2 * 256, 2)  # drawn twice, and pooled
    assert found[2]["log_weights"].shape == (2 * groups, 256 // groups)
    assert (found[2]["cond"] is not None) == with_cond


def stopped(rank, folder):
    with pytest.raises(KeyError, match="stop"):
        train(folder, Stop())


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_loads_in_one(tmp_path):
    agreed(several(stopped, tmp_path))
    saved = checkpoints.load(tmp_path / "c.pt")
    assert saved["iteration"] == 3
    assert saved["loss"]["calls"] % CONFIG.losses_per_rollout  # the next update would have replayed
    with pytest.warns(UserWarning, match="saved by 2 processes, not 1: random"):
        tilted = train(tmp_path)
    again = checkpoints.load(tmp_path / "c.pt")
    assert (again["iteration"], again["others"]) == (10, [])
    assert again["loss"]["matching"]["buffer"]["store"]["xs"].shape[1] == CONFIG.replay_size
    assert torch.isfinite(tilted.certificate.log_weights).all()


def too_few(rank):
    config = replace(
        CONFIG,
        batch_size=2,
        replay_size=0,
        losses_per_rollout=1,
        refine_fraction=0.5,
        refine_loss="log_variance",
    )
    kernel = make_kernel("ancestral", torch.linspace(0, 1, 5, dtype=torch.float64))
    TiltLoss(
        PROBLEM.base,
        as_reward(PROBLEM.reward),
        kernel,
        shape=(2,),
        config=config,
        cond_sampler=lambda n, generator: {"c": torch.zeros(n, 2)},
    )


@pytest.mark.slow
def test_too_few_trajectories_to_compare_under_one_condition():
    for result in several(too_few):
        assert isinstance(result, ValueError)
        assert "batch_size must be at least 4 for 2 processes, got 2" in str(result)


def sharded_tilt(rank, sharded, adapters=False, alone=False):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, base = lora(network(), rank=2) if adapters else (network(), network())
    if sharded:
        for module in (base, model):
            fully_shard(module, mesh=init_device_mesh("cpu", (distributed.size(),)))
    config = replace(CONFIG, micro_batch=4, replay_size=0, losses_per_rollout=1, grad_clip=1.0)
    options = {} if alone else {"model": model}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this base is no flow of independent noise
        tilted = tilt(
            base, PROBLEM.reward, shape=(2,), config=config, dtype=torch.float64, **options
        )
    return distributed.whole(tilted.field.state_dict()), tilted.certificate.log_weights


@needs_cpu_shards
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.slow
def test_a_sharded_tilt_is_the_whole_one(adapters):
    if adapters:
        pytest.importorskip("peft", reason="low-rank adapters need the package peft (extra lora)")
    (expected, log_w), _ = agreed(several(sharded_tilt, False, adapters))
    (found, same), _ = agreed(several(sharded_tilt, True, adapters))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(same, log_w, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_a_sharded_base_needs_a_model():
    for result in several(sharded_tilt, True, False, True):
        assert isinstance(result, ValueError)
        assert "a base sharded by fully_shard cannot be copied" in str(result)


def torchrun(folder):
    """Start the program in two processes, as a user would."""
    tests = Path(__file__).parents[2]
    path = os.pathsep.join([str(tests.parent), str(tests)])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", "--local_addr=127.0.0.1"]
    return subprocess.run(
        [*command, str(tests / "helpers" / "torchrun_tilt.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_torchrun_ends_when_a_process_is_killed_and_goes_on_when_started_again(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    agreed(several(whole_tilt, whole))
    ended = torchrun(killed)
    assert ended.returncode != 0
    assert "Signal 9 (SIGKILL) received" in ended.stderr
    assert checkpoints.load(killed / "c.pt")["iteration"] == 3
    # In one of some two hundred starts a process was aborted by a thread of PyTorch's ("terminate
    # called without an active exception"), it seems on its way out: a kill too, to go on from.
    for _ in range(2):
        again = torchrun(killed)
        if "terminate called without an active exception" not in again.stderr:
            break
    assert again.returncode == 0, again.stderr
    said = re.findall(r"log Z of 64: -?[\d.e-]+?(?=\s|log|$)", again.stdout)  # two may share a line
    assert len(said) == 2  # each process says the same
    assert said[0] == said[1]
    files = [checkpoints.load(folder / "c.pt") for folder in (whole, killed)]
    torch.testing.assert_close(files[1]["ema"], files[0]["ema"], rtol=0, atol=0)
    assert (killed / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
