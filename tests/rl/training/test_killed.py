"""Real kills: a run that is killed again and again ends as one left undisturbed, bit by bit."""

import pytest
from helpers.killed_rl import OFFLINE, ONLINE, configuration, train_offline, train_online
from helpers.killing import run_with_kills
from helpers.same_run import equal

from flows.training import checkpoint as checkpoints


@pytest.mark.parametrize(
    ("train", "phases"),
    [(train_offline, OFFLINE), (train_online, ONLINE)],
    ids=["offline", "online"],
)
@pytest.mark.slow
def test_sigkill_at_random_moments_then_resume_is_bit_identical(tmp_path, train, phases):
    updates = configuration(tmp_path, phases).phases.updates
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = run_with_kills(train, whole, iterations=updates, kills=0, seed=0)
    starts = run_with_kills(train, killed, iterations=updates, kills=5, seed=3, longest_delay=0.03)
    assert undisturbed == [1]
    assert len({start for start in starts if start and start > 1}) > 2  # resumed in the midst

    expected, found = (checkpoints.load(f / "seed0" / "checkpoint.pt") for f in (whole, killed))
    assert expected["iteration"] == updates
    for part in expected:
        assert equal(expected[part], found[part]), part
    for name in ("metrics.csv", "evaluation.csv", "config.json"):
        content = (whole / "seed0" / name).read_bytes()
        assert content.count(b"\n") > 5
        assert (killed / "seed0" / name).read_bytes() == content, name
    if phases["online_steps"]:
        collector = expected["loss"]["collector"]
        assert collector["steps"] == len(expected["loss"]["replay"]["rewards"]) == 160
        assert collector["queue"] or collector["length"]  # the end lies in the midst of an episode
