"""A tilt killed by SIGKILL at random moments ends exactly as one left undisturbed."""

import pytest
import torch
from helpers.killed_tilt import CONFIG, ITERATIONS, train
from helpers.killing import run_with_kills

from flows.training import checkpoint as checkpoints


def differences(a, b, place=""):
    """Places where nested data differ, bit by bit."""
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [place]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{place}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [found for key in a for found in differences(a[key], b[key], f"{place}/{key}")]
    return [] if a == b else [f"{place}: {a!r} != {b!r}"]


@pytest.mark.slow
def test_sigkill_at_random_moments_then_resume_is_bit_identical(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = run_with_kills(train, whole, iterations=ITERATIONS, kills=0, seed=0)
    starts = run_with_kills(train, killed, iterations=ITERATIONS, kills=5, seed=11)
    assert undisturbed == [1]
    assert len(starts) == 6
    resumed_at = {start for start in starts if start > 1}
    assert len(resumed_at) > 2  # it did resume in the midst ...
    # ... also between two rollouts, where the next batch comes from the restored buffer alone
    assert any((start - 1) * CONFIG.accumulate % CONFIG.losses_per_rollout for start in resumed_at)

    expected, found = (checkpoints.load(folder / "checkpoint.pt") for folder in (whole, killed))
    assert expected["iteration"] == ITERATIONS
    assert expected["loss"]["matching"]["cap"] is not None
    assert set(expected["loss"]["matching"]["buffer"]["store"]) >= {"xs", "adjoint", "log_w"}
    for part in ("iteration", "module", "ema", "optimizer", "generator", "loss", "identity"):
        assert differences(expected[part], found[part]) == [], part

    content = (whole / "metrics.csv").read_bytes()
    assert content.count(b"\n") == 1 + ITERATIONS // 3
    assert (killed / "metrics.csv").read_bytes() == content
    log_weights = [
        torch.load(folder / "log_weights.pt", weights_only=True) for folder in (whole, killed)
    ]
    assert torch.equal(*log_weights)  # the certificate too
