"""How exact is a trained tilt?

    python -m benchmarks.tilt_fidelity                 # every kernel: over an hour on two cores
    python -m benchmarks.tilt_fidelity --kernels moment_matched_refined --steps 40 \\
        --iterations 1500 --batch-size 256             # with more training
    python -m benchmarks.tilt_fidelity --problems ring/linear --steps 10 --iterations 200
    python -m benchmarks.tilt_fidelity --default       # the call without options: hours
    python -m benchmarks.tilt_fidelity --default --peers
    python -m benchmarks.tilt_fidelity --default --problems narrow_two/linear --seeds 0 \\
        --output outputs/narrow.json                   # one problem, one seed: minutes
    python -m benchmarks.tilt_fidelity --random 7      # 20 problems drawn by seed 7
    python -m benchmarks.tilt_fidelity --random 7 --count 3 --peers

There are three kinds of run, on problems whose tilt is known (`benchmarks.common.problems`):

- kernels (`kernels`): every kernel on every moderate problem, at equal training budgets;
- ``--default`` (`default_call`): the call ``tilt(base, reward, shape=...)`` without options on
  moderate and hard problems, three seeds each, held against the aims;
- ``--random SEED``: that call on problems which the seed draws.

``--peers`` adds other methods at equal evaluations (`peers`).  The metrics are defined in
`metrics`.  Rows are written as they are measured; a second call runs only the missing ones.
"""

from __future__ import annotations

import tyro

from benchmarks.tilt_fidelity.config import FidelityConfig
from benchmarks.tilt_fidelity.default_call import measure_default
from benchmarks.tilt_fidelity.kernels import compare_kernels


def main(config: FidelityConfig) -> None:
    """Run the measurement that the options ask for."""
    if config.default or config.random is not None:
        measure_default(config)
    else:
        compare_kernels(config, config.output)


if __name__ == "__main__":
    main(tyro.cli(FidelityConfig, prog="python -m benchmarks.tilt_fidelity"))
