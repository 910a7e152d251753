"""Options of `benchmarks.speed`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.common.clock import Clock, check_clock, seconds
from benchmarks.common.records import RESULTS
from benchmarks.speed.update import Execution


@dataclass(frozen=True)
class SpeedConfig:
    """Time updates of QAM, their parts, and the published implementation."""

    device: str = "cpu"
    """Device of the updates: cpu or cuda."""
    threads: int = 1
    """Number of threads on a CPU."""
    executions: tuple[Execution, ...] = ("eager",)
    """Ways of execution: eager, compiled (a minute before the first update; needs a C++ compiler on
    a CPU), graph (on cuda)."""
    seeds: tuple[int, ...] = (1,)
    """Numbers of agents trained at once."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Precision of matrix products: tf32 needs a GPU; bfloat16 is autocast, there beside tf32."""
    rounds: int = 8
    """Number of blocks of updates of each implementation."""
    updates: int = 2
    """Updates in a block; launches, for a graph."""
    clock: Clock = "wall"
    """Wall-clock time or processor time, see `benchmarks.common.clock`."""
    peer: Path | None = None
    """Checkout of the published implementation."""
    peer_python: Path = Path(sys.executable)
    """Interpreter with the packages that the peer requires."""
    check: bool = False
    """First compare every execution with the golden values; see `benchmarks.speed.check`."""
    quick: bool = False
    """Take tiny sizes, to try the benchmark itself."""
    output: Path = RESULTS / "speed.json"
    """File of the rows {name, device, threads, seeds, ms_per_update, updates_per_s, ratio_to_peer,
    fraction_of_ceiling, peak_memory_gb, compile_s}; a figure is written beside it."""

    def __post_init__(self) -> None:
        for name in ("threads", "rounds", "updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.seeds or min(self.seeds) < 1:
            raise ValueError(f"seeds must be numbers of at least 1, got {self.seeds}")
        cuda = self.device.startswith("cuda")
        check_clock(self.clock, self.device)
        if not cuda and "graph" in self.executions:
            raise ValueError(f"executions must not name graph on device {self.device!r}")
        if not cuda and self.precision == "tf32":
            raise ValueError(
                f"precision must be float32 or bfloat16 on device {self.device!r}, got 'tf32'"
            )
        if self.peer is not None and not (self.peer / "agents" / "qam.py").is_file():
            raise ValueError(f"peer must be a checkout that has agents/qam.py, got {self.peer}")

    @property
    def suffix(self) -> str:
        """Suffix of a row's name that states the precision."""
        return "" if self.precision == "float32" else f", {self.precision}"

    def timed(self, run: Callable[[], object], calls: int) -> float:
        """Return the seconds of a call of ``run``, averaged over ``calls``."""
        return seconds(run, calls, device=self.device, clock=self.clock)
