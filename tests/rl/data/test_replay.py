"""The replay against a reference that walks through the episodes in plain Python."""

from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from applications.rl import Batch, Replay


@dataclass
class Rows:
    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    masks: np.ndarray
    terminals: np.ndarray
    next_observations: np.ndarray

    def __len__(self):
        return len(self.rewards)

    def __getitem__(self, index):
        return Rows(*(getattr(self, f.name)[index] for f in fields(self)))

    def row(self, index):
        return [getattr(self, f.name)[index] for f in fields(self)]


def random_rows(count, seed, *, p_end=0.3, p_mask=0.3, observation_dim=3, action_dim=2):
    """Rows whose episodes end at random; masks are 0 at random, also within an episode."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return Rows(
        normal(count, observation_dim),
        normal(count, action_dim),
        normal(count),
        (rng.random(count) >= p_mask).astype(np.float32),
        (rng.random(count) < p_end).astype(np.float32),
        normal(count, observation_dim),
    )


def reference(rows, start, horizon, discount):
    """One window, by the definitions and nothing but loops: s, A, R, m, w, s'."""
    total, mask, over, last = 0.0, 1.0, False, None
    chunk, valid = [], None
    for i in range(horizon):
        _, action, reward, m, terminal, following = rows.row(start + i)
        chunk.append(action)
        valid = 0.0 if over else 1.0
        if not over:
            total += discount**i * float(reward)
            mask = min(mask, float(m))
            last = following
        over = over or bool(terminal)
    return rows.observations[start], np.stack(chunk), total, mask, valid, last


def close_offline(rows):
    """The rows with an end of an episode at the last one."""
    rows.terminals[-1:] = 1
    return rows


def concatenate(a, b):
    return Rows(*(np.concatenate([getattr(a, f.name), getattr(b, f.name)]) for f in fields(a)))


def assert_all_windows(replay, rows, horizon, discount):
    """Every admissible window of the replay is the reference's on ``rows``, in that order."""
    assert len(replay) == len(rows)
    starts = torch.arange(len(rows) - horizon + 1)
    batch = replay.windows(starts, horizon=horizon, discount=discount)
    expected = [reference(rows, int(j), horizon, discount) for j in starts]
    for name, found, wanted in zip(Batch._fields, batch, zip(*expected, strict=True), strict=True):
        values = torch.as_tensor(np.stack([np.asarray(v, dtype=np.float32) for v in wanted]))
        assert found.dtype == torch.float32
        exact = name != "rewards"
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(found, values, **tolerance, msg=name)


@settings(max_examples=150, deadline=None)
@given(
    offline=st.integers(0, 25),
    capacity=st.integers(0, 12),
    added=st.integers(0, 40),
    horizon=st.sampled_from([1, 2, 3, 5]),
    p_end=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    seed=st.integers(0, 2**31),
)
@pytest.mark.slow
def test_windows_against_the_reference(offline, capacity, added, horizon, p_end, seed):
    added = added if capacity else 0
    first = close_offline(random_rows(offline, seed, p_end=p_end))
    online = random_rows(added, seed + 1, p_end=p_end)
    replay = Replay.from_dataset(first, capacity) if offline else Replay(capacity, 3, 2)
    for j in range(added):
        replay.add(*online.row(j))
    rows = concatenate(first, online[max(0, added - capacity) :])  # the newest, in order
    if len(rows) >= horizon:
        assert_all_windows(replay, rows, horizon, 0.9)
    else:
        with pytest.raises(
            ValueError, match=f"horizon must be at most the number of rows, .* got {horizon}"
        ):
            replay.sample(4, horizon=horizon, discount=0.9, generator=torch.Generator())

    again = Replay.from_dataset(first, capacity) if offline else Replay(capacity, 3, 2)
    again.load_state_dict(replay.state_dict())  # also after a wrap: the same order of time
    for j in range(added // 2):
        for r in (again, replay):
            r.add(*online.row(j))
    if len(rows) >= horizon:
        starts = torch.arange(len(replay) - horizon + 1)
        for a, b in zip(
            replay.windows(starts, horizon=horizon, discount=0.9),
            again.windows(starts, horizon=horizon, discount=0.9),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_a_window_by_hand():
    """Three rows of one episode that ends by success, then one of another; h = 3, gamma = 1/2."""
    rows = random_rows(4, 0)
    rows.rewards[:] = [1, 2, 4, 8]
    rows.masks[:] = [1, 1, 0, 1]
    rows.terminals[:] = [0, 0, 1, 0]
    batch = Replay.from_dataset(rows).windows(torch.tensor([0, 1]), horizon=3, discount=0.5)
    assert batch.rewards.tolist() == [1 + 1 + 1, 2 + 2]
    assert batch.masks.tolist() == [0, 0]
    assert batch.valid.tolist() == [1, 0]  # the end at the last action is no crossing
    assert torch.equal(batch.next_observations, torch.from_numpy(rows.next_observations[[2, 2]]))
    assert torch.equal(batch.actions[1], torch.from_numpy(rows.actions[1:4]))
    crossing = Replay.from_dataset(rows).windows(torch.tensor([2]), horizon=2, discount=0.5)
    assert crossing.masks.tolist() == [0]
    assert crossing.valid.tolist() == [0]


def test_the_last_offline_row_ends_an_episode_whatever_the_data_say():
    rows = random_rows(5, 0, p_end=0)
    replay = Replay.from_dataset(rows, capacity=5)
    for j in range(3):
        replay.add(*rows.row(j))
    batch = replay.windows(torch.arange(5), horizon=4, discount=0.9)
    assert batch.valid.tolist() == [1, 1, 0, 0, 0]
    assert rows.terminals.tolist() == [0] * 5  # the caller's arrays are left alone


def test_starts_are_uniform_and_reproducible():
    rows = random_rows(12, 0)
    rows.observations[:, 0] = np.arange(12)
    replay = Replay.from_dataset(rows)

    def firsts(seed):
        generator = torch.Generator().manual_seed(seed)
        batch = replay.sample(20_000, horizon=3, discount=0.9, generator=generator)
        return batch.observations[:, 0].long()

    assert torch.equal(firsts(1), firsts(1))
    counts = firsts(1).bincount(minlength=12)
    assert counts[10:].tolist() == [0, 0]
    assert ((counts[:10] - 2000).square() / 2000).sum() < 27.9  # chi-squared, 9 degrees: p = 0.001


def test_one_half_of_a_balanced_batch_is_of_the_data_and_the_other_came_online():
    data, online = random_rows(12, 0), random_rows(9, 1, p_end=0)
    data.observations[:, 0], online.observations[:, 0] = np.arange(12), 100 + np.arange(9)
    replay = Replay.from_dataset(data, capacity=7)
    for j in range(9):  # wrapped: rows 102 to 108 are left
        replay.add(*online.row(j))

    def firsts(batch_size, seed=0):
        generator = torch.Generator().manual_seed(seed)
        batch = replay.sample(
            batch_size, horizon=3, discount=0.9, generator=generator, balanced=True
        )
        return batch.observations[:, 0].long()

    found = firsts(20_000)
    counts = found.bincount(minlength=109)
    assert counts[:10].sum() == counts[102:107].sum() == 10_000
    assert ((counts[:10] - 1000).square() / 1000).sum() < 27.9  # chi-squared: p = 0.001
    assert ((counts[102:107] - 2000).square() / 2000).sum() < 18.5
    assert abs((found[:10_000] < 100).sum() - 5000) < 200  # in random order
    assert sorted((firsts(5) < 100).tolist()) == [False] * 3 + [True] * 2
    assert torch.equal(firsts(50), firsts(50))
    few = Replay.from_dataset(data, capacity=7)
    few.add(*online.row(0))
    with pytest.raises(ValueError, match=r"number of offline and of online rows, 1, got 3"):
        few.sample(4, horizon=3, discount=0.9, generator=torch.Generator(), balanced=True)


def test_state_holds_only_what_came_online_and_shares_nothing():
    rows = random_rows(20, 0)
    replay = Replay.from_dataset(rows, capacity=8)
    for j in range(3):
        replay.add(*rows.row(j))
    state = replay.state_dict()
    assert {len(values) for values in state.values()} == {3}
    replay.add(*rows.row(3))
    again = Replay.from_dataset(rows, capacity=3)
    again.load_state_dict(state)
    assert len(again) == 23
    again.add(*rows.row(4))
    assert state["rewards"].tolist() == rows.rewards[:3].tolist()
    with pytest.raises(ValueError, match="3 online transitions do not fit a replay of capacity 2"):
        Replay(2, 3, 2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"observations must have shape \(3, 4\), got \(3, 3\)"):
        Replay(5, 4, 2).load_state_dict(state)


@pytest.mark.parametrize("count", [4, 9, 15])
def test_replacing_the_offline_rows_keeps_the_online_ones(count):
    first, online = close_offline(random_rows(9, 0)), random_rows(13, 1)
    second = close_offline(random_rows(count, 2))
    replay = Replay.from_dataset(first, capacity=6)
    for j in range(8):  # wrapped
        replay.add(*online.row(j))
    replay.replace_offline(second)
    for j in range(8, 13):
        replay.add(*online.row(j))
    assert_all_windows(replay, concatenate(second, online[7:]), 3, 0.9)


@pytest.mark.parametrize("count", [4, 9])
def test_a_failed_replacement_changes_nothing(count):
    rows = close_offline(random_rows(9, 0))
    replay = Replay.from_dataset(rows)
    other = random_rows(count, 1)
    other.next_observations = other.next_observations[:, :2]
    with pytest.raises(ValueError, match=rf"next_observations must have shape \({count}, 3\)"):
        replay.replace_offline(other)
    assert_all_windows(replay, rows, 2, 0.9)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="capacity must be at least 0, got -1"):
        Replay(-1, 3, 2)
    with pytest.raises(ValueError, match="action_dim must be at least 1, got 0"):
        Replay(1, 3, 0)
    with pytest.raises(ValueError, match=r"observations must have shape \(N, \*\) with N >= 1"):
        Replay.from_dataset(random_rows(0, 0))
    rows = random_rows(3, 0)
    with pytest.raises(ValueError, match="capacity 0"):
        Replay.from_dataset(rows).add(*rows.row(0))
    replay = Replay.from_dataset(rows, capacity=2)
    for name, change, message in (
        ("observations", np.zeros(4), r"observations: a row must be of shape \(3,\), got \(4,\)"),
        ("rewards", np.nan, "rewards: a row must be finite, got nan"),
        ("next_observations", np.full(3, np.inf), "next_observations: a row must be finite"),
    ):
        values = {
            **dict(zip([f.name for f in fields(rows)], rows.row(0), strict=True)),
            name: change,
        }
        with pytest.raises(ValueError, match=message):
            replay.add(*values.values())
    assert_all_windows(replay, close_offline(rows), 1, 0.9)
    for options in ({"horizon": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            replay.sample(
                **{"batch_size": 1, "horizon": 1, **options},
                discount=0.9,
                generator=torch.Generator(),
            )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sampling_does_not_wait_for_the_gpu():
    replay = Replay.from_dataset(random_rows(100, 0), capacity=7, device="cuda")
    for j in range(9):
        replay.add(*random_rows(9, 1).row(j))
    generator = torch.Generator("cuda").manual_seed(0)
    replay.sample(8, horizon=5, discount=0.99, generator=generator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = replay.sample(8, horizon=5, discount=0.99, generator=generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert batch.actions.device.type == "cuda"


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_an_interrupted_episode_ends_at_the_newest_row(rows):
    replay = Replay(3, 1, 1)
    replay.end_episode()  # there is none yet
    for row in range(rows):
        replay.add(np.array([row]), np.zeros(1), 0.0, 1.0, 0.0, np.zeros(1))
    replay.end_episode()
    terminals = replay.state_dict()["terminals"]
    assert terminals.tolist() == [0.0] * (len(terminals) - 1) + [1.0]
