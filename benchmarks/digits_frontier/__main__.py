"""Reward against diversity and closeness on digits: the tilt beside plain alternatives.

A small UNet flow of scikit-learn's digits is tilted toward three rewards at several temperatures
(`benchmarks.digits_frontier.rewards`: the log-probability of a digit, ink, and the symmetry of a
decoded, upscaled image); a second, class-conditional flow under guidance is tilted toward ink.
A tilt trains a perceptron that is added to the flow, or low-rank adapters in it (``tilt_lora``).
The alternatives of `benchmarks.digits_frontier.alternatives`, each at several strengths, use the
same bases and the same ODE sampler; the exact tilt is by importance resampling of the base.
`benchmarks.digits_frontier.metrics` says how diversity is measured,
`benchmarks.digits_frontier.margins` what "at equal reward" means, and
`benchmarks.digits_frontier.kl` how far a method has moved from the base, in relative entropy, which
a tilt minimises.

A row is one method at one strength (the temperature of a tilt, n of best-of-n, the weight of
gradient guidance, the updates of reward backpropagation).  Rows of tilts have further columns:

``log_weight_std``, ``ess``, ``path_kl``, ``log_z``
    the certificate; the values of the base have the suffix ``_base``, ``log_z_exact`` belongs to
    the base's chain and ``log_z_ode`` to its ODE.  With labels they are means over the labels.
``within_*``, ``max_z_*``, ``class_tv_*``
    class frequencies against importance-resampled samples of the base, for the tilted ODE, the
    tilted chain, and that chain with its weights, each against the base by the same sampler, as in
    `benchmarks.digits`: the number of the ten classes within two standard errors, the largest
    deviation in standard errors, and the total variation.  Under guidance the samples of a label
    are nearly all of one class, and rare exceptions have no usable standard error: look at the
    variation there.
``METRIC_over_METHOD``
    the margin in diversity over a method at equal reward, with its standard error; absent where the
    method does not reach the reward.  ``at_least_METHOD`` says 1 where the margins of coverage and
    distance are not below minus two standard errors, 0 where one is, and -1 where the reward is not
    reached.  Rows of the exact tilt have these columns too: no tilt can do better.
``kl``
    KL to the base in nats; absent where it overflows, as after many updates of backpropagation.
    ``kl_step_error`` is how much more it is in the first batch than by twice the steps.
``closeness_over_METHOD``
    by how many nats the method is further from the base at equal reward, with its standard error;
    ``as_close_METHOD`` is to this margin what ``at_least_METHOD`` is to the margins of diversity.

Run: ``python -m benchmarks.digits_frontier``.  Everything that has been computed is stored in the
folder; a second call computes only the missing parts.  Writes ``results/digits_frontier.json``, and
the figures beside it: ``.png`` (the frontiers) and ``_images.png`` (examples).
"""

from __future__ import annotations

import torch
import tyro

from benchmarks.digits_frontier import figure as frontier_figure
from benchmarks.digits_frontier import rows as frontier_rows
from benchmarks.digits_frontier.config import FrontierConfig
from benchmarks.digits_frontier.rows import Point, Row
from benchmarks.digits_frontier.runs import Runs
from benchmarks.digits_frontier.study import Study
from flows.training import prepare_process, write_json


def main(config: FrontierConfig) -> None:
    """Compute the missing points, print a table, and write the rows and the figures."""
    torch.set_num_threads(config.threads)
    prepare_process()
    study = Study.begin(config)
    points: dict[str, list[Point]] = {}
    rows: list[Row] = []
    for name in config.problems:
        points[name] = Runs(study, name).points()
        new = frontier_rows.make_rows(points[name])
        for row in new:
            row |= {"nearest_held_out": study.metrics.held_out}
            print(frontier_rows.line(row), flush=True)
        rows += new
        write_json(config.output, rows)
        frontier_figure.frontiers(config.output.with_suffix(".png"), points)
        stem = config.output.with_name(f"{config.output.stem}_images.png")
        frontier_figure.examples(stem, points)


if __name__ == "__main__":
    main(tyro.cli(FrontierConfig, prog="python -m benchmarks.digits_frontier"))
