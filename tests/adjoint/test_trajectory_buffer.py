"""The replay buffer: what it keeps, what it draws, and its state."""

import pytest
import torch

from adjoint.trajectory_batch import TrajectoryBatch
from adjoint.trajectory_buffer import TrajectoryBuffer


def batch(start, count, steps=3):
    """Trajectories numbered from ``start``: xs (steps, count, 2) and log_w (count,) say which."""
    numbers = torch.arange(start, start + count, dtype=torch.float64)
    offsets = 1000 * torch.arange(steps, dtype=torch.float64)
    xs = (numbers + offsets[:, None])[..., None].repeat(1, 1, 2)
    return TrajectoryBatch(
        *(xs, xs + 1, xs + 2, numbers, numbers + 1, numbers + 2),
        terms={"term": numbers + 3},
        cond={"c": numbers[:, None]},
    )


def drawn(buffer, count=4000, seed=0):
    return buffer.draw(count, generator=torch.Generator().manual_seed(seed))


def test_keeps_the_newest_and_only_those():
    buffer = TrajectoryBuffer(10)
    kept = []
    for start, count in ((1, 4), (5, 3), (8, 10), (18, 5), (23, 9), (32, 1)):
        buffer.add(batch(start, count))
        kept = [*kept, *range(start, start + count)][-10:]
        assert set(drawn(buffer).log_w.tolist()) == set(kept)
        assert buffer.size == len(kept)


def test_draws_whole_trajectories_evenly_and_by_the_generator():
    buffer = TrajectoryBuffer(8)
    for start in (0, 5):
        buffer.add(batch(start, 5))
    found = drawn(buffer, 8000)
    assert found.xs.shape == (3, 8000, 2)
    assert torch.equal(found.cond["c"][:, 0], found.log_w)
    assert torch.equal(found.terms["term"], found.log_w + 3)
    expected = found.log_w + 1000 * torch.arange(3)[:, None]
    assert torch.equal(found.xs, expected[..., None].expand(3, 8000, 2))
    counts = found.log_w.long().bincount(minlength=10)[2:]
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 24.3  # chi-squared, 7 degrees: p = 0.001
    again, other = drawn(buffer, 8000), drawn(buffer, 8000, seed=1)
    assert torch.equal(found.log_w, again.log_w)
    assert not torch.equal(found.log_w, other.log_w)


def test_what_is_stored_and_drawn_is_a_copy():
    buffer = TrajectoryBuffer(4)
    given = batch(0, 4)
    buffer.add(given)
    for value, _ in (*given.tensors(), *drawn(buffer).tensors()):
        value.fill_(-1)
    assert set(drawn(buffer).log_w.tolist()) == {0.0, 1.0, 2.0, 3.0}


def test_a_buffer_restored_in_a_new_process_goes_on_as_the_old_one():
    old = TrajectoryBuffer(6)
    for start in (0, 4):
        old.add(batch(start, 4))
    new = TrajectoryBuffer(6)  # has seen no batch, so it knows no names yet
    new.load_state_dict(old.state_dict())
    for start in (8, 11):
        assert torch.equal(drawn(new).xs, drawn(old).xs)
        for buffer in (old, new):
            buffer.add(batch(start, 3))
        assert torch.equal(drawn(new).log_w, drawn(old).log_w)
        assert (new.size, new.position) == (old.size, old.position)
    frozen = drawn(old).log_w
    new.add(batch(20, 6))
    assert torch.equal(drawn(old).log_w, frozen)  # they share nothing


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        TrajectoryBuffer(0)
    buffer = TrajectoryBuffer(4)
    with pytest.raises(ValueError, match=r"batch of 5 trajectories does not fit .* of 4"):
        buffer.add(batch(0, 5))
    buffer.add(batch(0, 4))
    with pytest.raises(ValueError, match="buffer of 4 trajectories in the state, expected 6"):
        TrajectoryBuffer(6).load_state_dict(buffer.state_dict())
