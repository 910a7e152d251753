"""The replay buffer: offline data followed by a ring of online transitions, sampled in windows.

Rows.  Transition j is (s_j, a_j, r_j, mask_j, terminal_j, s'_j).  The rows are the offline data in
their own order, then the online transitions from the oldest to the newest: ``size`` in all.  The
offline data are kept for good; the online part holds the newest ``capacity`` transitions.

Windows.  A chunk of h actions is learned from h consecutive rows j, ..., j+h-1 whose first is
uniform in [0, size - h].  With valid_0 = 1 and valid_i = 1 - max(terminal before i),

    A  = (a_j, ..., a_{j+h-1})           all of them, valid or not
    R  = sum_i gamma^i r_{j+i} valid_i   the reward until the window or the episode ends
    m  = m_{h-1},  m_i = min(m_{i-1}, mask_{j+i}) where valid, else m_{i-1},  m_{-1} = 1
    w  = valid_{h-1}                     0 if the episode ends before the last action
    s' = the last valid next observation

so a window that crosses the end of an episode has w = 0: its loss is zero, but it counts in the
mean over the batch, as published.  mask is 0 where a state was terminated (its value is 0), and
terminal is 1 at the last row of an episode, however it ended.

Seams.  The order above is the order of time, not of memory: once the ring is full, its oldest row
is at the write position, and windows run from there around to the newest row.  So no window joins a
row to one written a whole ring earlier, and every start in [0, size - h] is admissible; an oldest
episode that has lost its beginning is as good as any.  One neighbourhood is not one of time: the
oldest online row follows the last offline row.  That offline row is therefore made terminal (the
recording stopped there), so windows across it have w = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from applications.rl.data.dataset import Dataset

SCALARS = ("rewards", "masks", "terminals")


class Batch(NamedTuple):
    """A batch of windows of h rows, reduced to the tensors of the losses; see the module docstring.

    Attributes:
        observations: first observations s (B, obs), float32.
        actions: chunks A (B, h, d_a).
        rewards: discounted sums R (B,).
        masks: m (B,), 0 where the window saw a terminated state.
        valid: w (B,), 0 where the window crosses the end of an episode.
        next_observations: s' (B, obs).
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    masks: Tensor
    valid: Tensor
    next_observations: Tensor


class Replay:
    """A replay buffer of offline rows and a ring of online rows on one device.

    Arguments:
        capacity: largest number of online transitions; with 0 none can be added.
        observation_dim: size of an observation.
        action_dim: size d_a of one action.
        device: device of the rows and the batches.

    Attributes:
        offline, online: numbers of offline and online rows.
        position: write position in the ring.
        widths: shape of a row of each named array.

    Raises:
        ValueError: the capacity is negative, or a size is below 1.
    """

    def __init__(
        self,
        capacity: int,
        observation_dim: int,
        action_dim: int,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value, least in (
            ("capacity", capacity, 0),
            ("observation_dim", observation_dim, 1),
            ("action_dim", action_dim, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.capacity = capacity
        self.device = torch.device(device)
        self.widths: dict[str, tuple[int, ...]] = {
            "observations": (observation_dim,),
            "actions": (action_dim,),
            **{name: () for name in SCALARS},
            "next_observations": (observation_dim,),
        }
        self.offline = 0
        self.online = 0
        self.position = 0
        self._rows = self._allocate(capacity)

    @classmethod
    def from_dataset(
        cls, dataset: Dataset, capacity: int = 0, device: torch.device | str = "cpu"
    ) -> Replay:
        """Make a replay whose offline rows are the transitions of ``dataset``.

        Raises:
            ValueError: there are no rows, or shapes do not fit together.
        """
        for name in ("observations", "actions"):
            shape = getattr(dataset, name).shape
            if len(shape) != 2 or not shape[0]:
                raise ValueError(f"{name} must have shape (N, *) with N >= 1, got {shape}")
        replay = cls(capacity, dataset.observations.shape[1], dataset.actions.shape[1], device)
        replay.replace_offline(dataset)
        return replay

    def __len__(self) -> int:
        """Return the number of rows, offline and online."""
        return self.offline + self.online

    def replace_offline(self, dataset: Dataset) -> None:
        """Replace the offline rows by the transitions of ``dataset``; the online rows stay.

        Raises:
            ValueError: an array has another shape than its rows in the replay.
        """
        count = len(dataset.observations)
        new = {name: torch.as_tensor(getattr(dataset, name)) for name in self.widths}
        for name, values in new.items():
            expected = (count, *self.widths[name])
            if tuple(values.shape) != expected:
                raise ValueError(f"{name} must have shape {expected}, got {tuple(values.shape)}")
        old = self._rows
        if count != self.offline:
            self._rows = self._allocate(count + self.capacity)
        for name, rows in self._rows.items():
            rows[:count].copy_(new[name])
            if rows is not old[name]:
                rows[count:].copy_(old[name][self.offline :])
        self._rows["terminals"][count - 1 : count].fill_(1.0)
        self.offline = count

    def add(
        self,
        observation: np.ndarray,
        action: np.ndarray,
        reward: float,
        mask: float,
        terminal: float,
        next_observation: np.ndarray,
    ) -> None:
        """Append one online transition, over the oldest one if the ring is full.

        Arguments:
            observation, next_observation: (obs,).
            action: (d_a,).
            reward: reward of the step.
            mask: 0 if the step terminated the state, else 1.
            terminal: 1 if the step ended the episode, else 0.

        Raises:
            ValueError: the capacity is 0, a shape is wrong, or a number is not finite.
        """
        if not self.capacity:
            raise ValueError("no transition can be added to a replay of capacity 0")
        values = (observation, action, reward, mask, terminal, next_observation)
        arrays = {}
        for (name, width), value in zip(self.widths.items(), values, strict=True):
            arrays[name] = np.asarray(value, dtype=np.float32)
            if arrays[name].shape != width:
                raise ValueError(
                    f"{name}: a row must be of shape {width}, got {arrays[name].shape}"
                )
            if not np.isfinite(arrays[name]).all():
                raise ValueError(f"{name}: a row must be finite, got {value}")
        for name, array in arrays.items():
            self._rows[name][self.offline + self.position].copy_(torch.from_numpy(array))
        self.position = (self.position + 1) % self.capacity
        self.online = min(self.online + 1, self.capacity)

    def end_episode(self) -> None:
        """Mark the newest online row as the last of its episode, as a time limit does."""
        if self.online:
            newest = self.offline + (self.position - 1) % self.capacity
            self._rows["terminals"][newest : newest + 1].fill_(1.0)

    def sample(
        self,
        batch_size: int,
        *,
        horizon: int,
        discount: float,
        generator: torch.Generator,
        balanced: bool = False,
    ) -> Batch:
        """Draw ``batch_size`` windows of ``horizon`` rows, uniformly with replacement.

        No step waits for the device.

        Arguments:
            batch_size: number of windows.
            horizon: number h of rows in a window.
            discount: γ, per row.
            generator: generator on the device of the replay.
            balanced: draw one half of the windows from the offline rows and the other half, and an
                odd one, from the online rows, in random order.

        Raises:
            ValueError: there are fewer rows than the horizon, or horizon or batch size is below 1.
        """
        if horizon < 1 or batch_size < 1:
            raise ValueError(
                f"horizon and batch_size must be at least 1, got {horizon} and {batch_size}"
            )
        rows = min(self.offline, self.online) if balanced else len(self)
        if rows < horizon:
            kind = "offline and of online rows" if balanced else "rows"
            raise ValueError(f"horizon must be at most the number of {kind}, {rows}, got {horizon}")

        def draw(count: int, rows: int) -> Tensor:
            return torch.randint(
                rows - horizon + 1, (count,), generator=generator, device=self.device
            )

        if balanced:
            half = batch_size // 2
            online = self.offline + draw(batch_size - half, self.online)
            starts = torch.cat([draw(half, self.offline), online])
            order = torch.randperm(batch_size, generator=generator, device=self.device)
            starts = starts[order]
        else:
            starts = draw(batch_size, rows)
        return self.windows(starts, horizon=horizon, discount=discount)

    def windows(self, starts: Tensor, *, horizon: int, discount: float) -> Batch:
        """Return the windows that begin at the rows ``starts`` (B,) in [0, len(self) - horizon]."""
        offsets = torch.arange(horizon, device=self.device)
        rows = self._memory(starts[:, None] + offsets)
        ended = self._rows["terminals"][rows[:, :-1]]
        valid = torch.cat([torch.ones_like(starts[:, None], dtype=torch.float32), 1 - ended], 1)
        valid = valid.cumprod(1)
        powers = torch.pow(discount, offsets.double()).float()
        masks = torch.where(valid > 0, self._rows["masks"][rows], 1.0)
        last = rows.gather(1, valid.sum(1, keepdim=True).long() - 1)[:, 0]
        return Batch(
            observations=self._rows["observations"][rows[:, 0]],
            actions=self._rows["actions"][rows],
            rewards=(powers * self._rows["rewards"][rows] * valid).sum(1),
            masks=masks.amin(1),
            valid=valid[:, -1],
            next_observations=self._rows["next_observations"][last],
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the online rows in the order of time; the data hold the offline rows."""
        rows = torch.arange(self.offline, len(self), device=self.device)
        rows = self._memory(rows)
        return {name: values[rows] for name, values in self._rows.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore online rows from ``state_dict``.

        Raises:
            ValueError: there are more rows than the capacity, or rows have another shape.
        """
        count = len(state["rewards"])
        if count > self.capacity:
            raise ValueError(
                f"{count} online transitions do not fit a replay of capacity {self.capacity}"
            )
        for name, rows in self._rows.items():
            expected = (count, *self.widths[name])
            if tuple(state[name].shape) != expected:
                raise ValueError(
                    f"{name} must have shape {expected}, got {tuple(state[name].shape)}"
                )
            rows[self.offline : self.offline + count].copy_(state[name])
        self.online = count
        self.position = count % max(1, self.capacity)

    def _memory(self, rows: Tensor) -> Tensor:
        """Convert row numbers in the order of time to places in memory."""
        if self.online < self.capacity or not self.position:
            return rows
        in_ring = self.offline + (rows - self.offline + self.position) % self.capacity
        return torch.where(rows < self.offline, rows, in_ring)

    def _allocate(self, count: int) -> dict[str, Tensor]:
        return {
            name: torch.zeros(count, *width, device=self.device)
            for name, width in self.widths.items()
        }
