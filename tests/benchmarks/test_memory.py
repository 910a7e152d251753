"""The memory benchmark on small models: its counting, and that every option saves what it says."""

import json

import pytest
import torch

from benchmarks.memory.__main__ import OPTIONS, Args, main, training_rows
from benchmarks.memory.ledger import HOST, HostTensor, Ledger, simulated_device

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_ledger_counts_what_is_alive():
    x = torch.zeros(1000)
    with Ledger() as ledger:
        y = x + 1
        z = y.reshape(10, 100)[2:].mul_(2)  # a view and an operation in place: nothing new
        assert (ledger.live[False], ledger.peak) == (4000, 4000)
        del y
        assert ledger.live[False] == 4000  # the view still holds it
        del z
        assert ledger.live[False] == 0
        ((x + 1) * 2 + 3).sum()
        assert ledger.peak == 8000
        w = x.clone().requires_grad_()
        loss = (w.sin().cos() * 2).sum()  # keeps w, its sine and its gradient
        assert ledger.live[False] == 8000 + 4
        loss.backward()
        assert ledger.live[False] >= 2 * 4000  # the weight and its gradient


def test_a_simulated_device_is_refused_what_is_on_the_host():
    x = torch.randn(3, 4)
    with simulated_device() as ledger:
        on_host = x.to(HOST)
        assert on_host.device == HOST
        assert isinstance(on_host[1:] * 2, HostTensor)
        assert (ledger.live, ledger.peak) == ({False: 0, True: 48}, 0)
        with pytest.raises(RuntimeError, match="on the device and on the host"):
            on_host + x
        back = on_host.to(x.device, torch.float64)
        assert ledger.peak == 48 + 96
        assert torch.equal(back, x.double())
    assert "to" not in vars(torch.Tensor)
    assert x.to(torch.float64).dtype == torch.float64


def test_gradients_cross_between_the_places():
    x = torch.randn(3, 4, requires_grad=True)
    with simulated_device():
        (x.sin().to(HOST) * 2).to(x.device).cos().sum().backward()
    expected = -(2 * x.sin()).sin() * 2 * x.cos()
    torch.testing.assert_close(x.grad, expected.detach())


@pytest.mark.slow
def test_every_option_saves_memory_and_the_adjoint_pass_needs_no_more_for_more_steps(tmp_path):
    out = tmp_path / "memory.json"
    args = Args(steps=(4, 16), update_steps=4, batch_size=8, width=8, device="cpu", output=out)
    rows = main(args)
    assert json.loads(out.read_text()) == rows
    keys = {"name", "steps", "device", "peak_mb", "ratio", "seconds"}
    assert all(row.keys() == keys for row in rows)
    named = {(row["name"], row["steps"]): row["peak_mb"] for row in rows}
    assert named["adjoint pass", 16] == pytest.approx(named["adjoint pass", 4], rel=0.01)
    assert named["stored trajectory", 16] > 3 * named["stored trajectory", 4]
    plain = named["update", 4]
    for name in OPTIONS:
        assert name == "update" or named[name, 4] < 0.7 * plain, name
    assert named["micro_batch=8", 4] < 0.3 * plain
    assert named["micro_batch=8, autocast", 4] < named["micro_batch=8", 4]
    large = "batch_size=32, micro_batch=8"
    assert named[f"{large}, offload", 4] < 0.8 * named[large, 4]
    assert named[f"{large}, offload", 4] < 1.1 * named["micro_batch=8", 4]


@pytest.mark.slow
def test_low_rank_adapters_need_one_copy_of_the_weights():
    pytest.importorskip("peft", reason="low-rank adapters need the package peft (extra lora)")
    args = Args(batch_size=2, width=16, device="cpu")
    rows = training_rows(args, adapted=False) + training_rows(args, adapted=True)
    named = {row["name"]: row["peak_mb"] for row in rows}
    weights = 3 * 512**2 * 4 / 2**20
    assert named["all weights trained"] > 5 * weights
    assert named["adapters of rank 8 trained"] < 3 * weights
    assert named["checkpoint, all weights trained"] > 3 * weights
    assert named["checkpoint, adapters of rank 8 trained"] < 0.5 * weights
