"""The published JAX implementation of QAM, in a process of its own that is timed in blocks.

The process runs the source of one function, so that its interpreter needs neither PyTorch nor this
package; it prints a line of JSON for each block of updates that it is told to make.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal


class Peer:
    """The published implementation in a process of its own, which runs blocks when told to.

    Arguments:
        sizes: of the problem, by name: observation, action, horizon, batch, critics, steps, hidden.
        checkout: the repository of the published implementation.
        python: an interpreter with its requirements.
        device: cpu or cuda.
        threads: of a CPU.

    Attributes:
        compile_s: seconds of its first update.

    Raises:
        RuntimeError: it does not start, with the end of what it said.
    """

    def __init__(
        self, sizes: Mapping[str, Any], checkout: Path, python: Path, device: str, threads: int
    ) -> None:
        environment = os.environ | {
            "JAX_PLATFORMS": device.split(":", maxsplit=1)[0],
            "OMP_NUM_THREADS": str(threads),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        source = inspect.getsource(serve_peer)
        program = f"from __future__ import annotations\n{source}\nserve_peer()"
        arguments = [str(checkout.resolve()), json.dumps(dict(sizes))]
        self._process = subprocess.Popen(
            [str(python), "-c", program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.compile_s: float = self._read()["compile_s"]

    def block(self, updates: int, clock: Literal["wall", "cpu"]) -> float:
        """Seconds per update of a block."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{updates}\n")
        self._process.stdin.flush()
        return self._read()[clock] / updates

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> dict[str, float]:
        """Its next answer; whatever else it prints is passed over."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("peer: "):
                return json.loads(line.removeprefix("peer: "))
        code = self._process.wait()
        raise RuntimeError(f"the peer ended with exit code {code}; its message is above")


def serve_peer() -> None:
    """Be the peer: arguments are checkout and sizes, each line read is a number of updates to make.

    Its source is what the other interpreter is given, which need not have this package or torch: so
    it imports what it uses itself.
    """
    import json
    import sys
    import time

    checkout, sizes = sys.argv[1], json.loads(sys.argv[2])
    sys.path.insert(0, checkout)
    import jax
    import numpy as np
    from agents.qam import QAMAgent, get_config

    rng = np.random.default_rng(0)
    batch, h, width = sizes["batch"], sizes["horizon"], sizes["observation"]

    def normal(*shape: int) -> Any:
        return jax.numpy.asarray(rng.standard_normal(shape), dtype="float32")

    ones = jax.numpy.ones((batch, h), dtype="float32")
    data = {
        "observations": normal(batch, width),
        "next_observations": normal(batch, h, width),
        "actions": normal(batch, h, sizes["action"]).clip(-1, 1),
        "rewards": normal(batch, h),
        "masks": ones,
        "valid": ones,
        "terminals": 0 * ones,
    }
    config = get_config()
    config.horizon_length, config.action_chunking, config.inv_temp = h, True, 1.0
    config.batch_size, config.num_qs, config.flow_steps = batch, sizes["critics"], sizes["steps"]
    config.actor_hidden_dims = config.value_hidden_dims = tuple(sizes["hidden"])
    agent = QAMAgent.create(0, data["observations"][0], data["actions"][0, 0], config)

    def say(**numbers: float) -> None:
        print("peer: " + json.dumps(numbers), flush=True)

    start = time.perf_counter()
    agent, info = agent.update(data)
    jax.block_until_ready((agent, info))
    say(compile_s=time.perf_counter() - start)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            agent, info = agent.update(data)
        jax.block_until_ready((agent, info))
        say(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)
