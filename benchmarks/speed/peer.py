"""The published JAX implementation of QAM, timed in blocks in a separate process.

The process runs the source of `serve_peer`, so that its interpreter needs neither PyTorch nor this
package.  It reads a number of updates from a line of its input and answers with a line of JSON.
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
    """The published implementation in a separate process, which runs blocks of updates on request.

    Arguments:
        sizes: sizes of the problem: observation, action, horizon, batch, critics, steps, hidden.
        checkout: the repository of the published implementation.
        python: an interpreter with the packages that it requires.
        device: cpu or cuda.
        threads: number of threads on a CPU.

    Attributes:
        compile_s: seconds of the first update, which compiles.

    Raises:
        RuntimeError: the process ends; its own message is printed above.
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
        """Run a block of updates and return its seconds per update."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{updates}\n")
        self._process.stdin.flush()
        return self._read()[clock] / updates

    def close(self) -> None:
        """Close the input of the process and wait for its end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> dict[str, float]:
        """Return the next answer; other lines that the process prints are skipped."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("peer: "):
                return json.loads(line.removeprefix("peer: "))
        code = self._process.wait()
        raise RuntimeError(f"the peer ended with exit code {code}; its message is above")


def serve_peer() -> None:
    """Run the peer: each input line is a number of updates to make; each answer is a line of JSON.

    The arguments of the process are checkout and sizes.  The other interpreter gets the source of
    this function and may lack this package and torch, so that the function imports all it uses.
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
