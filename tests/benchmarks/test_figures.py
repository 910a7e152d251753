import math

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PathCollection
from PIL import Image

from benchmarks.common.figures import kernel_comparison


def make_rows():
    rng = np.random.default_rng(0)
    return [
        {
            "problem": f"problem {i}",
            "kernel": kernel,
            "steps": steps,
            "velocity_error": float(rng.lognormal(-2)),
            "w2_ratio": float(1 + rng.random()),
            "mode_tv": None if i == 0 else 0.0 if i == 1 else 0.01 * i,
        }
        for kernel in ("published", "matched")
        for steps in (40, 10)
        for i in range(7)
    ]


@pytest.mark.slow
def test_every_problem_is_a_dot_and_the_bar_is_the_median(tmp_path, drawn):
    rows = make_rows()
    path = kernel_comparison(tmp_path / "k.png", rows)
    with Image.open(path) as image:
        image.verify()
    for ax, metric in zip(drawn[0].axes, ("velocity_error", "w2_ratio", "mode_tv"), strict=True):
        assert ax.get_yscale() == "log"
        assert [label.get_text() for label in ax.get_xticklabels()] == ["K = 10", "K = 40"]
        strips = [c for c in ax.collections if isinstance(c, PathCollection)]
        bars = [c for c in ax.collections if isinstance(c, LineCollection)]
        groups = [(k, kernel) for k in (10, 40) for kernel in ("published", "matched")]
        centres = []
        for strip, bar, (k, kernel) in zip(strips, bars, groups, strict=True):
            found = [r[metric] for r in rows if (r["steps"], r["kernel"]) == (k, kernel)]
            expected = [0.01 if v == 0 else v for v in found if v is not None]
            np.testing.assert_allclose(strip.get_offsets()[:, 1], expected)
            (segment,) = bar.get_segments()
            np.testing.assert_allclose(segment[:, 1], np.median(expected))
            assert segment[0, 0] < strip.get_offsets()[:, 0].min()
            assert segment[1, 0] > strip.get_offsets()[:, 0].max()
            centres.append(segment[:, 0].mean())
        np.testing.assert_allclose(centres, [-0.21, 0.21, 0.79, 1.21])
    aims = [[line.get_ydata()[0] for line in ax.lines] for ax in drawn[0].axes]
    assert 1.5 in aims[1]
    assert 0.02 in aims[2]


def test_rows_that_lack_a_metric_or_are_bad(tmp_path):
    path = tmp_path / "k.png"
    with pytest.raises(ValueError, match="at least one row"):
        kernel_comparison(path, [])
    with pytest.raises(ValueError, match=r"kernel and steps, got a row with \['kernel'\]"):
        kernel_comparison(path, [{"kernel": "a"}])
    with pytest.raises(ValueError, match="some positive velocity_error"):
        kernel_comparison(path, [{"kernel": "a", "steps": 1, "velocity_error": math.nan}])
    with pytest.raises(ValueError, match="at most 7, got 8"):
        kernel_comparison(path, [{"kernel": str(i), "steps": 1} for i in range(8)])
    assert not path.exists()
