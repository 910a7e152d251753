"""The correspondence between updates, environment steps and the two phases of a training.

With N offline updates, update i = 1, 2, ... belongs to

    i <= N:  the offline phase, step i;
    i > N:   the online phase, in which M - 1 + i - N environment steps have been taken before it,

where M is the online step from which there is one update per environment step.  The steps before M
are taken in the first online update.  A step counts offline updates and online environment steps
together.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phases:
    """Says of every update whether it is offline or online, and at which step it stands.

    Arguments:
        offline_steps: number N of updates on the data alone.
        online_steps: number of environment steps.
        start_training: online step M of the first online update.

    Raises:
        ValueError: a number is out of range.
    """

    offline_steps: int
    online_steps: int = 0
    start_training: int = 1

    def __post_init__(self) -> None:
        for name, least in (("offline_steps", 0), ("online_steps", 0), ("start_training", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if 0 < self.online_steps < self.start_training:
            raise ValueError(
                f"online_steps must be 0 or at least start_training={self.start_training}, at "
                f"which the updates begin, got {self.online_steps}"
            )

    @property
    def updates(self) -> int:
        """Number of updates in both phases."""
        return self.offline_steps + max(0, self.online_steps - self.start_training + 1)

    def online(self, update: int) -> int:
        """Count the environment steps taken by the end of ``update`` = 1, 2, ...; 0 offline."""
        after = update - self.offline_steps
        return self.start_training + after - 1 if after > 0 else 0

    def step(self, update: int) -> int:
        """Return the step of ``update``: offline updates and environment steps counted together."""
        return min(update, self.offline_steps) + self.online(update)

    def phase(self, update: int) -> str:
        """Return the name of the phase of ``update``, ``"offline"`` or ``"online"``."""
        return "online" if update > self.offline_steps else "offline"
